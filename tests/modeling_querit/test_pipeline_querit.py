"""The pipeline: forms of a call and options against scores by hand, wrong input named, folders that load anywhere."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from datasets import Dataset
from transformers import dynamic_module_utils, pipeline

from modeling_querit import pipeline_querit
from modeling_querit.modeling_querit import REMOTE_CODE, QueritForSequenceClassification
from modeling_querit.pipeline_querit import TextRankingPipeline
from tests.models_for_tests import CAUSAL_KINDS, KINDS, MAX_LENGTH, folder_of, save_folder, tiny_model, tokenizer_of
from tests.tokenizers_for_tests import CORPUS

ROOT = Path(__file__).parents[2]
QUERY = "Where does the river rise?"
DOCUMENTS = [CORPUS[8], CORPUS[12], "oil", CORPUS[14], {"title": "Der Zug", "text": CORPUS[11], "id": 7}]
PLAIN = "Judge whether the Content meets the requirements based on the Query. Query: {query}; Content: {document}"
INSTRUCTED = "{instruction} Query: {query}; Content: {document}"


@cache
def ranker_of(kind: str) -> TextRankingPipeline:
    return TextRankingPipeline(
        model=QueritForSequenceClassification.from_pretrained(folder_of(kind)), tokenizer=tokenizer_of(kind)
    )


def text_of(document) -> str:
    return document if isinstance(document, str) else f"{document['title']} {document['text']}"


@cache
def score_by_hand(kind: str, query: str, document: str, instruction: str | None = None) -> float:
    """The published prompt in one string, tokenised at once, one unpadded row, softmax."""
    tokenizer = tokenizer_of(kind)
    options = {}
    if kind == "bert":
        encoded = tokenizer(f"{instruction} {query}" if instruction else query, document)
        ids, options["token_type_ids"] = encoded["input_ids"], torch.tensor([encoded["token_type_ids"]])
    else:
        words = (INSTRUCTED if instruction else PLAIN).format(query=query, document=document, instruction=instruction)
        ids = [*tokenizer(words)["input_ids"], tokenizer.convert_tokens_to_ids("[CLS]")]
    with torch.no_grad():
        logit = ranker_of(kind).model(torch.tensor([ids]), **options).logits.item()
    p = torch.softmax(torch.tensor([0.0, logit], dtype=torch.float64), 0)
    return (p[1] - p[0]).item()


def check(kind: str, query: str, documents: list, results: list[dict], instruction: str | None = None) -> None:
    """All documents, each with its own score, best first."""
    assert sorted(result["index"] for result in results) == list(range(len(documents)))
    for result in results:
        expected = score_by_hand(kind, query, text_of(documents[result["index"]]), instruction)
        assert result["score"] == pytest.approx(expected, abs=1e-5)
        assert result["probability"] == pytest.approx((expected + 1) / 2, abs=1e-5)
        assert result["truncated"] is False
        assert "passage" not in result
        assert "logit" not in result
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) - min(scores) > 1e-3


# ---------------------------------------------------------------- forms of a call


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_a_call(kind):
    ranker = ranker_of(kind)
    results = ranker(QUERY, DOCUMENTS)
    check(kind, QUERY, DOCUMENTS, results)
    assert all(list(result) == ["index", "score", "probability", "document", "truncated"] for result in results)
    assert all(result["document"] is DOCUMENTS[result["index"]] for result in results)  # extras and all
    assert ranker({"query": QUERY, "documents": DOCUMENTS}) == results
    assert ranker({"query": QUERY, "texts": DOCUMENTS}) == results
    assert ranker(OrderedDict(query=QUERY, texts=tuple(DOCUMENTS))) == results
    assert ranker(query=QUERY, documents=DOCUMENTS) == results

    requests = [{"query": QUERY, "documents": DOCUMENTS}, {"query": "oil?", "texts": DOCUMENTS[:3]}]
    first, second = ranker(requests)
    check(kind, QUERY, DOCUMENTS, first)
    check(kind, "oil?", DOCUMENTS[:3], second)
    [only] = ranker(requests[:1])
    check(kind, QUERY, DOCUMENTS, only)


@pytest.mark.parametrize("kind", KINDS)
def test_through_transformers_pipeline(kind):
    ranker = pipeline("text-ranking", model=str(folder_of(kind)), trust_remote_code=True)
    assert type(ranker).__name__ == "TextRankingPipeline"
    assert type(ranker).__module__.startswith("transformers_modules.")
    check(kind, QUERY, DOCUMENTS, ranker(QUERY, DOCUMENTS))
    # Options of the constructor are defaults; those of a call go before.
    ranker = pipeline("text-ranking", model=str(folder_of(kind)), trust_remote_code=True, top_k=2, batch_tokens=300)
    assert len(ranker(QUERY, DOCUMENTS)) == 2
    assert len(ranker(QUERY, DOCUMENTS, top_k=3)) == 3
    with pytest.raises(TypeError, match="no option topk"):
        pipeline("text-ranking", model=str(folder_of(kind)), trust_remote_code=True, topk=2)


def test_a_query_and_documents_may_be_empty_lists():
    ranker = ranker_of("qwen3")
    assert ranker(QUERY, []) == [] == ranker({"query": QUERY, "texts": []}) == ranker([])
    assert ranker([{"query": QUERY, "documents": []}, {"query": "oil?", "documents": []}]) == [[], []]
    assert [len(ranking) for ranking in ranker([{"query": QUERY, "documents": d} for d in ([], ["a"])])] == [0, 1]


# ---------------------------------------------------------------- options


def test_top_k_threshold_and_return_documents():
    ranker = ranker_of("qwen3")
    full = ranker(QUERY, DOCUMENTS)
    assert ranker(QUERY, DOCUMENTS, top_k=2) == full[:2]
    assert ranker(QUERY, DOCUMENTS, top_k=99) == full
    assert ranker(QUERY, DOCUMENTS, top_k=numpy.int64(2)) == full[:2]
    limit = full[2]["score"]
    assert ranker(QUERY, DOCUMENTS, threshold=limit) == full[:3]
    assert ranker(QUERY, DOCUMENTS, threshold=limit + 1e-9) == full[:2]
    assert ranker(QUERY, DOCUMENTS, threshold=limit, top_k=1) == full[:1]
    assert ranker(QUERY, DOCUMENTS, threshold=1) == []
    assert ranker(QUERY, DOCUMENTS, threshold=-1) == full
    bare = [{key: value for key, value in result.items() if key != "document"} for result in full]
    assert ranker(QUERY, DOCUMENTS, return_documents=False) == bare
    both = ranker([{"query": QUERY, "documents": DOCUMENTS}] * 2, top_k=1)
    assert [len(ranking) for ranking in both] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_instruction_takes_the_place_of_the_prompts_words(kind):
    results = ranker_of(kind)(QUERY, DOCUMENTS, instruction="Find a text about water.")
    check(kind, QUERY, DOCUMENTS, results, "Find a text about water.")
    plain = {result["index"]: result["score"] for result in ranker_of(kind)(QUERY, DOCUMENTS)}
    assert max(abs(plain[result["index"]] - result["score"]) for result in results) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_title_stands_before_the_text(kind):
    documents = [
        {"title": "Rain", "text": "It fell."},
        {"text": "It fell."},
        {"title": "", "text": "It fell."},
        "It fell.",
    ]
    scores = {result["index"]: result["score"] for result in ranker_of(kind)(QUERY, documents)}
    assert scores[1] == scores[2] == scores[3] != scores[0]
    assert scores[0] == pytest.approx(score_by_hand(kind, QUERY, "Rain It fell."), abs=1e-5)
    assert scores[1] == pytest.approx(score_by_hand(kind, QUERY, "It fell."), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_max_length_cuts_and_says_so(kind):
    ranker, long = ranker_of(kind), " ".join(CORPUS)
    widths = []
    hook = ranker.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(int(kwargs["attention_mask"].sum(1).max())), with_kwargs=True
    )
    for options, limit in (({}, MAX_LENGTH), ({"max_length": 96}, 96)):
        results = {result["index"]: result for result in ranker(QUERY, [long, "oil"], **options)}
        assert limit - 4 <= max(widths) <= limit
        assert [results[index]["truncated"] for index in (0, 1)] == [True, False]
        assert results[0]["document"] == long
        widths.clear()
    hook.remove()
    query = {result["index"]: result for result in ranker("why " * 900, ["oil"])}
    assert query[0]["truncated"]
    with pytest.raises(ValueError, match=f"max_length={MAX_LENGTH + 1} is over what this model takes: {MAX_LENGTH}"):
        ranker(QUERY, DOCUMENTS, max_length=MAX_LENGTH + 1)
    with pytest.raises(ValueError, match=r"max_length=3 is too small.*raise it to at least"):
        ranker(QUERY, DOCUMENTS, max_length=3)


def test_the_tokenizers_own_limit_counts_too():
    tokenizer = type(tokenizer_of("bert")).from_pretrained(folder_of("bert"), model_max_length=40)
    ranker = TextRankingPipeline(model=tiny_model("bert"), tokenizer=tokenizer)
    assert ranker.max_length == 40
    assert ranker_of("bert").max_length == MAX_LENGTH
    [result] = ranker(QUERY, ["word " * 60])
    assert result["truncated"]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_tokens_and_shared_prefix_reach_the_engine(kind, monkeypatch):
    ranker, seen, score_pairs = ranker_of(kind), [], pipeline_querit.score_pairs

    def see(model, pairs, pad_token_id, batch_tokens, shared_prefix):
        seen.append((pad_token_id, batch_tokens, shared_prefix))
        return score_pairs(model, pairs, pad_token_id, batch_tokens, shared_prefix)

    monkeypatch.setattr(pipeline_querit, "score_pairs", see)
    pad = tokenizer_of(kind).pad_token_id
    for options, expected in (
        ({}, (pad, None, None)),
        ({"batch_tokens": 64, "shared_prefix": False}, (pad, 64, False)),
    ):
        check(kind, QUERY, DOCUMENTS, ranker(QUERY, DOCUMENTS, **options))
        assert seen.pop() == expected
    if kind in CAUSAL_KINDS:
        check(kind, QUERY, DOCUMENTS, ranker(QUERY, DOCUMENTS, shared_prefix=True))
    else:
        with pytest.raises(ValueError, match="shared_prefix needs a causal"):
            ranker(QUERY, DOCUMENTS, shared_prefix=True)


# ---------------------------------------------------------------- long documents


@pytest.mark.parametrize("kind", KINDS)
def test_max_passage_takes_the_best_window_and_tells_which(kind):
    ranker, options = ranker_of(kind), {"max_length": 128, "long_documents": "max_passage"}
    filler = " ".join(CORPUS[8:11]) * 8
    needles = sorted(CORPUS[11:20], key=lambda text: score_by_hand(kind, QUERY, text))
    long, short = {"title": "A title", "text": f"{filler} {needles[-1]}", "id": 1}, "oil"
    results = {result["index"]: result for result in ranker(QUERY, [long, short], **options)}
    best, text = results[0], text_of(long)
    start, end = best["passage"]
    assert 0 <= start < end <= len(text)
    assert best["document"] is long
    assert best["truncated"] is False
    assert best["score"] == pytest.approx(score_by_hand(kind, QUERY, text[start:end]), abs=1e-5)
    assert "passage" not in results[1]
    assert results[1]["score"] == pytest.approx(score_by_hand(kind, QUERY, short), abs=1e-5)

    windows = [pair.span for pair in ranker.encoder(128).encode_passages(QUERY, text)]
    assert len(windows) > 4
    assert windows[0][0] == 0
    assert windows[-1][1] == len(text)
    scores = [score_by_hand(kind, QUERY, text[a:b]) for a, b in windows]
    assert best["score"] == pytest.approx(max(scores), abs=1e-5)
    assert (start, end) == windows[scores.index(max(scores))]
    [cut] = ranker(QUERY, [long], max_length=128)
    assert cut["truncated"]
    assert cut["score"] == pytest.approx(scores[0], abs=1e-5)


def test_a_needle_at_the_end_of_a_long_document_is_found(monkeypatch):
    """With a head that looks for one token: the best passage is the one that holds it, and counts for the document."""
    model, tokenizer = tiny_model("bert"), tokenizer_of("bert")
    [needle] = tokenizer("oil", add_special_tokens=False)["input_ids"][-1:]

    def forward(input_ids, attention_mask, **_):
        found = ((input_ids == needle) & attention_mask.bool()).sum(-1, keepdim=True)
        return type("Output", (), {"logits": found.float()})

    monkeypatch.setattr(model, "forward", forward)
    ranker = TextRankingPipeline(model=model, tokenizer=tokenizer)
    long = "rain and wind and rain " * 150 + "oil"
    cut, whole = (ranker("why", [long, "wind"], long_documents=how) for how in ("truncate", "max_passage"))
    assert {result["score"] for result in cut} == {0.0}
    assert [result["index"] for result in cut] == [0, 1]
    assert whole[0]["index"] == 0
    assert whole[0]["score"] == pytest.approx(math.tanh(0.5))
    assert whole[0]["passage"][1] == len(long)
    assert "oil" in long[slice(*whole[0]["passage"])]
    # Windows with equal scores: the first.
    [same] = ranker("why", ["rain and wind and rain " * 150], long_documents="max_passage")
    assert same["passage"][0] == 0


# ---------------------------------------------------------------- fusion with the first stage


def reciprocal_rank_fusion(*rankings: list[int]) -> dict[int, float]:
    return {item: sum(1 / (60 + ranking.index(item) + 1) for ranking in rankings) for item in rankings[0]}


def test_first_stage_scores_are_fused_by_rank():
    ranker, first_stage = ranker_of("qwen3"), [0.1, 9.0, -3, 4.5, 2]
    own = ranker(QUERY, DOCUMENTS)
    results = ranker(QUERY, DOCUMENTS, first_stage_scores=first_stage)
    expected = reciprocal_rank_fusion([result["index"] for result in own], [1, 3, 4, 0, 2])
    assert {result["index"]: result["fused_score"] for result in results} == pytest.approx(expected)
    fused = [result["fused_score"] for result in results]
    assert fused == sorted(fused, reverse=True)
    scores = {result["index"]: result["score"] for result in own}
    assert {result["index"]: result["score"] for result in results} == scores  # the model's own stays
    assert ranker(QUERY, DOCUMENTS, first_stage_scores=first_stage, top_k=2) == results[:2]
    assert ranker(QUERY, [], first_stage_scores=[]) == []

    requests = [{"query": QUERY, "documents": DOCUMENTS}, {"query": QUERY, "documents": DOCUMENTS[:2]}]
    both = ranker(requests, first_stage_scores=[first_stage, [1, 2]])
    assert both[0] == results
    assert len(both[1]) == 2
    for wrong in (
        [1, 2],
        [*first_stage[:4], math.nan],
        [*first_stage[:4], None],
        3,
        "abcde",
        [first_stage],
        dict(enumerate(first_stage)),
        set(first_stage),
        b"abcde",
        [*first_stage[:4], 10**400],
        [*first_stage[:4], True],
    ):
        with pytest.raises(ValueError, match="one finite number for each document"):
            ranker(QUERY, DOCUMENTS, first_stage_scores=wrong)
    with pytest.raises(ValueError, match="one finite number for each document"):
        ranker(requests, first_stage_scores=first_stage)


def test_fusion_breaks_ties_by_the_models_order():
    ranker = ranker_of("qwen3")
    own = [result["index"] for result in ranker(QUERY, DOCUMENTS[:2])]
    turned = [0.0, 0.0]
    turned[own[1]] = 1.0  # the first stage says the opposite: both fuse to the same
    results = ranker(QUERY, DOCUMENTS[:2], first_stage_scores=turned)
    assert results[0]["fused_score"] == results[1]["fused_score"]
    assert [result["index"] for result in results] == own


# ---------------------------------------------------------------- input that is none, or odd


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("", DOCUMENTS), {}, ValueError, "The query is empty"),
        ((" \n", DOCUMENTS), {}, ValueError, "The query is empty"),
        ((None, DOCUMENTS), {}, TypeError, "The query must be a string, not NoneType"),
        ((7, DOCUMENTS), {}, TypeError, "The query must be a string, not int"),
        (([QUERY], DOCUMENTS), {}, TypeError, "for several give a list of requests"),
        ((), {}, TypeError, "Expected .query, documents."),
        ((None,), {}, TypeError, "not NoneType"),
        ((7,), {}, TypeError, "not int"),
        ((QUERY,), {}, TypeError, "documents must be a list of strings or dicts, not NoneType"),
        ((QUERY, "a document"), {}, TypeError, "documents must be a list of strings or dicts, not str"),
        ((QUERY, {"text": "a"}), {}, TypeError, "documents must be a list of strings or dicts, not dict"),
        ((QUERY, 7), {}, TypeError, "documents must be a list"),
        ((QUERY, ["a", None]), {}, TypeError, r"documents\[1\]: A document is a string .* not NoneType"),
        ((QUERY, ["a", 7]), {}, TypeError, r"documents\[1\]: .* not int"),
        ((QUERY, [b"a"]), {}, TypeError, r"documents\[0\]: .* not bytes"),
        ((QUERY, [["a"]]), {}, TypeError, r"documents\[0\]: .* not list"),
        ((QUERY, [{"title": "a"}]), {}, ValueError, r'documents\[0\]: .* needs the key "text"'),
        ((QUERY, [{"text": 7}]), {}, TypeError, r"documents\[0\]: .* strings"),
        (({"query": QUERY},), {}, ValueError, 'must have "query" and either'),
        (({"documents": DOCUMENTS},), {}, ValueError, 'must have "query" and either'),
        (({"query": QUERY, "documents": [], "texts": []},), {}, ValueError, "either"),
        (({"query": None, "documents": []},), {}, TypeError, "must be a string, not NoneType"),
        (({"query": QUERY, "documents": None},), {}, TypeError, "must be a list .* not NoneType"),
        (({"query": QUERY, "documents": ["a"], "top_k": 1},), {}, ValueError, "Options, like top_k, are given to the"),
        (([{"query": QUERY, "texts": ["a"], "first_stage_scores": [1]}],), {}, ValueError, "Options, like top_k"),
        ((QUERY, numpy.array(["a", "b"])), {}, TypeError, r"not ndarray: give list\(documents\)"),
        ((QUERY, pandas.Series(["a", "b"])), {}, TypeError, r"not Series: give list\(documents\)"),
        ((QUERY, Dataset.from_dict({"text": ["a"]})), {}, TypeError, r"not Dataset: give list\(documents\)"),
        ((QUERY, {"a", "b"}), {}, TypeError, r"not set: give list\(documents\)"),
        ((QUERY, {"a": "b"}), {}, TypeError, r"not dict\.$"),  # whose list would be that of its keys
        ((QUERY, pandas.DataFrame({"text": ["a"]})), {}, TypeError, r"not DataFrame\.$"),
        ((QUERY, DOCUMENTS), {"batch_size": 8}, TypeError, "no option batch_size.* batch_tokens"),
        ((QUERY, DOCUMENTS), {"devices": ["cpu"]}, TypeError, "no option devices.*querit.load"),
        (([{"query": QUERY, "texts": []}, {"query": QUERY}],), {}, ValueError, 'Request 1 must have "query"'),
        (([{"query": QUERY, "texts": []}, QUERY],), {}, TypeError, "Request 1 must be a dict .* not str"),
        (([{"query": " ", "texts": ["a"]}],), {}, ValueError, "empty"),
        ((QUERY, DOCUMENTS), {"topk": 3}, TypeError, "no option topk"),
        ((QUERY, DOCUMENTS), {"top_k": 0}, ValueError, "top_k must be a whole number of at least 1, not 0"),
        ((QUERY, DOCUMENTS), {"top_k": -1}, ValueError, "top_k must be"),
        ((QUERY, DOCUMENTS), {"top_k": True}, ValueError, "top_k must be"),
        ((QUERY, DOCUMENTS), {"top_k": 2.0}, ValueError, "top_k must be"),
        ((QUERY, DOCUMENTS), {"max_length": "9"}, ValueError, "max_length must be"),
        ((QUERY, DOCUMENTS), {"batch_tokens": 0}, ValueError, "batch_tokens must be"),
        ((QUERY, DOCUMENTS), {"threshold": 1.01}, ValueError, "threshold must be a score, in"),
        ((QUERY, DOCUMENTS), {"threshold": -2}, ValueError, "threshold must be a score, in"),
        ((QUERY, DOCUMENTS), {"threshold": math.nan}, ValueError, "threshold must be a score, in"),
        ((QUERY, DOCUMENTS), {"threshold": "0"}, ValueError, "threshold must be a score, in"),
        ((QUERY, DOCUMENTS), {"threshold": True}, ValueError, "threshold must be a score, in"),
        ((QUERY, DOCUMENTS), {"long_documents": "split"}, ValueError, "one of truncate, max_passage, not 'split'"),
        ((QUERY, DOCUMENTS), {"instruction": " "}, ValueError, "instruction must be a non-empty string"),
        ((QUERY, DOCUMENTS), {"instruction": 7}, ValueError, "instruction must be a non-empty string"),
        ((QUERY, DOCUMENTS), {"instruction": "word " * 999}, ValueError, "too small for the instruction"),
        ((QUERY, DOCUMENTS), {"shared_prefix": "yes"}, ValueError, "shared_prefix must be True or False"),
        ((QUERY, DOCUMENTS), {"return_documents": 0}, ValueError, "return_documents must be True or False"),
    ],
)
def test_what_is_no_request_is_refused_by_name(arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        ranker_of("qwen3")(*arguments, **options)
    assert type(raised.value) is error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("long_documents", ["truncate", "max_passage"])
def test_a_million_characters(kind, long_documents):
    ranker = ranker_of(kind)
    if long_documents == "truncate":
        documents = ["wind and rain " * 71_500, "雨" * 1_000_000, "oil"]
        results = {result["index"]: result for result in ranker("rain " * 200_000, documents)}
        assert all(result["truncated"] for result in results.values())
    else:
        documents = ["wind and rain " * 700, "oil"]
        results = {result["index"]: result for result in ranker(QUERY, documents, long_documents=long_documents)}
        assert not any(result["truncated"] for result in results.values())
        assert "passage" in results[0]
    assert all(-1 <= result["score"] <= 1 for result in results.values())


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_score_the_same_and_keep_the_order_given(kind):
    documents = ["oil", CORPUS[9], "oil", CORPUS[9], {"text": "oil"}, *CORPUS[10:14], "oil"]
    results = ranker_of(kind)(QUERY, documents, batch_tokens=100)
    oil = [result for result in results if result["index"] in (0, 2, 4, 9)]
    assert len({result["score"] for result in oil}) == 1
    assert [result["index"] for result in oil] == [0, 2, 4, 9]
    places = [results.index(result) for result in oil]
    assert places == list(range(places[0], places[0] + 4))


def test_scores_at_the_end_of_the_range_are_ordered_by_the_logit():
    model = tiny_model("qwen3")
    model.head.weight.data *= 40
    model.head.bias.data = torch.tensor([-60.0, 60.0])
    results = TextRankingPipeline(model=model, tokenizer=tokenizer_of("qwen3"))(QUERY, DOCUMENTS)
    assert {result["score"] for result in results} == {1.0}  # no longer apart
    small = {result["index"]: result["score"] for result in ranker_of("qwen3")(QUERY, DOCUMENTS)}
    assert [result["index"] for result in results] == sorted(small, key=lambda index: -small[index])


@pytest.mark.parametrize("kind", KINDS)
def test_odd_text_is_scored(kind):
    documents = ["", " ", "\ud83d lone", "\x00", "[CLS]", "</s>", "<|im_end|>", "é", "e\u0301"]
    results = {result["index"]: result for result in ranker_of(kind)("\udc00?", documents)}
    assert len(results) == len(documents)
    assert all(math.isfinite(result["score"]) for result in results.values())
    assert results[2]["document"] == "\ud83d lone"
    [empty] = ranker_of(kind)(QUERY, [""])
    if kind != "bert":  # a pair with an empty second text is a template of its own there
        assert empty["score"] == pytest.approx(score_by_hand(kind, QUERY, ""), abs=1e-5)


def test_weights_that_are_not_numbers_name_query_and_document():
    model = tiny_model("bert")
    tokenizer = tokenizer_of("bert")
    broken = min(set(tokenizer("oil")["input_ids"]) - set(tokenizer("rain wind why")["input_ids"]))
    model.get_input_embeddings().weight.data[broken] = math.nan
    ranker = TextRankingPipeline(model=model, tokenizer=tokenizer)
    requests = [{"query": "why", "documents": ["rain"]}, {"query": "why", "documents": ["wind", "rain", "oil"]}]
    with pytest.raises(ValueError, match=r"Document 2 of query 1 .* scored nan in torch\.float32"):
        ranker(requests)


def test_a_pipeline_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        TextRankingPipeline(model=tiny_model("qwen3"))


def test_a_folder_without_its_vocabulary_does_not_rank(tmp_path):
    """transformers makes a tokenizer of the special tokens alone, to which all texts are one."""
    folder = shutil.copytree(folder_of("bert"), tmp_path / "bert")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    ranker = pipeline("text-ranking", model=str(folder), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"with its words: tokenizer\.json"):
        ranker(QUERY, DOCUMENTS)


@pytest.mark.parametrize("fastest", [torch.float32, torch.bfloat16])
def test_the_dtype_on_a_cpu(fastest, tmp_path, monkeypatch):
    folder = save_folder(tmp_path, "deepseek_v3", tiny_model("deepseek_v3", torch.bfloat16))

    def load(**kwargs):
        return pipeline(
            "text-ranking",
            str(folder),
            trust_remote_code=True,
            pipeline_class=TextRankingPipeline,
            device="cpu",
            **kwargs,
        )

    monkeypatch.setattr(pipeline_querit, "fastest_cpu_dtype", lambda: fastest)
    ranker = load()
    assert {p.dtype for p in ranker.model.parameters()} == {fastest}
    buffers = {b.dtype for b in ranker.model.buffers() if b.is_floating_point()}
    assert buffers == {torch.float32}  # RoPE's and the router's: rounding them would change the scores
    assert load(dtype=torch.bfloat16).model.dtype == torch.bfloat16  # asked for
    assert load(dtype=torch.float32).model.dtype == torch.float32
    given = tiny_model("qwen3", torch.float16)
    half = TextRankingPipeline(model=given, tokenizer=tokenizer_of("qwen3"))
    assert half.model.dtype == torch.float32  # no rounding on the way
    assert given.dtype == torch.float16  # the caller's own is left as it was


# ---------------------------------------------------------------- folders

CHILD = """
import json, sys
for name in ("modeling_querit", "trl", "sentence_transformers", "datasets", "accelerate", "peft", "gradio"):
    sys.modules[name] = None  # as if it were not installed
