"""What the page computes: rankings, explanations, comparisons. No gradio here.

Everything that takes long is a generator that yields the share done, in [0, 1], and returns the result: whoever runs
it may stop between two batches, and the worker is free.
"""

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from uniseg.sentencebreak import sentences

from modeling_querit.pipeline_querit import LONG_DOCUMENTS
from modeling_querit.prompting_querit import EncodedPair
from modeling_querit.scoring_querit import NonFiniteScoreError, score_pairs
from querit import bm25
from space_app.limits import Limits, RefusedError, check_documents, check_instruction, check_query
from space_app.models import Models

BM25 = "BM25"
STEP_TOKENS = 4096  # scored between two points at which a request can be stopped: under a second with Nano
SHORT_SENTENCE = 6  # letters and digits; shorter ones ("z.", "B.", "1.") are joined with the next
SURELY_SENTENCES = 1_000  # characters

T = TypeVar("T")
Steps = Generator[float, None, T]


@dataclass(frozen=True)
class Request:
    query: str
    documents: list[str]
    instruction: str | None
    long_documents: str
    model: str


@dataclass(frozen=True)
class Result:
    index: int  # place among the documents given, from 0
    place: int  # from 1
    before: int  # place in the order of BM25, from 1
    score: float  # [-1, 1]
    probability: float
    truncated: bool
    passage: tuple[int, int] | None  # characters of the passage that counted, of a document read in several
    explainable: bool  # it has several sentences, or not all of it was read


@dataclass(frozen=True)
class Ranking:
    request: Request
    results: list[Result]  # best first
    first_stage: list[int]  # indices in the order of BM25
    seconds: float


@dataclass(frozen=True)
class Explanation:
    index: int
    start: int  # characters [start, end) of the document were read, or were the passage that counted
    end: int
    windows: int  # passages that the document was read in
    sentences: list[tuple[str, float]]  # in the document's order, with their own probabilities
    best: int
    left_out: int  # sentences beyond the limit


@dataclass(frozen=True)
class Cell:
    index: int
    probability: float | None
    change: int  # places gained against the left side


@dataclass(frozen=True)
class Comparison:
    request: Request
    left: str
    right: str
    rows: list[tuple[Cell, Cell]]  # by place
    agreement: float  # share of pairs of documents that both put in the same order


def make_request(
    models: Models,
    limits: Limits,
    query: object,
    documents: object,
    instruction: object = None,
    long_documents: object = "truncate",
    model: object = None,
) -> Request:
    """What a visitor sent, checked. Raises RefusedError."""
    reading = check_reading(long_documents)
    name, asked = models.name(model), check_instruction(instruction, limits)
    checked = check_query(query, limits), check_documents(documents, limits)
    if asked and not models.takes_instruction(name):
        raise RefusedError(f"{name} was trained without instructions: leave the instruction empty.")
    return Request(*checked, asked, reading, name)


def check_reading(long_documents: object) -> str:
    if long_documents not in LONG_DOCUMENTS:
        raise RefusedError(f"long_documents must be one of {', '.join(LONG_DOCUMENTS)}.")
    return str(long_documents)


