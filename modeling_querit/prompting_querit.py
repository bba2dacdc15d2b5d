"""A query, documents and an instruction become token ids: the one place that knows the parts of the prompt.

The words of the prompt live in the tokenizer, never here: in its chat template (causal backbones), or in its own pair
template (`[CLS] query [SEP] document [SEP]` with segment ids, bidirectional backbones). Control tokens come from the
template only: text that spells one is encoded as plain text.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Characters per token of the first slice of a long text that is tokenised; it is doubled until it fills its room.
SLICE_CHARACTERS = 8
# The most a query takes of the tokens that `max_length` leaves beside the prompt's own words, the instruction and the
# suffix: a fixed cap, whatever the document's length. And the share of a window's tokens that the next one repeats.
QUERY_SHARE, OVERLAP = 0.75, 0.25
CHUNK = 64  # documents tokenised at once, in parallel
# Stand for the contents while the template is learnt. Blanks at both ends: a template that trims would lose them.
SENTINELS = {"system": " \ue000system\ue001 ", "query": " \ue000query\ue001 ", "document": " \ue000document\ue001 "}


class EncodedPair(NamedTuple):
    """The token ids of one query-document pair, in the three pieces that the scoring engine works with."""

    prefix: tuple[int, ...]  # all before the document: instruction, query, the prompt's words
    document: tuple[int, ...]
    suffix: tuple[int, ...]  # what closes the prompt: `[CLS]`, or `[SEP]` of the pair template
    truncated: bool  # the query or the document was cut
    span: tuple[int, int] | None  # characters [start, end) of the document's text that stand in `document`
    document_type: int = 0  # the segment id of document and suffix; that of the prefix is 0

    @property
    def input_ids(self) -> list[int]:
        return [*self.prefix, *self.document, *self.suffix]

    @property
    def token_type_ids(self) -> list[int]:
        return [0] * len(self.prefix) + [self.document_type] * (len(self.document) + len(self.suffix))

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + len(self.document) + len(self.suffix)


class _Frame(NamedTuple):
    """What stands round the contents: ids of control tokens, and the text between them."""

    head: tuple[int, ...]
    before: str  # text before the query
    between: str  # text after the query, up to the cut
    middle: tuple[int, ...]
    lead: str  # text after the cut: the blank before the document
    suffix: tuple[int, ...]
    document_type: int = 0


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]  # characters [start, end) of each token


class _Prompt(NamedTuple):
    """A frame with a query in it, ready for documents."""

    prefix: tuple[int, ...]
    frame: _Frame
    room: int  # tokens for lead + document
    query_was_cut: bool


def document_text(document: str | Mapping[str, Any]) -> str:
    """The text that is ranked: a string as it is; `{"title", "text"}` as `"{title} {text}"`, other keys ignored.

    Raises TypeError for anything else, and ValueError for a mapping without `text`.
    """
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping):
        raise TypeError(f'A document is a string or a mapping {{"title", "text"}}, not {type(document).__name__}.')
    if "text" not in document:
        raise ValueError(f'A document given as a mapping needs the key "text"; its keys are {[*document]}.')
    title, text = document.get("title"), document["text"]
    if not isinstance(text, str) or not isinstance(title, str | None):
        raise TypeError(
            f"A document's title and text are strings, not {type(title).__name__} and {type(text).__name__}."
        )
    return f"{title} {text}" if title else text


class PromptEncoder:
    """Encodes pairs for one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer, with a chat template for the roles `system` (the instruction), `query`
            and `document`, or with a pair template of its own.
        max_length: the most tokens of a pair, all counted.

    A query longer than its share is cut at its end; the document gets all that the query leaves. The ids are those of
    tokenising the whole prompt at once, with the contents as plain text, where the tokenizer splits words at blanks, as
    those of the releases do. Lone surrogates, which no tokenizer takes, become U+FFFD. Raises ValueError where the
    template cannot be used or `max_length` is too small.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not getattr(tokenizer, "is_fast", False) or len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("Needed is a fast tokenizer, which cuts by characters, with its words: tokenizer.json.")
        self.tokenizer, self.max_length = tokenizer, max_length
        # A copy: the caller's has switches, for padding and special tokens, that its other threads use.
        self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True  # as plain text
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
        # An unknown character may be the unknown token, unless that token has another job too.
        self._controls = (special | set(tokenizer.all_special_ids)) - ({tokenizer.unk_token_id} - named)
        self._spelled: dict[int, list[int]] = {}
        self._templates: dict[bool, tuple[str, _Frame]] = {}
        self._controls.update(self._frame(None).suffix)
        self._prompt("", None)  # raises if max_length is too small

    def limited(self, max_length: int) -> "PromptEncoder":
        """The same encoder with another `max_length`; what it learnt of the tokenizer is shared."""
        other = copy.copy(self)
        other.max_length = max_length
        other._prompt("", None)
        return other

    def encode(self, query: str, documents: Sequence[str], instruction: str | None = None) -> list[EncodedPair]:
        """One `EncodedPair` of at most `max_length` tokens for each document, in order; all hold the same `prefix`.

        Raises TypeError for what is no string, and ValueError for an instruction that leaves no room.
        """
        prompt = self._prompt(query, instruction)
        lead, size = prompt.frame.lead, SLICE_CHARACTERS * prompt.room
        pairs = []
        for start in range(0, len(documents), CHUNK):  # offsets take ten times the memory of ids: few at a time
            chunk = documents[start : start + CHUNK]
            for document, tokens in zip(chunk, self._tokenize([lead + text[:size] for text in chunk]), strict=True):
                tokens, kept = self._fit(lead, document, "", prompt.room, tokens)
                pairs.append(_pair(prompt, tokens, (0, kept), kept < len(document)))
        return pairs

    def encode_passages(self, query: str, document: str, instruction: str | None = None) -> list[EncodedPair]:
        """The document in windows that each fit `max_length` and together cover it: a single one if all of it fits.

        Windows overlap, and start at a word where they can. `span` says which characters a window holds, `truncated`
        only whether the query was cut. Raises as `encode`, and ValueError where there is no room for one character.
        """
        prompt = self._prompt(query, instruction)
        lead = prompt.frame.lead
        pairs: list[EncodedPair] = []
        start = end = guess = 0
        while not pairs or end < len(document):
            tokens, kept = self._fit(lead, document, "", prompt.room, guess=guess, begin=start)
            if not kept and document:
                raise ValueError(
                    f"max_length={self.max_length} leaves the document too few tokens for its character "
                    f"{document[start]!r}. Raise max_length or shorten the query."
                )
            end, guess = start + kept, 64 + kept + kept // 4  # the next window holds about as many characters
            pairs.append(_pair(prompt, tokens, (start, end), False))
            own = [begin for begin, _ in tokens.offsets if begin >= len(lead)]
            again = own[-int(OVERLAP * len(own)) or len(own) :]
            back = start + again[0] - len(lead) if again else end
            word = re.search(r"\s\S", document[back:end])
            start = max(start + 1, back + word.start() + 1 if again and word else back)
        return pairs

    def _prompt(self, query: str, instruction: str | None) -> _Prompt:
        if not isinstance(query, str) or not isinstance(instruction, str | None):
            raise TypeError("query and instruction must be strings.")
        frame = self._frame(instruction)
        words, lead = (len(tokens.ids) for tokens in self._tokenize([frame.before + frame.between, frame.lead]))
        least = max(1, lead)  # tokens of the shortest document
        fixed = len(frame.head) + words + len(frame.middle) + len(frame.suffix)
        room = self.max_length - fixed
        if room < 1 + least:
            words_of, fix = ("the instruction", "shorten it, or ") if instruction else ("the prompt's own words", "")
            fix += f"raise it to at least {fixed + 1 + least}."
            raise ValueError(f"max_length={self.max_length} is too small for {words_of} and a document: {fix}")
        cap = min(max(1, int(QUERY_SHARE * room)), room - least)
        tokens, kept = self._fit(frame.before, query, frame.between, words + cap)
        prefix = (*frame.head, *tokens.ids, *frame.middle)
        return _Prompt(prefix, frame, self.max_length - len(prefix) - len(frame.suffix), kept < len(query))

    def _fit(
        self, before: str, text: str, after: str, room: int, tokens: Any = None, guess: int = 0, begin: int = 0
    ) -> tuple[_Tokens, int]:
        """The tokens of `before + text[begin:][:kept] + after`, at most `room`, and `kept`, as long as can be.

        Little more than fits is tokenised, cut between tokens, and tokenised anew: the ids are those of a real string.
        `tokens` are those of the first slice, where the caller has them, and `guess` its characters.
        """
        rest = len(text) - begin
        kept = min(rest, guess or SLICE_CHARACTERS * room)
        tokens = tokens or self._tokenize([before + text[begin : begin + kept] + after])[0]
        while kept < rest and len(tokens.ids) <= room:
            kept = min(rest, 2 * kept)
            tokens = self._tokenize([before + text[begin : begin + kept] + after])[0]
        while len(tokens.ids) > room and kept:
            last = sum(start < len(before) + kept for start, _ in tokens.offsets) - (len(tokens.ids) - room)
            # The next token begins inside the last one where both are bytes of one character: leave that character out.
            end = min(tokens.offsets[last - 1][1], tokens.offsets[last][0]) if last > 0 else 0
            kept = max(0, min(end - len(before), kept - 1))
            tokens = self._tokenize([before + text[begin : begin + kept] + after])[0]
        return tokens, kept

    def _tokenize(self, texts: Sequence[str]) -> list[_Tokens]:
        """Tokens of each text as plain text: no control token, whatever the text spells."""
        texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        encodings = self._plain.encode_batch(texts, add_special_tokens=False)
        return [self._spell_controls(_Tokens(encoding.ids, encoding.offsets)) for encoding in encodings]

    def _spell_controls(self, tokens: _Tokens) -> _Tokens:
        """Replaces control tokens by their characters: a Unigram vocabulary holds `[SEP]` as a piece like any other."""
        if self._controls.isdisjoint(tokens.ids):
            return tokens
        spelled = _Tokens([], [])
        for token_id, offset in zip(*tokens, strict=True):
            ids = self._spell(token_id) if token_id in self._controls else [token_id]
            spelled.ids.extend(ids)
            spelled.offsets.extend([offset] * len(ids))
        return spelled

    def _spell(self, token_id: int) -> list[int]:
        if token_id not in self._spelled:
            ids: list[int] = []
            vocabulary, unknown = self.tokenizer.get_vocab(), self.tokenizer.unk_token_id
            unknown = None if unknown in self._controls else unknown  # byte-level: none is needed
            for character in self.tokenizer.convert_ids_to_tokens(token_id):
                known = vocabulary.get(character, unknown)
                ids += self._plain.encode(character, add_special_tokens=False).ids if known is None else [known]
            self._spelled[token_id] = [i for i in ids if i not in self._controls]
        return self._spelled[token_id]

    def _frame(self, instruction: str | None) -> _Frame:
        template = bool(self.tokenizer.chat_template)
        kind = bool(instruction) and template
        if kind not in self._templates:
            self._templates[kind] = self._chat_frame(kind) if template else _pair_frame(self.tokenizer)
        opening, frame = self._templates[kind]
        if not instruction:
            return frame
        # The pair template has no place of its own for an instruction: it stands before the query.
        return frame._replace(before=opening + instruction + (frame.before if kind else " "))

    def _chat_frame(self, with_instruction: bool) -> tuple[str, _Frame]:
        """What the chat template writes before the instruction, and round query and document."""
        roles = ["system", "query", "document"] if with_instruction else ["query", "document"]
        messages = [{"role": role, "content": SENTINELS[role]} for role in roles]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        parts = re.split("(" + "|".join(SENTINELS.values()) + ")", text)
        if parts[1::2] != [SENTINELS[role] for role in roles]:
            raise ValueError(
                f"The tokenizer's chat template does not write the contents of {', '.join(roles)} once each, in this "
                f"order and untrimmed. Use the release's chat_template.jinja. It rendered: {text!r}"
            )
        *words, closing = parts[::2]
        *before, suffix = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts[::2])
        is_added = suffix and suffix[0] in self.tokenizer.added_tokens_decoder
        if not is_added or any(not self._controls.isdisjoint(ids) for ids in before):
            raise ValueError(
                "The chat template must be plain text up to the document, without control tokens, and end in an added "
                f"token of this tokenizer, not in {closing!r}. Use the release's own tokenizer and template."
            )
        between = words[-1].rstrip()
        frame = _Frame((), words[-2], between, (), words[-1][len(between) :], tuple(suffix))
        if with_instruction and frame[2:] != self._frame(None)[2:]:
            raise ValueError("With an instruction, the chat template may not change what follows the query.")
        return words[0], frame


