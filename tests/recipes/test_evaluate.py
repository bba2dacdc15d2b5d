import json
import math
import random
from pathlib import Path

import pytest

from recipes.evaluate import EvaluateArguments, evaluate, ndcg_at_10
from tests.models_for_tests import folder_of
from tests.recipes.folders_for_tests import small_set, tiny_retriever


def ndcg_by_hand(ranking, relevance):
    gain = sum(relevance.get(d, 0) / math.log2(rank + 1) for rank, d in enumerate(ranking[:10], 1))
    best = sum(r / math.log2(rank + 1) for rank, r in enumerate(sorted(relevance.values(), reverse=True)[:10], 1))
    return gain / best


def test_ndcg_agrees_with_its_formula_on_graded_judgements():
    rng = random.Random(1)
    run = {f"q{q}": {f"d{d}": rng.random() for d in range(30)} for q in range(20)}
    qrels = {q: {f"d{d}": rng.randint(0, 3) for d in range(0, 30, 4)} | {"d1": 1} for q in run}
    for query, value in ndcg_at_10(run, qrels).items():
        ranking = sorted(run[query], key=lambda d: -run[query][d])
        assert value == pytest.approx(ndcg_by_hand(ranking, qrels[query]), abs=1e-6)


def test_a_constant_scorer_scores_as_chance_wherever_the_relevant_document_stands():
    chance = sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / 50
    for place in (0, 49):  # the order in which candidates are given must not help
        run = {f"q{q}": {f"d{d:02}": 0.5 for d in range(50)} for q in range(2000)}
        found = ndcg_at_10(run, {q: {f"d{place:02}": 1} for q in run})
        assert sum(found.values()) / len(found) == pytest.approx(chance, abs=0.02)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_retriever(folder / "retriever")
    small_set(folder / "care")
    small_set(folder / "listed")
    listed = "".join(
        json.dumps({"query-id": f"q{i}", "corpus-ids": [f"d{i}", f"d{(i + 1) % 16}"]}) + "\n" for i in range(16)
    )
    (folder / "listed" / "top_ranked.jsonl").write_text(listed)
    args = EvaluateArguments(
        data=[str(folder / "care"), str(folder / "listed")], models={"tiny": str(folder_of("bert"))},
        retriever=str(folder / "retriever"), output_dir=str(folder / "out"), top_k=8, max_queries=10, max_length=64,
    )  # fmt: skip
    return args, evaluate(args)


def test_every_system_is_measured_on_the_same_sampled_queries(results):
    _, found = results
    for entry in found["sets"].values():
        assert set(entry["per_query"]) == {"BM25", "retriever", "tiny", "tiny + first stage"}
        assert len({tuple(values) for values in entry["per_query"].values()}) == 1 and entry["queries"] == 10
    # The subject stands in its own document only: BM25 finds it, and among listed candidates ranks it first.
    assert found["sets"]["care"]["ndcg@10"]["BM25"] > 85 and found["sets"]["listed"]["ndcg@10"]["BM25"] > 85
    # Two candidates: whatever a reranker does, the relevant one is first or second.
    assert set(found["sets"]["listed"]["per_query"]["tiny"].values()) <= {1.0, round(1 / math.log2(3), 4)}
    mean = found["mean"]["tiny"]
    assert mean["interval"][0] <= mean["gain"] <= mean["interval"][1]


def test_results_and_table_are_written_and_a_second_run_reads_the_parts(results, monkeypatch):
    args, found = results
    out = Path(args.output_dir)
    assert json.loads((out / "results.json").read_text()) == found
    assert "| care | 10 |" in (out / "results.md").read_text()
    monkeypatch.setattr("recipes.evaluate.rerank", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr("recipes.evaluate.first_stage", lambda *_: pytest.fail("retrieved again"))
    assert evaluate(args) == found
