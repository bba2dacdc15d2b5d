"""Measure rerankers with mteb, beside BM25 and the retriever whose candidates they rerank.

    python -m recipes.evaluate --config recipes/querit-nano/6_evaluate.yaml

Sets are tasks of mteb by name and BEIR folders on disk; those need no network. The retriever ranks the corpus, each
reranker the retriever's `top_k` of every query; of a reranking task both rank the task's own candidates. A set has its
task's own main score: nDCG@10 for retrieval, most often MAP for reranking tasks. Every set and model is stored under a
name that tells what it depends on, the models' weights included, so a stopped run goes on, and a changed model is
measured anew. Then come `results.json`, with the values of every query, and the table `results.md`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import torch
from datasets import disable_progress_bars
from mteb.abstasks import AbsTaskRetrieval
from mteb.models import SearchCrossEncoderWrapper
from transformers import AutoTokenizer
from trl import TrlParser

from querit.files import appears_whole, write_json, write_text
from recipes.lib import retrieval
from recipes.lib.judged_sets import METRIC, drop_unlisted, has_candidates, judged_sets, load, part_name, parts_of
from recipes.lib.results import BASE, mean_and_interval, table
from recipes.lib.systems import (
    BM25,
    GivenRuns,
    QueritCrossEncoder,
    Runs,
    StrictOrder,
    Weights,
    check_reranker,
    find_weights,
    fuse_runs,
    load_retriever,
)

FUSED = " + first stage"
# mteb's names of a metric -> trec_eval's.
TREC_EVAL = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}


@dataclass
class EvaluateArguments:
    models: dict[str, str] = field(
        metadata={"help": "Name in the table -> folder or Hub repo (or REPO@COMMIT) of a reranker."}
    )
    output_dir: str = field(metadata={"help": "Folder of the result files."})
    data: list[str] = field(default_factory=list, metadata={"help": "BEIR folders with qrels."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks of mteb, MIRACL, or benchmarks: their reranking or retrieval tasks."},
    )
    retriever: str = field(
        default="Qwen/Qwen3-Embedding-0.6B",
        metadata={
            "help": "First stage: sentence-transformers folder, Hub repo (or REPO@COMMIT), or bm25 (the first model's "
            "tokens)."
        },
    )
    revisions: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Model or retriever -> commit, where it names none itself."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of the folders' qrels; the only one, or test, if not given."}
    )
    top_k: int = field(default=100, metadata={"help": "Candidates reranked per query, where the task lists none."})
    max_queries: int | None = field(default=None, metadata={"help": "Judge only a sample of so many queries a set."})
    max_length: int | None = field(default=None, metadata={"help": "Longest pair in tokens; the model's own limit."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the rerankers, as in transformers.pipeline."})
    fused: bool = field(default=True, metadata={"help": "Also report the fusion of reranker and first stage."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample of queries and of the bootstrap."})


def values_per_query(
    metric: str, scores: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]], run: Mapping
) -> dict[str, float]:
    """Query -> value of mteb's `metric`, from trec_eval's `scores` of a run without ties."""
    kind, k = METRIC.fullmatch(metric).groups()  # type: ignore[union-attr]
    if kind != "mrr":  # trec_eval's has no cut
        return {query: values[f"{TREC_EVAL[kind]}_{k}"] for query, values in scores.items()}
    found = {}
    for query in scores:
        best = sorted(run[query], key=lambda document: -run[query][document])[: int(k)]
        ranks = [rank for rank, document in enumerate(best, 1) if qrels[query].get(document, 0) > 0]
        found[query] = 1 / ranks[0] if ranks else 0.0
    return found


def measure(system: Any, task: AbsTaskRetrieval, predictions: Path | None = None) -> tuple[dict, Runs]:
    """mteb's main score of a system, with its values {part: {query: value}}, and the runs. The data must be loaded."""
    per_query: dict[str, dict[str, float]] = {}

    def keep(scores, qrels, results, hf_split, hf_subset):
        per_query[part_name(hf_subset, hf_split)] = values_per_query(task.metadata.main_score, scores, qrels, results)
        return type(task).task_specific_scores(task, scores, qrels, results, hf_split, hf_subset)

    ranked = StrictOrder(system)
    task.task_specific_scores = keep  # type: ignore[method-assign]
    try:
        (result,) = mteb.evaluate(
            ranked,
            task,
            cache=None,
            co2_tracker=False,
            prediction_folder=predictions,
            # Small batches: on a CPU they stay in its cache and run at twice the speed.
            encode_kwargs={"batch_size": 64 if torch.cuda.is_available() else 8, "show_progress_bar": True},
        ).task_results
    finally:
        del task.task_specific_scores
    score = float(result.get_score())
    mean = float(np.mean([np.mean(list(values.values())) for values in per_query.values()]))
    if abs(score - mean) > 1e-3:  # mteb rounds to five digits
        raise RuntimeError(f"{task.metadata.name}: mteb's score is {score}, the mean over queries {mean}.")
    return {"score": score, "per_query": per_query}, ranked.runs


