"""Batching across requests: those that wait together are scored together, in rounds, by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from querit.serve.jobs import Answer, Job

# A round is as many tokens as the last one scored in so many seconds, whatever the model and the device: enough to
# fill batches, few enough that whoever comes next does not wait long.
ROUND_SECONDS = 0.5
FIRST_ROUND_TOKENS, LEAST_ROUND_TOKENS = 2048, 256


class Round(NamedTuple):
    """What was scored together, for whoever measures."""

    requests: int
    pairs: int
    tokens: int
    seconds: float


class Batcher:
    """Scores jobs with `ranker`, a text-ranking pipeline, which nobody else may use meanwhile.

    Jobs are taken in order of arrival until a round is full. One that is larger than a round gives way to those behind
    it after each of its turns. The score of each pair is what it is alone, to `scoring_querit.TOLERANCE`.

    observe: is told of each round. round_seconds: about how long a round takes.
    """

    def __init__(
        self, ranker: Any, observe: Callable[[Round], None] = lambda _: None, round_seconds: float = ROUND_SECONDS
    ):
        self.ranker, self.observe, self.round_seconds = ranker, observe, round_seconds
        self.round_tokens = FIRST_ROUND_TOKENS
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="querit-batcher", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> "Future[Answer]":
        """The future of the job's answer. Cancel it, and no more is computed for it.

        It raises ValueError for what cannot be encoded, FloatingPointError for a score that is no number, MemoryError
        for a pair that does not fit, and RuntimeError when a device's process died; the next job starts a new one.
        """
        with self._changed:
            if self._closing:
                raise RuntimeError("The server is shutting down.")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Answer what was taken, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
            parts = self._next_round()
            start = time.perf_counter()
            self._score(parts)
            seconds = time.perf_counter() - start
            pairs = [pair for part in parts.values() for pair in part]
            tokens = sum(pair.num_tokens for pair in pairs)
            if pairs:
                possible = max(LEAST_ROUND_TOKENS, int(tokens * self.round_seconds / max(seconds, 1e-3)))
                # A round that was not full may be slow by its overhead alone.
                is_full = tokens >= self.round_tokens
                self.round_tokens = possible if is_full else max(possible, self.round_tokens)
                self.observe(Round(len(parts), len(pairs), tokens, seconds))
            for job in parts:
                if job.is_taken and not job.future.done() and job.future.set_running_or_notify_cancel():
                    job.future.set_result(job.answer())

    def _next_round(self) -> dict[Job, list]:
        """Job -> the pairs that it gets scored. Jobs that have no more leave the queue."""
        parts: dict[Job, list] = {}
        left = self.round_tokens
        while left > 0 and self._jobs:
            job = self._jobs[0]
            if job.future.cancelled():
                self._jobs.popleft()
                parts.pop(job, None)
                continue
            if job.allowance <= 0:
                job.allowance = self.round_tokens
            try:
                taken = job.take(self.ranker, min(left, job.allowance))
            except Exception as error:
                self._jobs.popleft()
                parts.pop(job, None)
                fail(job, error)
                continue
            parts.setdefault(job, []).extend(taken)
            left -= sum(pair.num_tokens for pair in taken)
            if job.is_taken:
                self._jobs.popleft()
            elif job.allowance <= 0:
                self._jobs.rotate(-1)
        return parts

    def _score(self, parts: dict[Job, list]) -> None:
        try:
            self._score_together(parts)
        except Exception as error:
            if len(parts) == 1:
                for job in parts:
                    self._drop(job, error)
                return
            for job, pairs in parts.items():  # only the one that is to blame fails
                self._score({job: pairs})

    def _score_together(self, parts: dict[Job, list]) -> None:
        pairs = [pair for part in parts.values() for pair in part]
        try:
            pad = self.ranker.tokenizer.pad_token_id
            logits = iter(self.ranker.score_pairs(pairs, pad, None, None).tolist() if pairs else [])
        except ValueError as error:  # nan: the model's fault, and not the request's
            raise FloatingPointError(str(error)) from error
        for job, part in parts.items():
            job.logits += [next(logits) for _ in part]

    def _drop(self, job: Job, error: Exception) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        fail(job, error)


def fail(job: Job, error: Exception) -> None:
    if not job.future.done() and job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
