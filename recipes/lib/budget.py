"""How much of an adaptation fits into so many minutes here: measured first, then the largest size that fits."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

# Seconds that models are taken to need to load, and steps to begin, whatever there is to do.
START = 40
SPARE = 0.8  # share of the budget that is planned
TRAINING_COST = 4  # a pair forward and backward, in pairs only scored; measured on Nano
QUERY_TOKENS = 20  # a query and the tokens that frame a pair
KEPT = 0.5  # share of written queries that the filters leave, about
FEWEST = 40  # training queries under which an adaptation is not tried
FEWEST_JUDGED = 20  # with fewer, a bootstrap interval is too narrow: models that are no better would pass as better
REPEATS = 5  # of what is timed: the best one counts, whatever else the machine did meanwhile


@dataclass(frozen=True)
class Size:
    max_length: int  # of a pair, in tokens
    top_k: int  # candidates that the teacher scores, and that are reranked where it is judged
    candidates: int  # passages of a training group, the positive among them
    judged: int  # queries that judge
    least: int  # training queries from which on this size is worth more than a smaller one


SIZES = (
    Size(512, 50, 7, 100, 400),
    Size(256, 30, 6, 60, 200),
    Size(256, 20, 5, 40, 100),
    Size(128, 12, 4, 30, 60),
    Size(96, 10, 4, 24, FEWEST),
)


@dataclass(frozen=True)
class Pace:
    """Seconds, measured here; 0 for what is not used."""

    model: float  # a token read by the model that is adapted
    teacher: float  # a token of a pair read by the teachers; 0 for those that have each text's vector
    encoder: float  # a token encoded by a bi-encoder
    generator: float  # a document shown to a generator


@dataclass(frozen=True)
class Corpus:
    lengths: tuple[int, ...]  # tokens of the documents in a sample
    documents: int
    queries_per_document: int

    def pair_tokens(self, max_length: int) -> float:
        cut = [min(length + QUERY_TOKENS, max_length) for length in self.lengths]
        return sum(cut) / len(cut)

    @property
    def tokens(self) -> float:
        return self.documents * sum(self.lengths) / len(self.lengths)


def best_time(work: Callable[[], Any]) -> float:
    """Seconds of the fastest run: the first is slower, and others may disturb one."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def seconds_of(size: Size, queries: int, pace: Pace, corpus: Corpus) -> dict[str, float]:
    """Step -> planned seconds, START shared out among them."""
    tokens = corpus.pair_tokens(size.max_length)
    asked = (queries + size.judged) / KEPT / corpus.queries_per_document
    encoding = corpus.tokens * pace.encoder
    judging = size.judged * size.top_k * tokens * pace.model + encoding
    work = {
        "mine": asked * pace.generator + encoding,
        "before": judging,
        "score": queries * size.top_k * tokens * pace.teacher + encoding,
        "adapt": queries * size.candidates * TRAINING_COST * tokens * pace.model,
        "merge": 0.0,
        "after": judging,
    }
    return {step: seconds + START / len(work) for step, seconds in work.items()}


def affordable_queries(size: Size, budget_minutes: float, pace: Pace, corpus: Corpus) -> int:
    fixed = sum(seconds_of(size, 0, pace, corpus).values())
    each = sum(seconds_of(size, 1, pace, corpus).values()) - fixed
    return int((SPARE * 60 * budget_minutes - fixed) / each)


def minutes_needed(size: Size, queries: int, pace: Pace, corpus: Corpus) -> int:
    # A second more: what is rounded down above must not ask for one query fewer.
    return math.ceil((sum(seconds_of(size, queries, pace, corpus).values()) + 1) / (SPARE * 60))


def choose(budget_minutes: float, pace: Pace, corpus: Corpus) -> tuple[Size, int]:
    """The largest size that fits, and how many queries to train with. ValueError, naming the minutes, if none does."""
    written = int(KEPT * corpus.documents * corpus.queries_per_document)
    for size in SIZES:
        size = replace(size, judged=min(size.judged, max(SIZES[-1].judged, written // 4)))
        available = max(FEWEST, written - size.judged)
        queries = affordable_queries(size, budget_minutes, pace, corpus)
        if queries >= min(size.least, available):
            return size, min(queries, available)
    raise ValueError(
        f"{budget_minutes:g} minutes are too few on this machine, even for the {FEWEST} shortest queries. Give "
        f"--budget-minutes {minutes_needed(SIZES[-1], FEWEST, pace, corpus)}."
    )
