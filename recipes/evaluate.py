"""Measure rerankers on judged BEIR folders: nDCG@10 beside BM25 and the retriever whose candidates they rerank.

    python -m recipes.evaluate --config recipes/querit-nano/6_evaluate.yaml

Writes one JSON file per data set and model, so a stopped run goes on, then `results.json` and the table `results.md`.
"""

import hashlib
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytrec_eval
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers import pipeline
from trl import TrlParser

from modeling_querit.pipeline_querit import fuse
from modeling_querit.scoring_querit import fastest_cpu_dtype
from recipes.data import read_corpus, read_qrels, read_queries, read_top_ranked

METRIC = "ndcg_cut_10"
FIRST_STAGES = ("BM25", "retriever")


@dataclass
class EvaluateArguments:
    data: list[str] = field(metadata={"help": "BEIR folders with qrels."})
    models: dict[str, str] = field(metadata={"help": "Name in the table -> folder or Hub id of a reranker."})
    retriever: str = field(metadata={"help": "sentence-transformers folder or Hub id of the first stage."})
    output_dir: str = field(metadata={"help": "Folder of the result files."})
    revisions: dict[str, str] = field(default_factory=dict, metadata={"help": "Model or retriever -> commit."})
    split: str | None = field(default=None, metadata={"help": "Split of the qrels; the only one if not given."})
    top_k: int = field(default=100, metadata={"help": "Candidates reranked per query."})
    max_queries: int | None = field(default=None, metadata={"help": "Judge only a sample of this many queries a set."})
    max_length: int = field(default=512, metadata={"help": "Longest pair in tokens."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the rerankers, as in transformers.pipeline."})
    fused: bool = field(default=True, metadata={"help": "Also report the fusion of reranker and first stage."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample of queries and of the bootstrap."})


Run = dict[str, dict[str, float]]  # query id -> document id -> score


def write_json(path: Path, value) -> None:
    """Write aside, then rename: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    aside.rename(path)


def ndcg_at_10(run: Run, qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """nDCG@10 per query (pytrec_eval). Equal scores stand in an order that depends on ids alone."""

    def shuffled(query: str, scores: dict[str, float]) -> dict[str, float]:
        def key(document: str) -> tuple[float, str]:
            return -scores[document], hashlib.sha256(f"{query}\0{document}".encode()).hexdigest()

        order = sorted(scores, key=key)
        return {document: float(len(order) - rank) for rank, document in enumerate(order)}

    strict = {query: shuffled(query, scores) for query, scores in run.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {METRIC})
    found = evaluator.evaluate(strict)
    return {query: found.get(query, {METRIC: 0.0})[METRIC] for query in run}


def first_stage(folder: str, queries: dict[str, str], args: EvaluateArguments) -> dict[str, Run]:
    """The runs of BM25 and the retriever over the corpus, or over the candidates that the folder lists."""
    corpus, listed = read_corpus(folder), read_top_ranked(folder)
    ids, texts = list(corpus), list(corpus.values())
    dtype = fastest_cpu_dtype() if not torch.cuda.is_available() else torch.bfloat16
    retriever = SentenceTransformer(
        args.retriever, revision=args.revisions.get(args.retriever), model_kwargs={"dtype": dtype}
    )
    # Small batches: on a CPU they stay in its cache and run at twice the speed.
    documents = retriever.encode_document(texts, batch_size=8, show_progress_bar=True, convert_to_tensor=True).float()
    asked = retriever.encode_query(list(queries.values()), convert_to_tensor=True).float()
    dense = (asked @ documents.T).cpu().numpy()
    # BM25 over the retriever's word pieces: words by themselves do not exist in Chinese and Japanese text.
    pieces = retriever.tokenizer
    index = bm25s.BM25()
    index.index([pieces.tokenize(text.lower()) for text in texts], show_progress=False)
    runs: dict[str, Run] = {name: {} for name in FIRST_STAGES}
    for row, (query, text) in enumerate(tqdm(queries.items(), desc=f"{Path(folder).name}: first stage")):
        sparse = index.get_scores(pieces.tokenize(text.lower()))
        allowed = np.array([ids.index(i) for i in listed[query]]) if listed else np.arange(len(ids))
        for name, scores in (("BM25", sparse), ("retriever", dense[row])):
            best = allowed[np.argsort(-scores[allowed], kind="stable")[: args.top_k]]
            runs[name][query] = {ids[i]: float(scores[i]) for i in best}
    return runs


def rerank(ranker, corpus: dict[str, str], queries: dict[str, str], candidates: Run, max_length: int) -> dict[str, Run]:
    """The run of a reranker over the candidates, and its fusion with them."""
    alone: Run = {}
    fused: Run = {}
    for query in tqdm(candidates, desc="rerank"):
        ids = list(candidates[query])
        texts = [corpus[i] for i in ids]
        results = ranker(queries[query], texts, max_length=max_length, return_documents=False)
        alone[query] = {ids[result["index"]]: result["score"] for result in results}
        together = fuse(results, list(candidates[query].values()))
        fused[query] = {ids[result["index"]]: result["fused_score"] for result in together}
    return {"": alone, " + first stage": fused}


def evaluate(args: EvaluateArguments) -> dict:
    out = Path(args.output_dir)
    results: dict = {"settings": asdict(args), "sets": {}}
    rankers: dict[str, Any] = {}
    for folder in args.data:
        name = Path(folder).name
        qrels = {query: docs for query, docs in read_qrels(folder, args.split).items() if max(docs.values()) > 0}
        all_queries = read_queries(folder)
        chosen = sorted(set(qrels) & set(all_queries))
        if args.max_queries and len(chosen) > args.max_queries:
            chosen = sorted(random.Random(args.seed).sample(chosen, args.max_queries))
        queries = {query: all_queries[query] for query in chosen}
        # What a stored part depends on; another choice of queries is another file.
        key = hashlib.sha256(json.dumps([chosen, args.top_k, args.retriever]).encode()).hexdigest()[:8]
        stored = out / "parts" / f"{name}-{key}-first-stage.json"
        if not stored.exists():
            write_json(stored, first_stage(folder, queries, args))
        runs = json.loads(stored.read_text(encoding="utf-8"))
        scores = {system: ndcg_at_10(run, qrels) for system, run in runs.items()}
        corpus = read_corpus(folder)
        for model, path in args.models.items():
            part = out / "parts" / f"{name}-{key}-{model}-{args.max_length}.json"
            if not part.exists():
                if model not in rankers:
                    rankers[model] = pipeline(  # type: ignore[call-overload]
                        "text-ranking",
                        model=path,
                        revision=args.revisions.get(path),
                        dtype=args.dtype,
                        trust_remote_code=True,
                    )
                reranked = rerank(rankers[model], corpus, queries, runs["retriever"], args.max_length)
                write_json(part, {kind: ndcg_at_10(run, qrels) for kind, run in reranked.items()})
            for kind, values in json.loads(part.read_text(encoding="utf-8")).items():
                if args.fused or not kind:
                    scores[model + kind] = values
        results["sets"][name] = {
            "queries": len(chosen),
            "documents": len(corpus),
            "ndcg@10": {system: round(100 * float(np.mean(list(v.values()))), 2) for system, v in scores.items()},
            "per_query": {system: {q: round(x, 4) for q, x in v.items()} for system, v in scores.items()},
        }
        print(name, results["sets"][name]["ndcg@10"], flush=True)
    results["mean"] = mean_and_interval(results["sets"], args.seed)
    write_json(out / "results.json", results)
    (out / "results.md").write_text(table(results), encoding="utf-8")
    return results


def mean_and_interval(sets: dict, seed: int, samples: int = 2000) -> dict[str, dict]:
    """Per system the mean over sets, and over the retriever its gain with a 95% paired bootstrap interval.

    Queries are drawn anew within each set (Sakai 2006), sets are not.
    """
    rng = np.random.default_rng(seed)
    systems = list(next(iter(sets.values()))["per_query"])
    base = {name: np.array(list(s["per_query"]["retriever"].values())) for name, s in sets.items()}
    summary = {}
    for system in systems:
        gains = {name: np.array(list(s["per_query"][system].values())) - base[name] for name, s in sets.items()}
        drawn = np.mean(
            [[x[rng.integers(len(x), size=len(x))].mean() for x in gains.values()] for _ in range(samples)], axis=1
        )
        summary[system] = {
            "ndcg@10": round(
                100 * float(np.mean([np.mean(list(s["per_query"][system].values())) for s in sets.values()])), 2
            ),
            "gain": round(100 * float(np.mean([x.mean() for x in gains.values()])), 2),
            "interval": [round(100 * float(x), 2) for x in np.percentile(drawn, [2.5, 97.5])],
        }
    return summary


def table(results: dict) -> str:
    systems = list(results["mean"])
    lines = [
        "| set | queries | " + " | ".join(systems) + " |",
        "|---" * (len(systems) + 2) + "|",
    ]
    for name, entry in results["sets"].items():
        values = " | ".join(f"{entry['ndcg@10'][system]:.1f}" for system in systems)
        lines.append(f"| {name} | {entry['queries']} | {values} |")
    lines.append("| **mean** | | " + " | ".join(f"**{results['mean'][s]['ndcg@10']:.1f}**" for s in systems) + " |")
    gains = []
    for system in systems:
        mean = results["mean"][system]
        gains.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(mean["gain"], *mean["interval"]))
    lines.append("| gain over retriever (95%) | | " + " | ".join(gains) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (arguments,) = TrlParser(EvaluateArguments).parse_args_and_config()  # type: ignore[arg-type]
    evaluate(arguments)
