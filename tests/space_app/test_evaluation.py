"""nDCG@10 before and after, against the formula computed here."""

from math import log2

import pytest

from space_app.evaluation import candidates_of, evaluate, examples, ndcg, set_of_examples
from space_app.inputs import JudgedSet
from space_app.limits import Limits, RefusedError
from tests.space_app.test_ranking import finish

CORPUS = {f"d{n}": f"{'tide ' * (n % 3)}text number {n}" for n in range(30)}
JUDGED = JudgedSet(
    {"q1": "tide", "q2": "text number 7"},
    CORPUS,
    {"q1": {"d1": 2, "d2": 1, "d3": 0}, "q2": {"d7": 1, "d8": 1}},
)


def formula(order, judged):
    """Järvelin and Kekäläinen (2002), the gain being the relevance, as trec_eval has it."""
    gain = sum(judged.get(document, 0) / log2(place + 2) for place, document in enumerate(order[:10]))
    ideal = sum(x / log2(place + 2) for place, x in enumerate(sorted(judged.values(), reverse=True)[:10]))
    return gain / ideal


def test_before_and_after_are_the_formulas(models, limits):
    found, shares = finish(evaluate(models, limits, JUDGED, "Tiny"))
    ranker = models.ranker("Tiny")
    before = candidates_of(ranker.tokenizer, JUDGED, ["q1", "q2"], limits.candidates)
    values = {}
    for query, text in JUDGED.queries.items():
        ids = before[query]
        after = [ids[row["index"]] for row in ranker(text, [CORPUS[document] for document in ids])]
        values[text] = formula(ids, JUDGED.qrels[query]), formula(after, JUDGED.qrels[query])
    assert {o.query: (o.before, o.after) for o in found.outcomes} == {q: pytest.approx(v) for q, v in values.items()}
    assert found.before == pytest.approx(sum(v[0] for v in values.values()) / 2)
    assert found.after == pytest.approx(sum(v[1] for v in values.values()) / 2)
    gains = [outcome.after - outcome.before for outcome in found.outcomes]
    assert gains == sorted(gains, reverse=True) and (found.queries, found.documents) == (2, 30)
    assert shares == sorted(shares)


def test_ties_do_not_follow_the_order_of_the_file(models):
    corpus = {f"d{n}": "no word of it" for n in range(200)}
    judged = JudgedSet({"q": "tide"}, corpus, {"q": {"d0": 1}})
    order = candidates_of(models.ranker("Tiny").tokenizer, judged, ["q"], 200)["q"]
    assert sorted(order) == sorted(corpus) and order != list(corpus) and order[0] != "d0"


def test_own_candidates_are_all_that_is_ranked(models):
    judged = set_of_examples()
    found = candidates_of(models.ranker("Tiny").tokenizer, judged, list(judged.queries), 30)
    assert {query: sorted(ids) for query, ids in found.items()} == {q: sorted(c) for q, c in judged.candidates.items()}


def test_long_documents_are_read_as_asked(models, limits):
    corpus = {"begin": "tide " + "word " * 900, "end": "word " * 900 + "tide", "short": "the tide rises"}
    judged = JudgedSet({"q": "tide"}, corpus, {"q": {"end": 1}})
    for reading in ("truncate", "max_passage"):
        found, _ = finish(evaluate(models, limits, judged, "Tiny", reading))
        ranker = models.ranker("Tiny")
        ids = candidates_of(ranker.tokenizer, judged, ["q"], limits.candidates)["q"]
        order = [ids[r["index"]] for r in ranker("tide", [corpus[d] for d in ids], long_documents=reading)]
        assert found.after == pytest.approx(1 / log2(order.index("end") + 2))
    with pytest.raises(RefusedError, match="long_documents must be one of"):
        finish(evaluate(models, limits, judged, "Tiny", "all"))


@pytest.mark.parametrize("example", examples(), ids=[example["name"] for example in examples()])
def test_the_release_ranks_the_answer_of_each_example_first(models, example):
    ranker, reading = models.ranker("Nano"), example.get("long_documents", "truncate")
    assert ranker(example["query"], example["documents"], long_documents=reading)[0]["index"] == example["answer"]


def test_nano_orders_the_examples_better_than_bm25(models, limits):
    found, _ = finish(evaluate(models, limits, set_of_examples(), "Nano"))
    assert len(found.outcomes) == len(examples()) and found.after > found.before + 0.05 and found.found == 1


def test_large_sets_are_sampled_and_time_is_limited(models):
    queries = {f"q{n}": f"text number {n}" for n in range(20)}
    judged = JudgedSet(queries, CORPUS, {query: {f"d{query[1:]}": 1} for query in queries})
    limits = Limits(judged_queries=4, candidates=5)
    found, _ = finish(evaluate(models, limits, judged, "Tiny"))
    assert len(found.outcomes) == 4 and (found.queries, found.candidates) == (20, 5)
    again, _ = finish(evaluate(models, limits, judged, "Tiny"))
    assert [o.query for o in again.outcomes] == [o.query for o in found.outcomes]
    with pytest.raises(RefusedError, match="took too long"):
        finish(evaluate(models, Limits(evaluation_seconds=-1), judged, "Tiny"))
    with pytest.raises(RefusedError, match="2,000 characters each"):
        finish(evaluate(models, Limits(), JudgedSet({"q": "x" * 3000}, CORPUS, {"q": {"d0": 1}}), "Tiny"))


def test_ndcg_is_of_places_alone():
    qrels = {"q": {"a": 1}}
    assert ndcg({"q": ["b", "a"]}, qrels)["q"] == pytest.approx(1 / log2(3))
    assert ndcg({"q": [*"bcdefghijk", "a"]}, qrels)["q"] == 0


def test_the_examples_are_of_eight_languages_and_across_them():
    names = [example["name"] for example in examples()]
    assert {"English", "中文", "Español", "Français", "Deutsch", "Русский", "한국어", "日本語"} <= set(names)
    assert sum("→" in name for name in names) >= 3
    for example in examples():
        assert 0 <= example["answer"] < len(example["documents"])
