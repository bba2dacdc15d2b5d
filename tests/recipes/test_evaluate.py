import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.models import CrossEncoderProtocol, EncoderProtocol, SearchCrossEncoderWrapper, SearchProtocol
from transformers import pipeline

import recipes.evaluate
from recipes.evaluate import FUSED, EvaluateArguments, evaluate, measure, values_per_query
from recipes.lib.judged_sets import BeirFolder, has_candidates, judged_sets, load
from recipes.lib.results import mean_and_interval, table
from recipes.lib.systems import (
    BM25,
    QueritCrossEncoder,
    StrictOrder,
    check_reranker,
    find_weights,
    fuse_runs,
    strict,
    whole_queries,
)
from tests.models_for_tests import folder_of, save_folder, tiny_model, tokenizer_of
from tests.recipes.folders_for_tests import SUBJECTS, small_set, tiny_backbone, tiny_retriever, write_beir

COMMIT = re.compile("[0-9a-f]{40}")


def ndcg_by_hand(ranking, relevance):
    gain = sum(relevance.get(d, 0) / math.log2(rank + 1) for rank, d in enumerate(ranking[:10], 1))
    best = sum(r / math.log2(rank + 1) for rank, r in enumerate(sorted(relevance.values(), reverse=True)[:10], 1))
    return gain / best


def average_precision_by_hand(ranking, relevance):
    relevant = {document for document, score in relevance.items() if score > 0}
    hits = [rank for rank, document in enumerate(ranking, 1) if document in relevant]
    return sum(number / rank for number, rank in enumerate(hits, 1)) / len(relevant)


def list_candidates(folder, listed):
    rows = [json.dumps({"query-id": query, "corpus-ids": ids}) + "\n" for query, ids in listed.items()]
    (folder / "top_ranked.jsonl").write_text("".join(rows))