def _pair(prompt: _Prompt, tokens: _Tokens, span: tuple[int, int], document_was_cut: bool) -> EncodedPair:
    truncated = prompt.query_was_cut or document_was_cut
    suffix, document_type = prompt.frame.suffix, prompt.frame.document_type
    return EncodedPair(prompt.prefix, tuple(tokens.ids), suffix, truncated, span, document_type)


def _pair_frame(tokenizer: Any) -> tuple[str, _Frame]:
    """The tokenizer's own pair template, read off an encoded pair."""
    encoded = tokenizer("a", "b", return_token_type_ids=True)
    ids, types, parts = encoded["input_ids"], encoded["token_type_ids"], encoded.sequence_ids(0)
    query, document = parts.index(0), parts.index(1)
    query_end, document_end = query + parts.count(0), document + parts.count(1)
    head, middle, suffix = ids[:query], ids[query_end:document], ids[document_end:]
    if not middle or not suffix or any(types[:document]) or len({*types[document:]}) > 1:
        raise ValueError(
            "The tokenizer has no chat template, and no pair template that sets tokens between query and document and "
            f"after them, with the segment id 0 up to the document and one number from there on: {ids}, {types}. Put "
            "the release's chat_template.jinja beside the tokenizer."
        )
    return "", _Frame(tuple(head), "", "", tuple(middle), "", tuple(suffix), types[-1])