def first_stage(task: AbsTaskRetrieval, encoder: Any, tokenizer: Any, folder: Path, args: EvaluateArguments) -> None:
    """Write a folder with the retriever's run, as mteb stores it, and what BM25 and the retriever score.

    Without an encoder BM25 is the retriever.
    """
    task = load(task, args.max_queries, args.seed)
    parts = parts_of(task).values()
    counts = {"queries": sum(len(p["queries"]) for p in parts), "documents": sum(len(p["corpus"]) for p in parts)}
    systems = {"BM25": measure(BM25(tokenizer), task)[0]} if encoder else {}
    drop_unlisted(task)
    with appears_whole(folder) as whole:
        whole.mkdir()
        systems[BASE] = measure(encoder or BM25(tokenizer), task, whole)[0]
        write_json(whole / "measured.json", {**counts, "systems": systems})


def rerank(
    task: AbsTaskRetrieval, ranker: QueritCrossEncoder, folder: Path, args: EvaluateArguments
) -> dict[str, dict]:
    """What a reranker scores on the first stage stored in `folder`, and its fusion with it."""
    task = load(task, args.max_queries, args.seed)
    stored = json.loads((folder / task.prediction_file_name).read_text(encoding="utf-8"))
    if not has_candidates(task):
        task.convert_to_reranking(folder, top_k=args.top_k)
    drop_unlisted(task)
    alone, runs = measure(SearchCrossEncoderWrapper(ranker), task)
    first = {part_name(a, b): stored[a][b] for a, splits in task.dataset.items() for b in splits}
    fused = GivenRuns({part: fuse_runs(run, first[part]) for part, run in runs.items()}, "querit/fused")
    return {"": alone, FUSED: measure(fused, task)[0]}


def stored_name(task: AbsTaskRetrieval, args: EvaluateArguments, *depends_on: Any) -> str:
    sample = (args.max_queries, args.seed) if args.max_queries else None
    key = [task.metadata.revision, list(task.eval_splits), list(task.hf_subsets), sample, *depends_on]
    return f"{task.metadata.name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"


def first_stages(tasks: list[AbsTaskRetrieval], retriever: Weights, args: EvaluateArguments) -> dict[str, Path]:
    """Task -> the folder that `first_stage` wrote, now or in an earlier run."""
    folders = {}
    encoder = tokenizer = None
    dense = args.retriever != retrieval.BM25
    for task in tasks:
        name = f"{stored_name(task, args, retriever.fingerprint)}-first-stage"
        folder = folders[task.metadata.name] = Path(args.output_dir) / "parts" / name
        if not folder.exists():
            encoder = encoder or (load_retriever(retriever) if dense else None)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(
                retriever.path, revision=retriever.revision or "main"
            )
            first_stage(task, encoder, tokenizer, folder, args)
    return folders