def graded(number):
    """Qrels of a small set: the subject's own document answers, its neighbour helps."""
    return {f"q{i}": {f"d{i}": 2, f"d{(i + 1) % number}": 1} for i in range(number)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_retriever(folder / "retriever")
    small_set(folder / "care")
    corpus = {f"d{i}": f"A {s} is kept dry and oiled once a year." for i, s in enumerate(SUBJECTS)}
    queries = {f"q{i}": f"how do I look after a {s}" for i, s in enumerate(SUBJECTS)}
    write_beir(folder / "listed", corpus, queries, graded(16))
    list_candidates(folder / "listed", {f"q{i}": [f"d{(i + j) % 16}" for j in range(5)] for i in range(16)})
    return folder


def arguments(folder, output, **changes):
    settings = {
        "data": [str(folder / "care"), str(folder / "listed")], "models": {"tiny": str(folder_of("bert"))},
        "retriever": str(folder / "retriever"), "output_dir": str(output), "top_k": 8, "max_queries": 10,
        "max_length": 64,
    }  # fmt: skip
    return EvaluateArguments(**{**settings, **changes})


@pytest.fixture(scope="module")
def results(folder):
    args = arguments(folder, folder / "out")
    return args, evaluate(args)


def test_every_system_is_measured_on_the_same_sampled_queries(results):
    _, found = results
    for entry in found["sets"].values():
        assert set(entry["per_query"]) == {"BM25", "retriever", "tiny", "tiny + first stage"}
        queries = {tuple(values["default test"]) for values in entry["per_query"].values()}
        assert len(queries) == 1 and entry["queries"] == len(*queries) == 10
        assert entry["metric"] == "ndcg_at_10" and entry["documents"] == 16
    # The subject stands in its own document only: BM25 finds it, and among listed candidates ranks it first.
    assert found["sets"]["care"]["scores"]["BM25"] > 85 and found["sets"]["listed"]["scores"]["BM25"] > 85
    mean = found["mean"]["tiny"]
    assert mean["interval"][0] <= mean["gain"] <= mean["interval"][1]
    assert found["mean"]["retriever"]["gain"] == 0


def test_judgements_of_no_document_of_the_corpus_are_counted_and_those_of_none_refused(tmp_path, capsys):
    folder = small_set(tmp_path / "set")
    path = folder / "qrels" / "test.tsv"
    BeirFolder(folder).load_data()
    assert capsys.readouterr().err == ""
    path.write_text(path.read_text().replace("\td1\t", "\tD1\t").replace("\td2\t", "\tD2\t"))
    BeirFolder(folder).load_data()
    assert re.search(
        r"of 2 of \d+ queries no relevant document is in corpus\.jsonl; they count as 0", capsys.readouterr().err
    )
    path.write_text(path.read_text().replace("\td", "\tD"))
    with pytest.raises(ValueError, match=r"set: no document that qrels calls relevant is in corpus\.jsonl"):
        BeirFolder(folder).load_data()
    with pytest.raises(NotADirectoryError, match=r"corpus\.jsonl is a file. Give a BEIR folder"):
        BeirFolder(folder / "corpus.jsonl")


def test_weights_that_are_a_pointer_and_a_hub_out_of_reach_are_told(tmp_path, monkeypatch):
    folder = shutil.copytree(folder_of("bert"), tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="Git LFS"):
        check_reranker(find_weights(str(folder)))

    def unreachable(*args, **options):
        raise httpx.ConnectError("no network")

    monkeypatch.setattr("recipes.lib.systems.HfApi.model_info", unreachable)
    with pytest.raises(ValueError, match=r"me/model is no folder here, .*no network"):
        find_weights("me/model")


def first_stage_of(args, name):
    (path,) = Path(args.output_dir).glob(f"parts/{name}-*-first-stage/{name}_predictions.json")
    return json.loads(path.read_text())["default"]["test"]


def test_values_agree_with_rankings_and_formula_of_their_own(results, folder):
    """The retriever's from its stored run; the reranker's from the published pipeline over the stored candidates."""
    args, found = results
    ranker = pipeline("text-ranking", model=args.models["tiny"], trust_remote_code=True)
    for name in ("care", "listed"):
        qrels = graded(16) if name == "listed" else {f"q{i}": {f"d{i}": 1} for i in range(16)}
        rows = [json.loads(line) for line in (folder / name / "corpus.jsonl").read_text().splitlines()]
        texts = {row["_id"]: row["text"] for row in rows}
        values = {system: parts["default test"] for system, parts in found["sets"][name]["per_query"].items()}
        for query, scores in first_stage_of(args, name).items():
            ranking = sorted(scores, key=lambda document: -scores[document])
            assert len(ranking) == (5 if name == "listed" else 16)
            assert values["retriever"][query] == pytest.approx(ndcg_by_hand(ranking, qrels[query]), abs=1e-5)
            candidates = ranking[:8]
            asked = f"how do I look after a {SUBJECTS[int(query[1:])]}"
            ranked = ranker(asked, [texts[i] for i in candidates], max_length=64)
            reranking = [candidates[result["index"]] for result in ranked]
            assert values["tiny"][query] == pytest.approx(ndcg_by_hand(reranking, qrels[query]), abs=1e-5)
            fused = {d: 1 / (60 + candidates.index(d) + 1) + 1 / (60 + reranking.index(d) + 1) for d in candidates}
            lot = {d: hashlib.sha256(f"{query}\0{d}".encode()).hexdigest() for d in candidates}  # ties are many
            together = sorted(candidates, key=lambda d: (-fused[d], lot[d]))
            assert values["tiny" + FUSED][query] == pytest.approx(ndcg_by_hand(together, qrels[query]), abs=1e-5)
    scores = found["sets"]["listed"]["scores"]["tiny"]
    assert scores == pytest.approx(100 * np.mean(list(values["tiny"].values())), abs=0.01)


def test_bm25_can_be_the_first_stage_itself(results, folder, tmp_path):
    """Its candidates are reranked, and its column is the same as that of BM25 beside a retriever."""
    _, beside = results
    args = arguments(folder, tmp_path, retriever="bm25")
    found = evaluate(args)
    for name, entry in found["sets"].items():
        assert list(entry["scores"]) == ["retriever", "tiny", "tiny + first stage"]
        assert entry["per_query"]["retriever"] == beside["sets"][name]["per_query"]["BM25"]
    reached = found["sets"]["care"]["per_query"]["tiny"]["default test"]
    for query, scores in first_stage_of(args, "care").items():
        candidates = sorted(scores, key=lambda document: -scores[document])[:8]
        assert (reached[query] > 0) == ("d" + query[1:] in candidates)


def stamps(args):
    return {path: path.stat().st_mtime_ns for path in Path(args.output_dir).rglob("parts/**/*") if path.is_file()}


def test_a_stopped_run_goes_on_and_redoes_only_what_is_not_there(results, monkeypatch):
    args, found = results
    before = stamps(args)
    (gone,) = Path(args.output_dir).glob("parts/care-*.json")
    gone.unlink()
    (Path(args.output_dir) / "parts" / "care-0-first-stage.writing").mkdir()  # of a run that was killed
    assert evaluate(args) == found
    after = stamps(args)
    assert set(after) == set(before) and [path for path in after if after[path] != before[path]] == [gone]
    # With everything there, no data are read and no model is loaded.
    monkeypatch.setattr(recipes.evaluate, "load", lambda *_: pytest.fail("read again"))
    assert evaluate(args) == found
    assert json.loads((Path(args.output_dir) / "results.json").read_text()) == found


def test_other_weights_data_or_settings_are_measured_anew_under_the_same_name(folder, tmp_path):
    model = save_folder(tmp_path / "model", "bert", tiny_model("bert", seed=1))
    data = small_set(tmp_path / "care")
    args = arguments(folder, tmp_path / "out", data=[str(data)], models={"m": str(model)}, fused=False)
    first = evaluate(args)
    assert set(first["mean"]) == {"BM25", "retriever", "m"}
    count = len(stamps(args))
    tiny_model("bert", seed=2).save_pretrained(model)
    second = evaluate(args)
    assert first["weights"]["m"] != second["weights"]["m"] and len(stamps(args)) == count + 1
    assert first["sets"]["care"]["per_query"]["m"] != second["sets"]["care"]["per_query"]["m"]
    (model / "README.md").write_text("A card, made from these very results, changes no score.")
    assert evaluate(args)["weights"] == second["weights"] and len(stamps(args)) == count + 1
    evaluate(arguments(folder, tmp_path / "out", data=[str(data)], models={"m": str(model)}, top_k=4))
    assert len(stamps(args)) == count + 2  # the first stage is the same
    with open(data / "corpus.jsonl", "a") as file:
        file.write(json.dumps({"_id": "d99", "text": "A lighthouse."}) + "\n")
    assert evaluate(args)["sets"]["care"]["documents"] == 17


def one_relevant(folder, queries, candidates, named):
    """Every query has one relevant document, which stands first in its list of candidates."""
    listed = {f"q{q}": [f"{named}{q}", *(f"m{q}-{d}" for d in range(1, candidates))] for q in range(queries)}
    corpus = {d: f"{SUBJECTS[n % 16]} {q}" for q, ids in listed.items() for n, d in enumerate(ids)}
    asked = {query: f"about {query}" for query in listed}
    write_beir(folder, corpus, asked, {query: {ids[0]: 1} for query, ids in listed.items()})
    list_candidates(folder, listed)
    return folder


@pytest.mark.parametrize("named", ["a", "z"])  # the relevant document's id is the first of the candidates', or the last
def test_a_constant_reranker_scores_as_chance(tmp_path, folder, named):
    queries, candidates = 250, 20
    data = one_relevant(tmp_path / "data", queries, candidates, named)
    model = tiny_model("bert")
    with torch.no_grad():
        model.relevance_head.weight.zero_()
    constant = QueritCrossEncoder(str(save_folder(tmp_path / "constant", "bert", model)), max_length=32)
    (task,) = judged_sets([], [str(data)])["data"]
    found, runs = measure(SearchCrossEncoderWrapper(constant), load(task, None, 0))
    values = list(found["per_query"]["default test"].values())
    chance = [1 / math.log2(rank + 1) if rank <= 10 else 0 for rank in range(1, candidates + 1)]
    assert len(values) == queries
    assert np.mean(values) == pytest.approx(np.mean(chance), abs=3 * np.std(chance) / queries**0.5)
    assert found["score"] == pytest.approx(np.mean(values), abs=1e-4)
    # The whole distribution of its place, not only the mean.
    places = [[*run].index(f"{named}{query[1:]}") for query, run in runs["default test"].items()]
    assert np.mean(places) == pytest.approx((candidates - 1) / 2, abs=3 * (candidates**2 / 12 / queries) ** 0.5)


def test_scores_that_only_float32_takes_for_equal_keep_their_order():
    scores = {f"d{i}": 1 - i * 1e-12 for i in range(40)}
    assert list(strict("q", scores)) == list(scores)
    assert list(strict("q", scores).values()) == [float(place) for place in range(40, 0, -1)]
    ties = {f"d{i}": 0.5 for i in range(40)}
    assert strict("q", ties) == strict("q", dict(reversed(ties.items()))) != strict("other", ties)


def test_bm25_ranks_all_candidates_and_favours_no_place_in_the_corpus():
    corpus = Dataset.from_dict({"id": [f"d{i}" for i in range(300)], "text": ["bread and tide"] * 299 + ["a puffin"]})
    system = BM25(tokenizer_of("bert"))
    system.index(corpus)
    queries = Dataset.from_dict({"id": ["q0", "q1"], "text": ["puffin", "violin"]})
    run = system.search(queries, top_k=50)
    assert max(run["q0"], key=lambda document: run["q0"][document]) == "d299"
    # No document has the word: those kept at the cut are drawn from the whole corpus.
    rows = sorted(int(document[1:]) for document in run["q1"])
    assert len(rows) == 50 and 110 < np.mean(rows) < 190
    candidates = {"q0": ["d7", "d299", "d250"], "q1": ["d1"]}
    run = system.search(queries, top_k=2, top_ranked=candidates)
    assert {query: set(scores) for query, scores in run.items()} == {q: set(ids) for q, ids in candidates.items()}


def test_the_reranker_is_a_cross_encoder_to_mteb_and_scores_as_the_pipeline():
    model = QueritCrossEncoder(str(folder_of("qwen3")), max_length=64)
    assert isinstance(model, CrossEncoderProtocol)
    assert not isinstance(model, EncoderProtocol) and not isinstance(model, SearchProtocol)
    ordered = StrictOrder(SearchCrossEncoderWrapper(model))
    assert isinstance(ordered, SearchProtocol) and not isinstance(ordered, EncoderProtocol | CrossEncoderProtocol)
    queries = [f"how do I look after a {subject}" for subject in SUBJECTS[:3] for _ in range(4)]
    documents = [f"A {subject} is kept dry." for subject in SUBJECTS[:12]]
    loaders = [
        torch.utils.data.DataLoader(Dataset.from_dict({"text": texts}), batch_size=5) for texts in (queries, documents)
    ]
    logits = model.predict(*loaders)
    ranker = pipeline("text-ranking", model=str(folder_of("qwen3")), trust_remote_code=True)
    for start in (0, 4, 8):
        for result in ranker(queries[start], documents[start : start + 4], max_length=64):
            assert math.tanh(logits[start + result["index"]] / 2) == pytest.approx(result["score"], abs=1e-4)


def test_pairs_are_put_together_by_whole_queries():
    pairs = [("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"), ("c", "2"), ("c", "3"), ("d", "1")]
    assert list(whole_queries(iter(pairs), 3)) == [
        [("a", ["1", "2"]), ("b", ["1"])], [("c", ["1", "2", "3"])], [("d", ["1"])],
    ]  # fmt: skip


def test_fusion_is_reciprocal_rank_fusion_over_the_rerankers_documents():
    first = {"q": {"d1": 3.0, "d2": 2.0, "d3": 1.0, "d9": 0.5}}
    (fused,) = fuse_runs({"q": {"d3": 0.9, "d1": 0.1, "d2": -0.5}}, first).values()
    assert fused == pytest.approx({"d3": 1 / 61 + 1 / 63, "d1": 1 / 62 + 1 / 61, "d2": 1 / 63 + 1 / 62})


# Tasks of mteb. Their data are on the Hub; what follows needs none of it.

MULTILINGUAL_RERANKING = {
    "WebLINXCandidatesReranking": "mrr_at_10", "AlloprofReranking": "map_at_1000",
    "VoyageMMarcoReranking": "map_at_1000", "WikipediaRerankingMultilingual": "map_at_1000",
    "RuBQReranking": "map_at_1000", "T2Reranking": "map_at_1000",
}  # fmt: skip


def test_names_of_tasks_and_benchmarks_resolve_to_pinned_data():
    sets = judged_sets(["SciFact", "MIRACLRetrieval", "MTEB(Multilingual, v2)"], [])
    assert set(sets) == {"SciFact", "MIRACLRetrieval", *MULTILINGUAL_RERANKING}
    for name, metric in MULTILINGUAL_RERANKING.items():
        assert sets[name][0].metadata.main_score == metric
    ((name, (miracl,)),) = judged_sets(["MIRACL"], []).items()  # two stages: a retrieval task in all 18 languages
    assert name == "MIRACLRetrievalHardNegatives" and miracl.metadata.type == "Retrieval"
    assert miracl.metadata.main_score == "ndcg_at_10" and list(miracl.eval_splits) == ["dev"]
    assert len(miracl.hf_subsets) == 18 and COMMIT.fullmatch(miracl.metadata.revision)
    beir = judged_sets(["BEIR"], [])
    assert len(beir) == 15 and len(beir["CQADupstackRetrieval"]) == 12
    assert list(beir["MSMARCO"][0].eval_splits) == ["dev"]
    assert all(COMMIT.fullmatch(task.metadata.revision) for s in (sets, beir) for tasks in s.values() for task in tasks)
    first_stage = EvaluateArguments.__dataclass_fields__["retriever"].default
    weights = find_weights(str(first_stage))
    assert weights.path == "Qwen/Qwen3-Embedding-0.6B" and COMMIT.fullmatch(weights.revision or "")
    assert find_weights(weights.path, "a" * 40).revision == "a" * 40


class TwoLanguages(AbsTaskRetrieval):
    """A task as mteb has them: two languages, MAP, a corpus to retrieve from, a query that is its own document."""

    ignore_identical_ids = True
    metadata = mteb.get_task("SciFact").metadata.model_copy(
        update={
            "name": "TwoLanguages",
            "eval_langs": {"en": ["eng-Latn"], "de": ["deu-Latn"]},
            "main_score": "map_at_1000",
            "dataset": {"path": "querit/none", "revision": "0" * 40},
        }
    )
    listed = False

    def load_data(self, num_proc=None, **kwargs):
        self.dataset = {}
        for language, words in (("en", "A {} is kept dry."), ("de", "Ein {} bleibt trocken.")):
            texts = {f"d{i}": words.format(s) for i, s in enumerate(SUBJECTS)} | {"q0": "bread"}
            queries = {f"q{i}": s for i, s in enumerate(SUBJECTS[: 6 if language == "en" else 9])}
            data = {
                "corpus": Dataset.from_dict({"id": list(texts), "title": [""] * 17, "text": list(texts.values())}),
                "queries": Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
                "relevant_docs": {q: graded(16)[q] for q in queries},
                "top_ranked": {q: [f"d{i}" for i in range(12)] for q in queries} if self.listed else None,
            }
            self.dataset[language] = {"test": data}
        self.data_loaded = True


class Candidates(TwoLanguages):
    metadata = TwoLanguages.metadata.model_copy(
        update={"name": "Candidates", "type": "Reranking", "main_score": "mrr_at_10"}
    )
    listed = True


@pytest.fixture
def registered(monkeypatch):
    registry = sys.modules["mteb.get_tasks"]._TASKS_REGISTRY
    for task in (TwoLanguages, Candidates):
        monkeypatch.setitem(registry, task.metadata.name, task)


def test_a_named_task_runs_in_two_stages_by_its_own_main_score(registered, folder, tmp_path):
    args = arguments(folder, tmp_path, data=[], tasks=["TwoLanguages", "Candidates"], max_queries=None)
    found = evaluate(args)
    entry = found["sets"]["TwoLanguages"]
    assert entry["metric"] == "map_at_1000" and entry["queries"] == 15 and entry["documents"] == 34
    (path,) = tmp_path.glob("parts/TwoLanguages-*-first-stage/*_predictions.json")
    stored = json.loads(path.read_text())
    for language, queries in (("en", 6), ("de", 9)):
        values = entry["per_query"]["retriever"][f"{language} test"]
        assert len(values) == queries
        for query, scores in stored[language]["test"].items():
            ranking = [d for d in sorted(scores, key=lambda d: -scores[d]) if d != query]
            assert values[query] == pytest.approx(average_precision_by_hand(ranking, graded(16)[query]), abs=1e-5)
        # What is not among the retriever's first 8 is out of the reranker's reach.
        for query, value in entry["per_query"]["tiny"][f"{language} test"].items():
            scores = stored[language]["test"][query]
            reach = set(sorted(scores, key=lambda d: -scores[d])[:8]) & set(graded(16)[query])
            assert value <= len(reach) / 2 + 1e-5 and (value > 0) == bool(reach)
    for system, scores in entry["scores"].items():
        parts = entry["per_query"][system].values()
        assert scores == pytest.approx(100 * np.mean([np.mean(list(part.values())) for part in parts]), abs=0.01)
    # A reranking task brings its own candidates: all 12 of them are ranked, not the retriever's first 8.
    entry = found["sets"]["Candidates"]
    assert entry["metric"] == "mrr_at_10"
    ranker = pipeline("text-ranking", model=args.models["tiny"], trust_remote_code=True)
    documents = [f"A {subject} is kept dry." for subject in SUBJECTS[:12]]
    for query, value in entry["per_query"]["tiny"]["en test"].items():
        ranked = [f"d{result['index']}" for result in ranker(SUBJECTS[int(query[1:])], documents, max_length=64)]
        rank = min(ranked.index(document) + 1 for document in graded(16)[query])
        assert value == pytest.approx(1 / rank if rank <= 10 else 0, abs=1e-5)
    assert "| Candidates | mrr@10 | 15 |" in (tmp_path / "results.md").read_text()


def test_mrr_stops_at_its_cut_and_counts_the_first_relevant_document():
    run = {"q": {f"d{i}": float(-i) for i in range(20)}}
    assert values_per_query("mrr_at_10", run, {"q": {"d3": 1, "d5": 1, "d0": 0}}, run) == {"q": 0.25}
    assert values_per_query("mrr_at_10", run, {"q": {"d10": 1}}, run) == {"q": 0.0}


def test_the_tasks_of_an_aggregate_are_one_set(registered, folder, tmp_path, monkeypatch):
    class Both(mteb.abstasks.aggregated_task.AbsTaskAggregate):
        metadata = mteb.get_task("CQADupstackRetrieval").metadata.model_copy(
            update={"name": "Both", "tasks": [TwoLanguages(), Candidates()]}
        )

    monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, "Both", Both)
    found = evaluate(arguments(folder, tmp_path, data=[], tasks=["Both"], models={}))
    entry = found["sets"]["Both"]
    assert set(entry["per_query"]["BM25"]) == {
        f"{t} {p}" for t in ("TwoLanguages", "Candidates") for p in ("en test", "de test")
    }
    assert entry["scores"]["BM25"] == pytest.approx(
        100 * np.mean([np.mean(list(part.values())) for part in entry["per_query"]["BM25"].values()]), abs=0.01
    )


