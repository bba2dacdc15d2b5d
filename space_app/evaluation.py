"""nDCG@10 of a small judged set before reranking and after: BM25, then the model on what BM25 found."""

import json
import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval

from querit.bm25 import BM25
from space_app.inputs import JudgedSet
from space_app.limits import Limits, RefusedError
from space_app.models import Models
from space_app.ranking import Request, Steps, check_reading, part, rank_requests

METRIC = "ndcg_cut_10"
QUERIES_AT_ONCE = 8  # encoded together, so that batches are full


@dataclass(frozen=True)
class QueryOutcome:
    query: str
    before: float
    after: float


@dataclass(frozen=True)
class Evaluation:
    model: str
    before: float
    after: float
    outcomes: list[QueryOutcome]  # largest gain first
    queries: int  # of the whole set
    documents: int
    candidates: int  # reranked per query, at most
    found: float  # share of the queries whose candidates hold a relevant document


@cache
def examples() -> list[dict]:
    return json.loads((Path(__file__).parent / "examples.json").read_text(encoding="utf-8"))


def set_of_examples() -> JudgedSet:
    """The page's own examples, each query with its own documents."""
    judged = JudgedSet({}, {}, {}, {})
    for number, example in enumerate(examples()):
        query = str(number)
        ids = [f"{number}-{place}" for place in range(len(example["documents"]))]
        judged.queries[query] = example["query"]
        judged.corpus.update(zip(ids, example["documents"], strict=True))
        judged.qrels[query] = {ids[example["answer"]]: 1}
        judged.candidates[query] = ids
    return judged


def candidates_of(tokenizer: Any, judged: JudgedSet, queries: list[str], top_k: int) -> dict[str, list[str]]:
    """Query -> ids in the order of BM25: the best of the corpus, or the query's own candidates.

    Equal scores are drawn by lot: the order of a file often tells which documents are relevant.
    """
    ids = list(judged.corpus)
    bm25 = BM25(tokenizer, list(judged.corpus.values()))
    lot = np.random.default_rng(0).permutation(len(ids))
    rows = {document: row for row, document in enumerate(ids)}
    found = {}
    for query in queries:
        scores = bm25.scores(judged.queries[query])
        own = judged.candidates.get(query)
        chosen = np.array([rows[document] for document in own]) if own else np.arange(len(ids))
        order = chosen[np.lexsort((lot[chosen], -scores[chosen]))][:top_k]
        found[query] = [ids[row] for row in order]
    return found


def ndcg(orders: dict[str, list[str]], qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """Query -> nDCG@10 by trec_eval, the documents scored by their place alone."""
    run = {
        query: {document: float(len(order) - place) for place, document in enumerate(order)}
        for query, order in orders.items()
    }
    found = pytrec_eval.RelevanceEvaluator(qrels, {METRIC}).evaluate(run)
    return {query: values[METRIC] for query, values in found.items()}


def evaluate(
    models: Models, limits: Limits, judged: JudgedSet, model: object = None, long_documents: object = "truncate"
) -> Steps[Evaluation]:
    name, deadline = models.name(model), time.monotonic() + limits.evaluation_seconds
    reading = check_reading(long_documents)
    queries = sorted(judged.queries)
    if len(queries) > limits.judged_queries:
        queries = sorted(random.Random(0).sample(queries, limits.judged_queries))
    if long := [query for query in queries if len(judged.queries[query]) > limits.query]:
        raise RefusedError(f"{len(long)} queries have more than {limits.query:,} characters each.")
    with models.turn:
        before = candidates_of(models.ranker(name).tokenizer, judged, queries, limits.candidates)
    yield 0.0
    after: dict[str, list[str]] = {}
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        together = queries[start : start + QUERIES_AT_ONCE]
        requests = [
            Request(judged.queries[q], [judged.corpus[d] for d in before[q]], None, reading, name) for q in together
        ]
        steps = rank_requests(models, requests, deadline)
        rankings = yield from part(steps, start / len(queries), len(together) / len(queries))
        for query, ranking in zip(together, rankings, strict=True):
            after[query] = [before[query][row["index"]] for row in ranking]
    qrels = {query: judged.qrels[query] for query in queries}
    old, new = ndcg(before, qrels), ndcg(after, qrels)
    outcomes = [QueryOutcome(judged.queries[query], old[query], new[query]) for query in queries]
    return Evaluation(
        model=name,
        before=float(np.mean(list(old.values()))),
        after=float(np.mean(list(new.values()))),
        outcomes=sorted(outcomes, key=lambda outcome: outcome.before - outcome.after),
        queries=len(judged.queries),
        documents=len(judged.corpus),
        candidates=max(map(len, before.values())),
        found=float(np.mean([any(qrels[q].get(d, 0) > 0 for d in before[q]) for q in queries])),
    )