def reranked(
    tasks: list[AbsTaskRetrieval],
    weights: Weights,
    retriever: Weights,
    folders: dict[str, Path],
    args: EvaluateArguments,
) -> dict[str, dict[str, dict]]:
    """Task -> what `rerank` found, now or in an earlier run. The model is loaded once, if at all."""
    found = {}
    ranker = None
    for task in tasks:
        name = task.metadata.name
        settings = (args.top_k, args.max_length, args.dtype)
        key = stored_name(task, args, retriever.fingerprint, weights.fingerprint, settings)
        part = Path(args.output_dir) / "parts" / f"{key}.json"
        if not part.exists():
            ranker = ranker or QueritCrossEncoder(
                weights.path, weights.revision, max_length=args.max_length, dtype=args.dtype
            )
            write_json(part, rerank(task, ranker, folders[name], args))
        found[name] = json.loads(part.read_text(encoding="utf-8"))
        points = [f"{100 * measured['score']:.1f}{kind}" for kind, measured in found[name].items()]
        print(f"{name}: {weights.path} has {' and '.join(points)}", flush=True)
    return found


def of_set(tasks: list[str], measured: dict[str, dict]) -> dict:
    """What a system scores on the tasks of a set -> on the set: the mean over its tasks, times 100."""
    per_query = {
        f"{task} {part}" if len(tasks) > 1 else part: {query: round(value, 5) for query, value in values.items()}
        for task in tasks
        for part, values in measured[task]["per_query"].items()
    }
    return {
        "score": round(100 * float(np.mean([measured[task]["score"] for task in tasks])), 2),
        "per_query": per_query,
    }


def evaluate(args: EvaluateArguments) -> dict:
    """-> what `results.json` holds. Raises ValueError or OSError for sets and models that are none."""
    if taken := {"BM25", BASE} & set(args.models):
        raise ValueError(f"{taken.pop()} is the name of a first stage; call the model something else.")
    disable_progress_bars()  # those of datasets
    sets = judged_sets(args.tasks, args.data, args.split)
    models = {name: find_weights(path, args.revisions.get(path)) for name, path in args.models.items()}
    if args.retriever == retrieval.BM25:
        if not models:
            raise ValueError("retriever is bm25, which counts the first model's tokens: models must name one.")
        tokens = next(iter(models.values()))
        retriever = Weights(tokens.path, tokens.revision, f"{retrieval.BM25} {tokens.fingerprint}")
    else:
        retriever = find_weights(args.retriever, args.revisions.get(args.retriever))
    for weights in models.values():
        check_reranker(weights)
    tasks = [task for members in sets.values() for task in members]

    folders = first_stages(tasks, retriever, args)
    stored = {name: json.loads((folder / "measured.json").read_text("utf-8")) for name, folder in folders.items()}
    first = list(next(iter(stored.values()))["systems"])  # BM25 and the retriever, or BM25 as the retriever
    systems = {system: {task: found["systems"][system] for task, found in stored.items()} for system in first}
    for model, weights in models.items():
        found = reranked(tasks, weights, retriever, folders, args)
        for kind in ("", FUSED) if args.fused else ("",):
            systems[model + kind] = {task: kinds[kind] for task, kinds in found.items()}

    results: dict[str, Any] = {
        "settings": asdict(args),
        "weights": {name: asdict(weights) for name, weights in {BASE: retriever, **models}.items()},
        "mteb": version("mteb"),
        "sets": {},
    }
    for name, members in sets.items():
        names = [task.metadata.name for task in members]
        found = {system: of_set(names, measured) for system, measured in systems.items()}
        results["sets"][name] = {
            "metric": members[0].metadata.main_score,
            "revisions": {task.metadata.name: task.metadata.revision for task in members},
            "queries": sum(stored[task]["queries"] for task in names),
            "documents": sum(stored[task]["documents"] for task in names),
            "scores": {system: values["score"] for system, values in found.items()},
            "per_query": {system: values["per_query"] for system, values in found.items()},
        }
    results["mean"] = mean_and_interval(results["sets"], args.seed)
    out = Path(args.output_dir)
    write_json(out / "results.json", results)
    write_text(out / "results.md", table(results))
    return results


if __name__ == "__main__":
    (arguments,) = TrlParser(EvaluateArguments).parse_args_and_config()  # type: ignore[arg-type]
    evaluate(arguments)