# The tables.


def synthetic(gains, base=0.5):
    sets = {}
    for name, values in gains.items():
        queries = {f"q{i}": base + value for i, value in enumerate(values)}
        flat = dict.fromkeys(queries, base)
        scores = {"retriever": 100 * base, "model": 100 * (base + float(np.mean(values)))}
        per_query = {"retriever": {"default test": flat}, "model": {"default test": queries}}
        sets[name] = {"metric": "ndcg_at_10", "queries": len(values), "scores": scores, "per_query": per_query}
    return sets


def test_gain_and_interval_agree_with_a_bootstrap_written_out():
    rng = np.random.default_rng(3)
    gains = {"a": rng.normal(0.05, 0.2, 30), "b": rng.normal(0.0, 0.1, 200), "c": np.array([0.1])}
    sets = synthetic(gains)
    mean = mean_and_interval(sets, seed=0)
    assert mean["model"]["gain"] == pytest.approx(100 * np.mean([x.mean() for x in gains.values()]), abs=0.01)
    drawn = [np.mean([rng.choice(x, len(x)).mean() for x in gains.values()]) for _ in range(4000)]
    assert mean["model"]["interval"] == pytest.approx(100 * np.percentile(drawn, [2.5, 97.5]), abs=0.35)
    assert mean == mean_and_interval(sets, seed=0)
    lines = table({"sets": sets, "mean": mean}).splitlines()
    assert lines[0] == "| set | score | queries | retriever | model |"
    assert lines[3].startswith("| b | nDCG@10 | 200 | 50.0 |") and lines[5].startswith("| **mean** | | | **50.0** |")
    assert f"{mean['model']['gain']:+.1f} [" in lines[6]