def score_in_steps(models: Models, ranker: Any, pairs: list[EncodedPair], deadline: float) -> Steps[torch.Tensor]:
    """As `score_pairs`, in steps. Raises RefusedError when the deadline (of `time.monotonic`) is over."""
    # Equal pairs are scored once, in one batch: rounding must not part them.
    unique = list(dict.fromkeys(pair._replace(truncated=False, span=None) for pair in pairs))
    unique.sort(key=lambda pair: -pair.num_tokens)
    total, done = sum(pair.num_tokens for pair in unique), 0
    logits: dict[EncodedPair, torch.Tensor] = {}
    while len(logits) < len(unique):
        if time.monotonic() > deadline:
            raise RefusedError(
                f"This took too long and was stopped when {done / total:.0%} was read. Give fewer or shorter documents."
            )
        size = max(1, STEP_TOKENS // unique[len(logits)].num_tokens)
        step = unique[len(logits) : len(logits) + size]
        with models.turn:
            try:
                values = score_pairs(ranker.model, step, ranker.tokenizer.pad_token_id)
            except NonFiniteScoreError:
                raise RefusedError("This model gave no finite score for one of these documents.") from None
        logits.update(zip(step, values, strict=True))
        done += sum(pair.num_tokens for pair in step)
        yield done / total
    if not pairs:
        return torch.empty(0)
    return torch.stack([logits[pair._replace(truncated=False, span=None)] for pair in pairs])


def rank_requests(models: Models, requests: list[Request], deadline: float) -> Steps[list[list[dict]]]:
    """What the pipeline returns for these requests, which agree in all but query and documents.

    Its own three stages are called one by one, so that the middle one can be stopped. `read` is added to each result:
    the characters [start, end) that were scored, and `windows`, how many passages the document was read in.
    """
    first = requests[0]
    ranker = models.ranker(first.model)
    asked: list[tuple[str, list]] = [(request.query, request.documents) for request in requests]
    with models.turn:
        try:
            encoded = ranker.preprocess(asked, first.instruction, long_documents=first.long_documents)
        except ValueError as error:
            raise RefusedError(str(error)) from None
    pairs = [pair for query in encoded for windows in query for pair in windows]
    logits = yield from score_in_steps(models, ranker, pairs, deadline)
    rankings = ranker.postprocess((asked, encoded, logits), return_documents=False)
    for ranking, query in zip(rankings, encoded, strict=True):
        for result in ranking:
            windows = query[result["index"]]
            result["windows"] = len(windows)
            result["read"] = result.get("passage") or windows[0].span
    return rankings


def rank(models: Models, limits: Limits, request: Request) -> Steps[Ranking]:
    start = time.perf_counter()
    ranker = models.ranker(request.model)
    with models.turn:
        first_stage = bm25.best_first(bm25.BM25(ranker.tokenizer, request.documents).scores(request.query))
    before = {index: place for place, index in enumerate(first_stage, 1)}
    (found,) = yield from rank_requests(models, [request], time.monotonic() + limits.seconds)
    results = [
        Result(
            index=row["index"],
            place=place,
            before=before[row["index"]],
            score=row["score"],
            probability=row["probability"],
            truncated=row["truncated"],
            passage=row.get("passage"),
            explainable=bool(row["truncated"] or row.get("passage")) or has_sentences(request.documents[row["index"]]),
        )
        for place, row in enumerate(found, 1)
    ]
    return Ranking(request, results, first_stage, time.perf_counter() - start)


def split_sentences(text: str) -> list[str]:
    """By the rules of Unicode (UAX 29), whose pieces at abbreviations and numbers are joined again."""
    pieces: list[str] = []
    short = ""
    for sentence in sentences(text):
        short += sentence
        if sum(map(str.isalnum, short)) >= SHORT_SENTENCE:
            pieces.append(short)
            short = ""
    if short.strip():
        pieces.append(short)
    return [piece.strip() for piece in pieces]


def has_sentences(document: str) -> bool:
    """Whether there are several. A long text is taken to have them: to split all of it would take too long."""
    return len(document) > SURELY_SENTENCES or len(split_sentences(document)) > 1


def explain(models: Models, limits: Limits, request: Request, index: int) -> Steps[Explanation]:
    """Why a document stands where it does: what was read of it, and what its sentences score by themselves."""
    if not 0 <= index < len(request.documents):
        raise RefusedError(f"There is no document {index}.")
    deadline = time.monotonic() + limits.seconds
    document = request.documents[index]
    alone = Request(request.query, [document], request.instruction, request.long_documents, request.model)
    ((row,),) = yield from part(rank_requests(models, [alone], deadline), 0, 0.5)
    start, end = row["read"]
    found = split_sentences(document[start:end]) or [document[start:end]]
    kept = found[: limits.sentences]
    parts = Request(request.query, kept, request.instruction, "truncate", request.model)
    (scored,) = yield from part(rank_requests(models, [parts], deadline), 0.5, 0.5)
    probability = {part["index"]: part["probability"] for part in scored}
    return Explanation(
        index=index,
        start=start,
        end=end,
        windows=row["windows"],
        sentences=[(sentence, probability[place]) for place, sentence in enumerate(kept)],
        best=scored[0]["index"],
        left_out=len(found) - len(kept),
    )


def part(steps: Steps[T], done: float, size: float) -> Steps[T]:
    """The same steps as a part, of this size, of a longer way of which `done` lies behind."""
    while True:
        try:
            share = next(steps)
        except StopIteration as end:
            return end.value
        yield done + share * size


def compare(models: Models, limits: Limits, request: Request, left: object, right: object) -> Steps[Comparison]:
    """Two models, or BM25 and one, on the same documents."""
    deadline = time.monotonic() + limits.seconds
    orders: list[list[tuple[int, float | None]]] = []
    names = [name if name == BM25 else models.name(name) for name in (left, right)]
    pieces = next((name for name in names if name != BM25), models.names[0])  # BM25 takes the other one's
    for done, name in zip((0.0, 0.5), names, strict=True):
        model = pieces if name == BM25 else name
        if name == BM25:
            with models.turn:
                words = bm25.BM25(models.ranker(model).tokenizer, request.documents)
                orders.append([(index, None) for index in bm25.best_first(words.scores(request.query))])
        else:
            instruction = request.instruction if models.takes_instruction(name) else None
            asked = replace(request, instruction=instruction, model=name)
            (found,) = yield from part(rank_requests(models, [asked], deadline), done, 0.5)
            orders.append([(row["index"], row["probability"]) for row in found])
    return beside(request, names[0], names[1], *orders)


def first_stage_beside(ranking: Ranking) -> Comparison:
    """The comparison that a ranking brings with it."""
    reranked = [(result.index, result.probability) for result in ranking.results]
    left: list[tuple[int, float | None]] = [(index, None) for index in ranking.first_stage]
    return beside(ranking.request, BM25, ranking.request.model, left, [*reranked])


def beside(
    request: Request,
    left: str,
    right: str,
    left_order: list[tuple[int, float | None]],
    right_order: list[tuple[int, float | None]],
) -> Comparison:
    place = {index: number for number, (index, _) in enumerate(left_order)}
    rows = [
        (Cell(*one, 0), Cell(*other, place[other[0]] - number))
        for number, (one, other) in enumerate(zip(left_order, right_order, strict=True))
    ]
    places = [place[index] for index, _ in right_order]
    pairs = [early < late for number, early in enumerate(places) for late in places[number + 1 :]]
    return Comparison(request, left, right, rows, sum(pairs) / len(pairs) if pairs else 1.0)
