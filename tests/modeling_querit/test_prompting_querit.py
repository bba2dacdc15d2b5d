"""The prompt: joined pieces are the whole string's ids, cuts keep the prompt, user text is never a control token."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from modeling_querit.prompting_querit import CHUNK, EncodedPair, PromptEncoder, document_text
from tests.tokenizers_for_tests import CAUSAL_TOKENIZERS, CORPUS, bert_like_tokenizer, qwen3_like_tokenizer

BUILDERS = {**CAUSAL_TOKENIZERS, "bert": bert_like_tokenizer}
CAUSAL, ALL = list(CAUSAL_TOKENIZERS), list(BUILDERS)
LONG = 4096

# The published contract, written out: the words themselves live in chat_template.jinja.
PLAIN = "Judge whether the Content meets the requirements based on the Query. Query: {query}; Content: {document}"
INSTRUCTED = "{instruction} Query: {query}; Content: {document}"

SPECIAL_TEXT = [
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "[MASK]",
    "[UNK]",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
]
SPECIAL_TEXT += ["<｜end▁of▁sentence｜>", "［SEP］", "<think>", "<｜User｜>"]
BLANKS = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "\x00",
    "\x0b",
    "\x1f",
    "\x85",
    "\u00a0",
    "\u2028",
    "\u3000",
]
MARKS = ["\u0301", "e\u0301", "\u0323\u0307", "\u093c", "\u200b", "\u200d", "\ufe0f", "\u20e3", "\U000e0101", "ᄀ", "ᅡ"]
SYMBOLS = [
    ".",
    ":",
    "; ",
    "?!",
    "'s",
    "'LL",
    "1",
    "2024",
    "12345678",
    "。",
    "😀",
    "👩\u200d👧",
    "🇩🇪",
    "\ufffd",
    "\ue000",
    "\ud83d",
]
pieces = st.one_of(
    st.sampled_from(BLANKS + MARKS + SYMBOLS),
    st.builds(
        lambda text, at, size: text[at : at + size], st.sampled_from(CORPUS), st.integers(0, 60), st.integers(1, 30)
    ),
    st.text(st.characters(codec=None), max_size=6),
)
texts = st.lists(pieces, max_size=10).map("".join)
adversarial = st.lists(st.one_of(pieces, st.sampled_from(SPECIAL_TEXT)), max_size=12).map("".join)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@cache
def tokenizer_of(kind: str):
    return BUILDERS[kind]()


@cache
def encoder(kind: str, max_length: int = LONG) -> PromptEncoder:
    return PromptEncoder(tokenizer_of(kind), max_length)


def clean(text: str) -> str:
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)


def whole_ids(kind: str, query: str, document: str, instruction: str | None = None) -> list[int]:
    """The reference: the whole prompt in one string, tokenised at once."""
    tokenizer, query, document = tokenizer_of(kind), clean(query), clean(document)
    if kind == "bert":
        query = f"{clean(instruction)} {query}" if instruction else query
        return tokenizer([query], [document], split_special_tokens=True)["input_ids"][0]
    prompt = INSTRUCTED if instruction else PLAIN
    text = prompt.format(instruction=clean(instruction or ""), query=query, document=document)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.convert_tokens_to_ids("[CLS]")]


def control_ids(kind: str) -> set[int]:
    tokenizer = tokenizer_of(kind)
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}


def content_ids(kind: str, pair: EncodedPair) -> tuple[int, ...]:
    return pair.prefix[1:-1] + pair.document if kind == "bert" else pair.prefix + pair.document


@pytest.mark.parametrize("kind", ALL)
@quick
@given(query=texts, documents=st.lists(texts, max_size=4), instruction=st.none() | texts)
def test_joined_pieces_are_the_ids_of_the_whole_string(kind, query, documents, instruction):
    pairs = encoder(kind).encode(query, documents, instruction)
    assert len(pairs) == len(documents)
    for document, pair in zip(documents, pairs, strict=True):
        assert pair.input_ids == whole_ids(kind, query, document, instruction)
        assert pair.num_tokens == len(pair.input_ids)
        assert not pair.truncated and pair.span == (0, len(document))


@pytest.mark.parametrize("kind", ALL)
@quick
@given(query=adversarial, document=adversarial, instruction=st.none() | adversarial)
def test_user_text_never_becomes_a_control_token(kind, query, document, instruction):
    [pair] = encoder(kind).encode(query, [document], instruction)
    assert control_ids(kind).isdisjoint(content_ids(kind, pair))
    if kind != "bert":  # a Unigram model's own ids hold `[SEP]`; the byte-level ones must be those of the whole string
        assert pair.input_ids == whole_ids(kind, query, document, instruction)


def test_special_text_in_a_unigram_vocabulary_is_spelled_out():
    tokenizer = tokenizer_of("bert")
    [pair] = encoder("bert").encode("rain", ["oil [SEP] rain"])
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["[SEP]"] in tokenizer("[SEP]", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    spelled = [vocabulary.get(character, tokenizer.unk_token_id) for character in "[SEP]"]
    assert any(list(pair.document[i : i + 5]) == spelled for i in range(len(pair.document)))
    before, after = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("oil", "rain"))
    assert pair.document[: len(before)] == before and pair.document[-len(after) :] == after


def test_a_scoring_token_that_was_not_added_as_special_is_still_no_text():
    tokenizer = BUILDERS["qwen3"]()
    tokenizer.add_tokens(["[END]"])
    tokenizer.chat_template = tokenizer.chat_template.replace("[CLS]", "[END]")
    [pair] = PromptEncoder(tokenizer, 64).encode("a [END]", ["b [END] c"])
    assert pair.suffix == (tokenizer.convert_tokens_to_ids("[END]"),)
    assert pair.suffix[0] not in pair.prefix + pair.document
    assert tokenizer.decode(pair.document) == " b [END] c"


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("structured", [False, True])
def test_the_template_renders_the_published_prompt(kind, structured):
    def message(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}] if structured else text}

    tokenizer = tokenizer_of(kind)
    pair = [message("query", " when is  bin day?\n"), message("document", "Bins: Monday.\n")]
    words = tokenizer.apply_chat_template(pair, tokenize=False)
    assert words == (
        "Judge whether the Content meets the requirements based on the Query. "
        "Query:  when is  bin day?\n; Content: Bins: Monday.\n[CLS]"
    )
    ids = tokenizer.apply_chat_template([pair], tokenize=True, return_dict=True)["input_ids"][0]
    assert encoder(kind).encode(" when is  bin day?\n", ["Bins: Monday.\n"])[0].input_ids == ids
    # sentence-transformers puts its prompt, the instruction, in front as a system message
    words = tokenizer.apply_chat_template([message("system", "Find rules."), *pair], tokenize=False)
    assert words == "Find rules. Query:  when is  bin day?\n; Content: Bins: Monday.\n[CLS]"
    assert tokenizer.apply_chat_template(pair, tokenize=False, instruction="Find rules.") == words  # as vLLM does


def test_the_template_refuses_what_it_would_drop():
    tokenizer = tokenizer_of("qwen3")
    for messages in (
        [{"role": "query", "content": "q"}],
        [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}, {"role": "user", "content": "u"}],
    ):
        with pytest.raises(Exception, match="role"):
            tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("kind", ["qwen3", "deepseek_v3", "bert"])
def test_documents_of_one_query_share_their_prefix(kind):
    first, second = encoder(kind).encode("rain?", ["Rain.", "日本"], "Find.")
    assert first.prefix is second.prefix
    text = tokenizer_of(kind).decode(first.prefix)
    assert "rain?" in text.replace(" ?", "?") and "Rain." not in text
    assert encoder(kind).encode("rain?", []) == []


@pytest.mark.parametrize("kind", ALL)
@quick
@given(query=adversarial, document=adversarial, repeat=st.integers(1, 6), max_length=st.sampled_from([96, 100, 128]))
def test_a_cut_keeps_the_prompt_the_suffix_and_a_real_document(kind, query, document, repeat, max_length):
    query, document = query * repeat, document * repeat
    limited, free = encoder(kind, max_length), encoder(kind)
    [pair], [full] = limited.encode(query, [document]), free.encode(query, [document])
    assert pair.num_tokens <= max_length
    assert pair.suffix == full.suffix
    assert pair.truncated == (full.num_tokens > max_length or pair.prefix != full.prefix)
    words = free.encode("", [""])[0].prefix
    assert pair.prefix[: len(words) // 2] == words[: len(words) // 2]  # the start of the prompt stays
    start, end = pair.span
    assert start == 0 and end <= len(document)
    # The ids are those of a real string: the document cut to its span, after the query cut somewhere.
    ends = range(len(query) + 1) if pair.prefix != full.prefix else [len(query)]
    assert any(free.encode(query[:i], [document[:end]])[0].input_ids == pair.input_ids for i in ends)


@pytest.mark.parametrize("kind", ALL)
def test_the_query_has_a_cap_and_the_document_the_rest(kind):
    tokenizer, words = tokenizer_of(kind), "wind and rain " * 300
    free = encoder(kind)
    fixed = free.encode("", [""])[0].num_tokens
    limited = PromptEncoder(tokenizer, 200)
    long, short = limited.encode(words, [words, "rain"])
    query_tokens = len(long.prefix) - len(free.encode("", [""])[0].prefix)
    assert 0.75 * (200 - fixed) - 4 <= query_tokens <= 0.75 * (200 - fixed) + 1
    assert 196 <= long.num_tokens <= 200 and long.truncated
    assert short.prefix == long.prefix and short.truncated and short.span == (0, 4)
    [pair] = limited.encode("rain", [words])  # a short query leaves its share to the document
    assert 198 <= pair.num_tokens <= 200 and pair.truncated
    assert len(pair.prefix) == len(free.encode("rain", [words])[0].prefix)


@pytest.mark.parametrize("kind", ALL)
def test_at_the_least_max_length_a_query_and_a_document_token_stand(kind):
    with pytest.raises(ValueError, match=r"raise it to at least \d+") as error:
        PromptEncoder(tokenizer_of(kind), 2)
    least = int(str(error.value).rsplit(" ", 1)[1].rstrip("."))
    with pytest.raises(ValueError, match=f"at least {least}"):
        PromptEncoder(tokenizer_of(kind), least - 1)
    [pair] = PromptEncoder(tokenizer_of(kind), least).encode("aa aa", ["bb bb"])
    assert pair.num_tokens <= least and pair.document and pair.truncated


@pytest.mark.parametrize("kind", ALL)
def test_the_instruction_stands_before_the_query_and_must_leave_room(kind):
    limited = encoder(kind, 128)
    [pair] = limited.encode("rain", ["wind"], "Find the weather.")
    assert pair.input_ids == whole_ids(kind, "rain", "wind", "Find the weather.")
    assert limited.encode("rain", ["wind"], "") == limited.encode("rain", ["wind"])
    with pytest.raises(ValueError, match=r"too small for the instruction.*shorten it, or raise it to at least"):
        limited.encode("rain", ["wind"], "Find the weather. " * 100)
    [kept] = limited.encode("rain " * 500, ["wind"], "Find the weather.")
    assert "weather" in tokenizer_of(kind).decode(kept.prefix) and kept.truncated


@pytest.mark.parametrize("kind", ALL)
@quick
@given(document=adversarial, repeat=st.integers(1, 8))
def test_passages_cover_the_document_and_hold_the_ids_of_their_spans(kind, document, repeat):
    document *= repeat
    limited = encoder(kind, 64)
    windows = limited.encode_passages("rain", document)
    covered = 0
    for number, window in enumerate(windows):
        start, end = window.span
        assert start <= covered and (number == 0 or start > windows[number - 1].span[0])
        assert window.num_tokens <= 64 and not window.truncated
        assert window.input_ids == encoder(kind).encode("rain", [document[start:end]])[0].input_ids
        covered = end
    assert covered == len(document)
    whole = limited.encode("rain", [document])[0]
    assert windows == [whole] if not whole.truncated else len(windows) > 1


def test_passages_overlap_and_start_at_words():
    document = "wind rain fog waves weather " * 60
    limited = encoder("qwen3", 64)
    windows = limited.encode_passages("rain", document)
    for left, right in itertools.pairwise(windows):
        shared = len(encoder("qwen3").encode("", [document[right.span[0] : left.span[1]]])[0].document)
        assert 0.1 <= shared / len(left.document) <= 0.35
        assert document[right.span[0] - 1] == " " != document[right.span[0]]
    assert all(window.truncated for window in limited.encode_passages("wind " * 99, document))
    least = encoder("qwen3").encode("rain", [""])[0].num_tokens
    with pytest.raises(ValueError, match="too few tokens for its character '𠜎'"):
        encoder("qwen3", least + 2).encode_passages("rain", "𠜎")


@pytest.mark.parametrize("kind", ALL)
def test_of_a_million_characters_little_more_than_fits_is_tokenised(kind, monkeypatch):
    limited = encoder(kind, 256)
    tokenize, seen = limited._tokenize, []
    monkeypatch.setattr(limited, "_tokenize", lambda texts: seen.extend(map(len, texts)) or tokenize(texts))
    huge = ["wind and rain " * 71_500, "wind" * 250_000]
    if kind != "bert":  # whose tokenizer does not know this one: a million unknown characters in a row are one token
        huge.append("雨" * 1_000_000)
    pairs = limited.encode("rain " * 200_000, huge)
    assert sum(seen) < 100_000  # of four million
    assert all(pair.truncated and pair.num_tokens <= 256 for pair in pairs)
    assert pairs[0].num_tokens >= 252
    for document, pair in zip(huge, pairs, strict=True):
        assert limited.encode("rain " * 200_000, [document[:9000]])[0].document == pair.document or kind == "bert"


def test_blanks_that_make_no_tokens_are_no_reason_to_cut():
    document = " " * 20_000 + "wind"
    [pair] = encoder("bert", 64).encode("rain", [document])
    assert pair.span == (0, len(document)) and not pair.truncated
    assert pair.document == encoder("bert").encode("rain", [" wind"])[0].document


def test_the_room_for_a_document_counts_the_words_before_it():
    tokenizer = qwen3_like_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}; Content:\n \t \n \t {{ messages[1].content }}[CLS]"
    lead = len(tokenizer("\n \t \n \t ")["input_ids"])
    assert lead > 2
    with pytest.raises(ValueError, match="raise it to at least") as error:
        PromptEncoder(tokenizer, 2)
    least = int(str(error.value).rsplit(" ", 1)[1].rstrip("."))
    for max_length in (least, least + 3):
        [pair] = PromptEncoder(tokenizer, max_length).encode("wind " * 50, ["rain " * 50])
        assert pair.num_tokens <= max_length and len(pair.document) >= lead


def test_windows_of_a_long_document_copy_little_more_than_the_document():
    class Counting(str):
        copied = 0

        def __getitem__(self, key):
            found = super().__getitem__(key)
            Counting.copied += len(found)
            return found

    document = Counting("wind and rain " * 5_000)
    windows = encoder("qwen3", 64).encode_passages("rain", document)
    assert len(windows) > 300 and windows[-1].span[1] == len(document)
    assert Counting.copied < 12 * len(document)  # the rest of it for each window would be hundreds of times


def test_windows_of_single_characters_leave_none_out():
    document = "𠜎x" * 5
    least = encoder("qwen3").encode("rain", [""])[0].num_tokens
    windows = encoder("qwen3", least + 4).encode_passages("rain", document)
    covered = 0
    for window in windows:
        assert window.span[0] <= covered < window.span[1]
        covered = window.span[1]
    assert covered == len(document) and min(end - start for start, end in (window.span for window in windows)) == 1


def test_little_more_than_fits_is_tokenised(monkeypatch):
    limited, seen = PromptEncoder(tokenizer_of("qwen3"), 128), []
    tokenize = limited._tokenize
    monkeypatch.setattr(limited, "_tokenize", lambda texts: seen.extend(map(len, texts)) or tokenize(texts))
    limited.encode("rain " * 200_000, ["wind and rain " * 70_000])
    assert sum(seen) < 10_000


def test_documents_are_tokenised_a_few_at_a_time(monkeypatch):
    """Character offsets take far more memory than ids do."""
    limited, sizes = PromptEncoder(tokenizer_of("qwen3"), 128), []
    documents = [f"document {number} of many" for number in range(150)]
    expected = [limited.encode("many?", [document])[0] for document in documents]
    tokenize = limited._tokenize
    monkeypatch.setattr(limited, "_tokenize", lambda texts: sizes.append(len(texts)) or tokenize(texts))
    assert limited.encode("many?", documents) == expected
    assert max(sizes) == CHUNK


def test_lone_surrogates_are_replaced():
    [pair], [same] = (encoder("qwen3").encode(f"a{bad}", [f"b{bad}c"], f"i{bad}") for bad in ("\ud800", "\ufffd"))
    assert pair == same and pair.span == (0, 3)


def test_document_text():
    assert document_text("a text ") == "a text "
    assert document_text({"title": "Rain", "text": "It fell.", "id": 3}) == "Rain It fell."
    assert document_text({"title": "", "text": "It fell."}) == "It fell."
    assert document_text({"title": None, "text": "It fell."}) == document_text({"text": "It fell."}) == "It fell."
    with pytest.raises(ValueError, match='needs the key "text"'):
        document_text({"title": "Rain"})
    for wrong in (None, 3, b"bytes", ["a"], {"text": None}, {"text": "a", "title": 3}):
        with pytest.raises(TypeError):
            document_text(wrong)


def test_wrong_arguments_are_named():
    for query, instruction in ((3, None), ("q", ["i"])):
        with pytest.raises(TypeError, match="query and instruction must be strings"):
            encoder("qwen3").encode(query, ["a"], instruction)


def test_another_length_shares_what_was_learnt():
    limited = encoder("bert").limited(32)
    assert limited.encode("rain " * 40, ["wind " * 40]) == encoder("bert", 32).encode("rain " * 40, ["wind " * 40])
    assert limited._plain is encoder("bert")._plain
    with pytest.raises(ValueError, match="raise it to at least"):
        encoder("bert").limited(3)


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_threads_tokenise_alike_and_the_callers_tokenizer_is_left_alone(kind):
    """One encoder, eight threads, texts that spell control tokens, and a caller who pads and cuts with it meanwhile."""
    tokenizer = BUILDERS[kind]()
    shared = PromptEncoder(tokenizer, 64)
    texts = [f"{token} rain {token} {number}" for number, token in enumerate(SPECIAL_TEXT * 3)]
    expected = [shared.encode(text, texts) for text in texts]
    plain = tokenizer(texts)["input_ids"]

    def work(number):
        if number % 2:
            return [shared.encode(text, texts) for text in texts] == expected
        options = {"padding": True, "truncation": True, "max_length": 12}
        return all(len(ids) <= 12 for _ in range(30) for ids in tokenizer(texts, **options)["input_ids"])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(16)))
    assert tokenizer(texts)["input_ids"] == plain
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_templates_that_cannot_be_used_are_refused():
    def refused(template, message):
        tokenizer = qwen3_like_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            PromptEncoder(tokenizer, 64)

    query, document = "{{ messages[0].content }}", "{{ messages[1].content }}"
    refused(None, "no pair template that sets tokens")
    refused(f"{document} {query}[CLS]", "in this order")
    refused(f"{query} {query} {document}[CLS]", "once each")
    refused("{{ messages[0].content | trim }}; " + document + "[CLS]", "untrimmed")
    refused(f"{query}; {document}", "in an added token")
    refused(f"{query}; {document}[SEP]", "in an added token")
    refused(f"<|im_start|>{query}; {document}[CLS]", "plain text up to the document")
    tokenizer = qwen3_like_tokenizer()
    tokenizer.chat_template = f"{query}; {document}[CLS]"  # has no place for an instruction
    with pytest.raises(ValueError, match="contents of system, query, document"):
        PromptEncoder(tokenizer, 64).encode("q", ["d"], "i")
    tokenizer = bert_like_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS]:1 $A:1 [SEP]:1 $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with pytest.raises(ValueError, match="with the segment id 0"):
        PromptEncoder(tokenizer, 64)