def test_parts_of_a_set_count_alike_and_so_do_sets():
    sets = synthetic({"one": [0.0, 0.0], "two": [0.3, 0.3]})
    sets["two"]["per_query"] = {
        system: {**parts, "other test": {"q0": 0.5 + (0.1 if system == "model" else 0)}}
        for system, parts in sets["two"]["per_query"].items()
    }
    assert mean_and_interval(sets, seed=0)["model"]["gain"] == 10.0  # (0 + (30 + 10) / 2) / 2


# What a user may get wrong.


def refused(folder, tmp_path, match, error=ValueError, **changes):
    with pytest.raises(error, match=match):
        evaluate(arguments(folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()  # before any work


def test_wrong_sets_are_named(folder, tmp_path):
    refused(folder, tmp_path, "Near it: .*SciFact", data=[], tasks=["SciFacts"])
    refused(folder, tmp_path, "Near it: .*MIRACLRetrieval", data=[], tasks=["MIRACLRetr"])
    refused(folder, tmp_path, "no retrieval or reranking task", data=[], tasks=["Banking77Classification"])
    refused(folder, tmp_path, "p-MRR, which has no value per query", data=[], tasks=["News21InstructionRetrieval"])
    refused(folder, tmp_path, "Nothing to measure on", data=[])
    refused(folder, tmp_path, "Two sets are named care", data=[str(folder / "care"), str(folder / "care")])
    (tmp_path / "empty").mkdir()
    refused(folder, tmp_path, "empty/qrels has", FileNotFoundError, data=[str(tmp_path / "empty")])
    qrels = small_set(tmp_path / "twice") / "qrels"
    (qrels / "dev.tsv").write_text((qrels / "test.tsv").read_text())
    (qrels / "test.tsv").rename(qrels / "train.tsv")
    twice = [str(tmp_path / "twice")]
    refused(folder, tmp_path, "name the split", FileNotFoundError, data=twice)
    refused(folder, tmp_path, "no test.tsv; its splits are dev, train", FileNotFoundError, data=twice, split="test")
    assert list(judged_sets([], twice, "dev")["twice"][0].eval_splits) == ["dev"]


def test_test_is_the_split_that_is_measured_where_none_is_named(tmp_path):
    qrels = small_set(tmp_path / "data") / "qrels"
    for name, document in (("train", "d1"), ("dev", "d2")):
        (qrels / f"{name}.tsv").write_text(f"query-id\tcorpus-id\tscore\nq0\t{document}\t1\n")
    assert BeirFolder(tmp_path / "data").qrels == {f"q{i}": {f"d{i}": 1} for i in range(16)}
    assert list(BeirFolder(tmp_path / "data").eval_splits) == ["test"]
    assert BeirFolder(tmp_path / "data", "dev").qrels == {"q0": {"d2": 1}}


def test_two_commits_of_a_repo_are_measured_each_by_itself(folder, tmp_path, monkeypatch):
    kept = {"a" * 40: folder_of("bert"), "b" * 40: save_folder(tmp_path / "b", "bert", tiny_model("bert", seed=1))}

    def from_the_hub(path, revision, **options):
        assert path == "org/m"
        return QueritCrossEncoder(str(kept[revision]), **options)

    data = [str(folder / "care")]
    models = {f"org/m@{commit}": str(place) for commit, place in kept.items()}
    expected = evaluate(arguments(folder, tmp_path / "places", data=data, models=models, fused=False))
    monkeypatch.setattr(recipes.evaluate, "QueritCrossEncoder", from_the_hub)
    found = evaluate(arguments(folder, tmp_path / "hub", data=data, models={m: m for m in models}, fused=False))
    assert found["sets"]["care"]["per_query"] == expected["sets"]["care"]["per_query"]
    for commit in kept:
        name = f"org/m@{commit}"
        assert found["weights"][name] == {"path": "org/m", "revision": commit, "fingerprint": name}


def test_candidates_that_are_none_are_named(tmp_path):
    data = small_set(tmp_path / "data")
    list_candidates(data, {f"q{i}": ["d1", "d2"] for i in range(15)})
    with pytest.raises(ValueError, match="no candidates for query q15"):
        load(BeirFolder(data), None, 0)
    list_candidates(data, {f"q{i}": ["d1", "elsewhere"] for i in range(16)})
    with pytest.raises(ValueError, match="elsewhere is not in the corpus"):
        load(BeirFolder(data), None, 0)
    list_candidates(data, {f"q{i}": ["d1", "d2"] for i in range(16)})
    task = BeirFolder(data)
    assert has_candidates(load(task, 3, 0)) and not task.data_loaded  # the loaded task is a copy
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    with pytest.raises(ValueError, match=r"no query of .* relevant document"):
        load(BeirFolder(data), None, 0)


def test_wrong_models_are_named_before_the_first_stage(folder, tmp_path):
    backbone = tiny_backbone(tmp_path / "backbone")
    refused(folder, tmp_path, "backbone is no Querit reranker", models={"x": str(backbone)})
    (tmp_path / "nothing").mkdir()
    refused(folder, tmp_path, "nothing holds no model", models={"x": str(tmp_path / "nothing")})
    absent = str(tmp_path / "no-model")
    refused(folder, tmp_path, "no-model does not exist", FileNotFoundError, models={"x": absent})
    absent = str(tmp_path / "no-retriever")
    refused(folder, tmp_path, "no-retriever does not exist", FileNotFoundError, retriever=absent)
    refused(folder, tmp_path, "retriever is bm25, .*models must name one", models={}, retriever="bm25")
    refused(folder, tmp_path, "retriever is the name of a first stage", models={"retriever": str(folder_of("bert"))})


def test_the_command_measures_local_folders_without_a_network(folder, tmp_path):
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('network: ' + repr(a))\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(block), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "querit", "evaluate", str(folder_of("bert")), "--data", str(folder / "listed")]
    command += ["--retriever", str(folder / "retriever"), "--output", str(tmp_path / "out"), "--max-queries", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| listed | nDCG@10 | 4 |" in done.stdout and "| bert | bert + first stage |" in done.stdout
    assert "gain over the first stage" in done.stdout