from transformers import dynamic_module_utils, pipeline
work = json.loads(sys.argv[1])
scores = {}
for folder, again in work["folders"].items():
    ranker = pipeline("text-ranking", model=folder, trust_remote_code=True)
    ranking = ranker(work["query"], work["documents"])
    scores[folder] = {result["index"]: result["score"] for result in ranking}
    if again:
        ranker.save_pretrained(again)
print(json.dumps(scores))
"""


PICKLED = """
import pickle, sys
for name in ("modeling_querit", "sentence_transformers", "datasets"):
    sys.modules[name] = None  # as if it were not installed
ranker = pickle.loads(open(sys.argv[1], "rb").read())
print([result["score"] for result in ranker(sys.argv[2], sys.argv[3:])])
"""


@pytest.mark.parametrize("remote", [True, False])
def test_unpickled_in_a_fresh_process(remote, tmp_path):
    """As a Ray task, or a process pool, gets it."""
    ranker = ranker_of("bert")
    if remote:
        ranker, script = pipeline("text-ranking", model=str(folder_of("bert")), trust_remote_code=True), PICKLED
    else:
        script = PICKLED.replace('"modeling_querit", ', "")
    (tmp_path / "ranker.pkl").write_bytes(pickle.dumps(ranker))
    environment = {**os.environ, "HF_MODULES_CACHE": dynamic_module_utils.HF_MODULES_CACHE, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "ranker.pkl"), QUERY, *CORPUS[:3]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [result["score"] for result in ranker(QUERY, CORPUS[:3])]
    assert json.loads(done.stdout) == pytest.approx(expected, abs=1e-5)
    again = copy.deepcopy(ranker)
    assert type(again) is type(ranker) and again.model is not ranker.model


FORKED = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(2)
import querit
ranker = querit.load(sys.argv[2])
child = os.fork()
if child == 0:
    results = ranker("Where does the river rise?", ["rain " * 200] * 2 + ["wind " * 200, "oil"])
    os._exit(0 if len(results) == 4 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_built_in_the_parent_it_ranks_in_a_forked_child(tmp_path):
    """As gunicorn --preload has it. Weights in 16 bits are the harder case: their dtype is measured, then cast."""
    shape = {"hidden_size": 256, "intermediate_size": 1024}  # large enough for several threads
    folder = save_folder(tmp_path, "bert", tiny_model("bert", torch.float16, **shape))
    done = subprocess.run([sys.executable, "-c", FORKED, str(ROOT), str(folder)], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_int8_by_quantize_dynamic_finds_every_linear_layer():
    model = copy.deepcopy(ranker_of("bert").model)
    layers = sum(type(module) is torch.nn.Linear for module in model.modules())
    TextRankingPipeline(model=model, tokenizer=tokenizer_of("bert"))
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    found = sum(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in small.modules())
    assert found == layers > 10


def fresh_process(tmp_path, folders: dict[str, str | None]) -> dict[str, dict[int, float]]:
    """Scores of `QUERY` and `DOCUMENTS` by folders, loaded where only torch and transformers are installed, offline."""
    work = json.dumps({"folders": folders, "query": QUERY, "documents": DOCUMENTS})
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "code"),
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, work], capture_output=True, text=True, cwd=elsewhere, env=environment
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    return {folder: {int(index): score for index, score in scores.items()} for folder, scores in found.items()}


def test_saved_folders_rank_the_same_in_a_fresh_process_and_so_do_theirs(tmp_path):
    folders, expected = {}, {}
    for kind in KINDS:
        expected[kind] = {result["index"]: result["score"] for result in ranker_of(kind)(QUERY, DOCUMENTS)}
        ranker_of(kind).save_pretrained(tmp_path / f"{kind} by-pipeline")
        save_folder(tmp_path / f"{kind} by.model", kind)
        folders[str(tmp_path / f"{kind} by-pipeline")] = str(tmp_path / f"{kind} again")
        folders[str(tmp_path / f"{kind} by.model")] = str(tmp_path / f"{kind} by.model")  # over itself
    first = fresh_process(tmp_path, folders)
    again = {folder: None for folder in [*folders.values(), *folders]}
    second = fresh_process(tmp_path, again)
    assert len(first) == 6
    assert len(second) == 9
    for folder, scores in [*first.items(), *second.items()]:
        kind = os.path.basename(folder).split(" ")[0]
        assert scores == pytest.approx(expected[kind], abs=1e-5), folder
    for folder in second:
        files = set(os.listdir(folder))
        assert {*REMOTE_CODE, "config.json", "model.safetensors", "tokenizer.json"} <= files
        assert ("chat_template.jinja" in files) == (os.path.basename(folder).split(" ")[0] != "bert")
        config = json.loads(Path(folder, "config.json").read_text())
        name = "modeling_querit.QueritForSequenceClassification"  # of this folder, not of the one it came from
        assert config["auto_map"] == {"AutoModel": name, "AutoModelForSequenceClassification": name}
        assert config["custom_pipelines"]["text-ranking"]["impl"] == "pipeline_querit.TextRankingPipeline"
        assert "--" not in json.dumps(config)
    original, saved = (
        {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "tokenizer_config.json"}  # it notes its origin
        for folder in (folder_of("qwen3"), tmp_path / "qwen3 by.model")
    )
    assert original == saved  # nothing lost, nothing changed
