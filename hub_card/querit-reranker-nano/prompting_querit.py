"""A query, documents and an instruction become token ids: the one place that knows the parts of the prompt.

The words of the prompt live in the tokenizer, never here: in its chat template (causal backbones), or in its own pair
template (`<s> query </s></s> document </s>`, bidirectional backbones). Both are learnt from the tokenizer when a
`PromptEncoder` is made. Control tokens come from the template only: text that spells one is encoded as plain text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Characters per token of the first slice of a long text that is tokenised; it is doubled until it fills its room.
SLICE_CHARACTERS = 8
CHUNK = 64  # documents tokenised at once, in parallel
# Stand for the contents while the template is learnt. Blanks at both ends: a template that trims would lose them.
SENTINELS = {"system": " \ue000system\ue001 ", "query": " \ue000query\ue001 ", "document": " \ue000document\ue001 "}
# Beginnings of a document with which the cut before it is tried, one of each kind of character, between broken bars.
PROBE_DOCUMENTS = (  # noqa: SIM905 - a list of one a line would be longer than the module
    "¦ ¦  ¦   a¦\t¦\ta¦\n¦\n\na¦\r\n¦ \n a¦\x00¦\x0b¦\x85¦\u00a0a¦\u3000日¦\u200b¦\ufe0f¦\u20e3¦\ufffd¦\ue000¦\u0301"
    "¦\u0301a¦a¦A¦Word¦s¦'s¦'ll go¦’s¦1¦123¦12345¦٣¦é¦e\u0301¦ß¦日本¦한국¦ᄀ¦ひら¦カナ¦中1¦Привет¦שלום¦مرحبا¦नमस्ते"
    "¦ไทย¦😀¦👩\u200d👧¦.¦...¦:¦::¦;¦(a¦«¦。¦「¦—¦$5¦€5¦#a¦@a¦/a¦\\n¦_¦<a>"
).split("¦")
PROBE_QUERIES = ("", "query", "1", "日本", "e\u0301", "a \n", "😀")


class EncodedPair(NamedTuple):
    """The token ids of one query-document pair, in the three pieces that the scoring engine works with."""

    prefix: tuple[int, ...]  # all before the document: instruction, query, the prompt's words
    document: tuple[int, ...]
    suffix: tuple[int, ...]  # what closes the prompt: `[CLS]`, or `</s>` of the pair template
    truncated: bool  # the query or the document was cut
    span: tuple[int, int] | None  # characters [start, end) of the document's text that stand in `document`

    @property
    def input_ids(self) -> list[int]:
        return [*self.prefix, *self.document, *self.suffix]

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


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]  # characters [start, end) of each token


class _Prompt(NamedTuple):
    """A frame with a query in it, ready for documents."""

    prefix: tuple[int, ...]
    before_document: str  # text that is tokenised together with the document
    cut: int  # characters of `before_document` that belong to the prefix: 0 where the cut is safe
    room: int  # tokens for `before_document` + the document
    suffix: tuple[int, ...]
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
        query_share: the most a query takes of the tokens that `max_length` leaves beside the prompt's own words, the
            instruction and the suffix. It is a fixed cap, whatever the document's length; a longer query is cut at its
            end. The document gets all that the query leaves.

    The ids are those of tokenising the whole prompt at once, with the contents as plain text. Lone surrogates, which no
    tokenizer takes, become U+FFFD. Raises ValueError where the template cannot be used or `max_length` is too small.
    """

    def __init__(self, tokenizer: Any, max_length: int, query_share: float = 0.75) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("PromptEncoder needs a fast tokenizer (tokenizer.json): it cuts by character offsets.")
        if not 0 < query_share < 1:
            raise ValueError(f"query_share is a share between 0 and 1, both excluded, not {query_share}.")
        self.tokenizer, self.max_length, self.query_share = tokenizer, max_length, query_share
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
        # An unknown character may be the unknown token, unless that token has another job too.
        self._controls = (special | set(tokenizer.all_special_ids)) - ({tokenizer.unk_token_id} - named)
        self._spelled: dict[int, list[int]] = {}
        self._templates: dict[bool, tuple[str, _Frame]] = {}
        self.cut_is_safe = True
        frame = self._frame(None)
        self._controls.update(frame.suffix)
        self.cut_is_safe = not tokenizer.chat_template or self._cut_is_safe(frame)
        self._prompt("", None)  # raises if max_length is too small

    def encode(self, query: str, documents: Sequence[str], instruction: str | None = None) -> list[EncodedPair]:
        """One `EncodedPair` of at most `max_length` tokens for each document, in order.

        Where the cut before the document is safe, all of them hold the same `prefix`. Raises TypeError for what is not
        a string, and ValueError for an instruction that leaves no room.
        """
        if isinstance(documents, str):
            raise TypeError("documents is a list of strings; for a single document give [document].")
        for index, document in enumerate(documents):
            _require_text(document, f"documents[{index}]")
        prompt = self._prompt(query, instruction)
        size = SLICE_CHARACTERS * prompt.room
        pairs = []
        for start in range(0, len(documents), CHUNK):  # offsets take ten times the memory of ids: few at a time
            chunk = documents[start : start + CHUNK]
            slices = self._tokenize([prompt.before_document + document[:size] for document in chunk])
            for document, tokens in zip(chunk, slices, strict=True):
                tokens, kept = self._fit(prompt.before_document, document, "", prompt.room, tokens)
                pairs.append(self._pair(prompt, tokens, (0, kept), kept < len(document)))
        return pairs

    def encode_passages(
        self, query: str, document: str, instruction: str | None = None, overlap: float = 0.25
    ) -> list[EncodedPair]:
        """The document in windows that each fit `max_length` and together cover it: a single one if all of it fits.

        `overlap` is the share of a window's tokens that the next one repeats; a window starts at a word where it can.
        `span` says which characters a window holds, `truncated` only whether the query was cut. Raises as `encode`, and
        ValueError where `max_length` leaves less room than one character of the document takes.
        """
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap is a share from 0 up to, not including, 1; not {overlap}.")
        _require_text(document, "document")
        prompt = self._prompt(query, instruction)
        base = len(prompt.before_document)
        pairs: list[EncodedPair] = []
        start = end = guess = 0
        while not pairs or end < len(document):
            tokens, kept = self._fit(prompt.before_document, document[start:], "", prompt.room, guess=guess)
            if not kept and document:
                raise ValueError(
                    f"max_length={self.max_length} leaves the document too few tokens for its character "
                    f"{document[start]!r}. Raise max_length or shorten the query."
                )
            end, guess = start + kept, 64 + kept + kept // 4  # the next window holds about as many characters
            pairs.append(self._pair(prompt, tokens, (start, end), False))
            own = [begin for begin, _ in tokens.offsets if begin >= base]
            again = own[-int(overlap * len(own)) or len(own) :]
            back = start + again[0] - base if again else end
            word = re.search(r"\s\S", document[back:end])
            start = max(start + 1, back + word.start() + 1 if again and word else back)
        return pairs

    def _pair(self, prompt: _Prompt, tokens: _Tokens, span: tuple[int, int], document_was_cut: bool) -> EncodedPair:
        starts = tokens.offsets if prompt.cut else []
        # A token that stands on both sides of the cut goes to the prefix.
        at = sum(start < prompt.cut for start, _ in starts)
        prefix = (*prompt.prefix, *tokens.ids[:at]) if at else prompt.prefix
        truncated = prompt.query_was_cut or document_was_cut
        return EncodedPair(prefix, tuple(tokens.ids[at:]), prompt.suffix, truncated, span)

    def _prompt(self, query: str, instruction: str | None) -> _Prompt:
        _require_text(query, "query")
        frame = self._frame(instruction)
        after = frame.between if self.cut_is_safe else frame.between + frame.lead
        lead = frame.lead if self.cut_is_safe else ""
        words_tokens, lead_tokens = self._tokenize([frame.before + after, lead])
        words = len(words_tokens.ids)
        least = max(1, len(lead_tokens.ids))  # tokens of the shortest document
        fixed = len(frame.head) + words + len(frame.middle) + len(frame.suffix)
        room = self.max_length - fixed
        if room < 1 + least:
            fix = f"raise it to at least {fixed + 1 + least}"
            if instruction:
                raise ValueError(
                    f"The instruction leaves no room for a query and a document within max_length={self.max_length}: "
                    f"shorten it, or {fix}."
                )
            raise ValueError(f"max_length={self.max_length} is too small for the prompt's own words: {fix}.")
        cap = min(max(1, int(self.query_share * room)), room - least)
        tokens, kept = self._fit(frame.before, query, after, words + cap)
        if self.cut_is_safe:
            prefix = (*frame.head, *tokens.ids, *frame.middle)
            before_document, cut, room = frame.lead, 0, self.max_length - len(prefix) - len(frame.suffix)
        else:
            prefix = ()
            context = frame.before + query[:kept] + frame.between
            before_document, cut, room = context + frame.lead, len(context), self.max_length - len(frame.suffix)
        return _Prompt(prefix, before_document, cut, room, frame.suffix, kept < len(query))

    def _fit(
        self, before: str, text: str, after: str, room: int, tokens: _Tokens | None = None, guess: int = 0
    ) -> tuple[_Tokens, int]:
        """The tokens of `before + text[:kept] + after`, at most `room` of them, and `kept`, as long as can be.

        Little more than fits is tokenised. The text is cut between tokens, and what is left is tokenised anew: the ids
        are always those of a real string. `tokens` are those of the first slice, where the caller has them; `guess` is
        the characters of that slice.
        """
        kept = min(len(text), guess or SLICE_CHARACTERS * room)
        tokens = tokens or self._tokenize([before + text[:kept] + after])[0]
        while kept < len(text) and len(tokens.ids) <= room:
            kept = min(len(text), 2 * kept)
            tokens = self._tokenize([before + text[:kept] + after])[0]
        while len(tokens.ids) > room and kept:
            last = sum(start < len(before) + kept for start, _ in tokens.offsets) - (len(tokens.ids) - room)
            # The next token begins inside the last one where both are bytes of one character: leave that character out.
            end = min(tokens.offsets[last - 1][1], tokens.offsets[last][0]) if last > 0 else 0
            kept = max(0, min(end - len(before), kept - 1))
            tokens = self._tokenize([before + text[:kept] + after])[0]
        return tokens, kept

    def _tokenize(self, texts: Sequence[str]) -> list[_Tokens]:
        """Tokens of each text as plain text: no control token, whatever the text spells."""
        if not texts:
            return []
        encodings = self._call([re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts], True).encodings
        return [self._spell_controls(_Tokens(encoding.ids, encoding.offsets)) for encoding in encodings]

    def _call(self, texts: Sequence[str], split_special_tokens: bool) -> Any:
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=split_special_tokens, padding=False,
            truncation=False, return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip

    def _spell_controls(self, tokens: _Tokens) -> _Tokens:
        """Replaces control tokens by their characters: a Unigram vocabulary holds `</s>` as a piece like any other."""
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
                ids.extend([known] if known is not None else self._call([character], True)["input_ids"][0])
            self._spelled[token_id] = [i for i in ids if i not in self._controls]
        return self._spelled[token_id]

    def _frame(self, instruction: str | None) -> _Frame:
        if instruction is not None:
            _require_text(instruction, "instruction")
        if not self.tokenizer.chat_template:
            # The pair template has no place of its own for an instruction: it stands before the query.
            return _pair_frame(self.tokenizer)._replace(before=f"{instruction} " if instruction else "")
        if bool(instruction) not in self._templates:
            self._templates[bool(instruction)] = self._chat_frame(bool(instruction))
        opening, frame = self._templates[bool(instruction)]
        return frame._replace(before=opening + instruction + frame.before) if instruction else frame

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
        suffix = tuple(self._call([closing], False)["input_ids"][0])
        if not suffix or suffix[0] not in self.tokenizer.added_tokens_decoder:
            raise ValueError(
                f"The chat template ends in {closing!r}, which is no added token of this tokenizer. Use the release's "
                "own tokenizer, or add it as a special token, with its row of the embeddings."
            )
        if any(not self._controls.isdisjoint(ids) for ids in self._call(words, False)["input_ids"]):
            raise ValueError("Before the document, the chat template may write plain text only, no control tokens.")
        between = words[-1].rstrip()
        frame = _Frame((), words[-2], between, (), words[-1][len(between) :], suffix)
        if with_instruction and frame[2:] != self._frame(None)[2:]:
            raise ValueError("With an instruction, the chat template may not change what follows the query.")
        return words[0], frame

    def _cut_is_safe(self, frame: _Frame) -> bool:
        """Whether prefix and document give, tokenised apart, the ids of the whole; tried on many documents."""
        probes = [*PROBE_DOCUMENTS, *(chr(i) for i in range(1, 0x20000, 61) if not 0xD800 <= i <= 0xDFFF)]
        cut, lead = frame.between, frame.lead
        for token in self.tokenizer.get_vocab():  # a token that reaches over the cut is the surest way to break it
            text = token.replace("Ġ", " ").replace("▁", " ")
            if cut[-1:] in text:
                reach = (i for i in range(1, len(text)) if cut.endswith(text[:i]) and text.startswith(lead, i))
                probes.extend(text[i + len(lead) :] for i in reach)
        documents = [tokens.ids for tokens in self._tokenize([lead + probe for probe in probes])]
        for query in PROBE_QUERIES:
            prefix = frame.before + query + cut
            head, *wholes = self._tokenize([prefix, *(prefix + lead + probe for probe in probes)])
            if any(whole.ids != head.ids + ids for whole, ids in zip(wholes, documents, strict=True)):
                return False
            probes, documents = probes[: len(PROBE_DOCUMENTS)], documents[: len(PROBE_DOCUMENTS)]
        return True


def _pair_frame(tokenizer: Any) -> _Frame:
    """The tokenizer's own pair template, read off an encoded pair."""
    encoded = tokenizer("a", "b", return_token_type_ids=True, return_attention_mask=False)
    ids, parts = encoded["input_ids"], encoded.sequence_ids(0)
    query, document = parts.index(0), parts.index(1)
    query_end, document_end = query + parts.count(0), document + parts.count(1)
    head, middle, suffix = ids[:query], ids[query_end:document], ids[document_end:]
    if not middle or not suffix:
        raise ValueError(
            "The tokenizer has no chat template, and no pair template that sets tokens between query and document and "
            "after them: they would be glued together. Put the release's chat_template.jinja beside the tokenizer."
        )
    if any(encoded["token_type_ids"]):
        raise ValueError("The tokenizer's pair template sets token types, which an EncodedPair does not carry.")
    return _Frame(tuple(head), "", "", tuple(middle), "", tuple(suffix))


def _require_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, not {type(text).__name__} (see document_text for titles).")
