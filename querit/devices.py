"""Scoring spread over devices: a process each, which reads the weights for itself and talks JSON over its pipes.

They are plain subprocesses and no `multiprocessing`: a script needs no `__main__` guard, a daemonic process may have
them, and a forked child, which inherits all but what it can use, ends nobody's.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import torch

from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.pipeline_querit import TextRankingPipeline
from modeling_querit.prompting_querit import EncodedPair
from modeling_querit.scoring_querit import (
    NonFiniteScoreError,
    can_share_prefix,
    default_batch_tokens,
    score_pairs,
    split_by_prefix,
)

# Most tokens handed to a worker at once: enough to fill several batches, few enough that all end at about one time.
PIECE_TOKENS_CPU, PIECE_TOKENS_GPU = 2**14, 2**17
ERRORS = {error.__name__: error for error in (ValueError, MemoryError)}


class Worker:
    """A process that scores on one device until its pipe closes, which it does when this process ends in any way."""

    def __init__(self, folder: Path, device: torch.device, dtype: str, threads: int):
        self.device = device
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "querit.devices", str(folder), str(device), dtype, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, pairs: list[EncodedPair], options: Sequence) -> torch.Tensor | Exception:
        """Their logits, or what went wrong with them. Raises RuntimeError where the process has ended."""
        try:
            print(json.dumps([pairs, options]), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())  # type: ignore[union-attr]
        except (OSError, ValueError):
            raise RuntimeError(
                f"The worker on {self.device} ended with exit code {self.process.wait(5)}. If it is -9, memory most "
                "likely ran out: use fewer devices, or lower batch_tokens; else its error stands above. The next call "
                "starts new workers."
            ) from None
        if "logits" in answer:
            return torch.tensor(answer["logits"])
        if "index" in answer:
            return NonFiniteScoreError(answer["index"], answer["value"], getattr(torch, answer["dtype"]))
        return ERRORS[answer["error"]](answer["text"])


class DevicesPipeline(TextRankingPipeline):
    """`TextRankingPipeline` with a process for each of `devices`.

    The first call starts them; `close()`, the end of a `with` block, of this object or of this process ends them. The
    scores are the same. Several threads may call it. RuntimeError, if a worker dies; the next call starts new ones.
    """

    def __init__(self, folder: str | Path, model: Any, tokenizer: Any, devices: Sequence, dtype: str = "auto"):
        self.devices = read_devices(devices)
        on_cpu = any(device.type == "cpu" for device in self.devices)
        super().__init__(model, tokenizer=tokenizer, device="cpu", dtype=dtype if on_cpu else model.dtype)
        self.folder, self.workers = Path(folder), []  # type: ignore[var-annotated]
        self._lock, self._pid = threading.Lock(), os.getpid()

    def close(self) -> None:
        """End the workers, whatever they are at. The next call starts new ones."""
        if self.workers and self._pid == os.getpid():
            self._end()
        self.workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "workers": [], "_lock": None, "_pid": None, "_end": None}

    def score_pairs(self, pairs: Sequence[EncodedPair], *options) -> torch.Tensor:
        if self._pid != os.getpid():  # forked, or unpickled: the workers, and who holds the lock, are another's
            self.workers, self._lock, self._pid = [], threading.Lock(), os.getpid()
        _, batch_tokens, shared_prefix = options
        if shared_prefix and not can_share_prefix(self.model):
            return super().score_pairs(pairs[:1], *options)  # says so
        numbers: dict[EncodedPair, int] = {}  # equal pairs go to one worker, once
        places = [numbers.setdefault(pair._replace(truncated=False, span=None), len(numbers)) for pair in pairs]
        unique = list(numbers)
        together: list[list[int]] = []
        alone = list(range(len(unique)))
        if shared_prefix is not False and can_share_prefix(self.model):
            budget = batch_tokens or default_batch_tokens(self.model)
            together, alone = split_by_prefix(unique, shared_prefix, budget)
        on_cpus = all(device.type == "cpu" for device in self.devices)
        most = PIECE_TOKENS_CPU if on_cpus else PIECE_TOKENS_GPU
        pieces = divide(unique, together, alone, len(self.devices), most)
        with self._lock:
            if pieces and not self.workers:
                self.start()
            logits = self._compute(unique, pieces[::-1], options)
        logits = logits[torch.tensor(places, dtype=torch.long)]
        if not torch.isfinite(logits).all():
            index = int((~torch.isfinite(logits)).nonzero()[0])
            raise NonFiniteScoreError(index, logits[index].item(), self.model.dtype)
        return logits

    def _compute(self, pairs: list[EncodedPair], pieces: list[list[int]], options: Sequence) -> torch.Tensor:
        """Logits of all pairs; whoever is done takes the last of the pieces that are left."""
        logits = torch.zeros(len(pairs))

        def work(worker: Worker) -> None:
            with suppress(IndexError):  # none is left
                while True:
                    rows = pieces.pop()
                    answer = worker.ask([pairs[row] for row in rows], options)
                    if isinstance(answer, NonFiniteScoreError):
                        logits[rows[answer.index]] = answer.value
                    elif isinstance(answer, Exception):
                        pieces.clear()
                        raise answer
                    else:
                        logits[rows] = answer

        with ThreadPoolExecutor(len(self.devices)) as pool:
            try:
                list(pool.map(work, self.workers))
            except (ValueError, MemoryError):  # of these pairs; the workers are well
                raise
            except BaseException:  # one died, or Ctrl+C: the pool would wait for its threads, and they for the workers
                self.close()
                raise
        return logits

    def start(self) -> None:
        cpus = sum(device.type == "cpu" for device in self.devices)
        threads = max(1, torch.get_num_threads() // max(1, cpus))
        dtype = str(self.model.dtype).removeprefix("torch.")
        self.workers = []
        self._end = weakref.finalize(self, end, self.workers, os.getpid())
        for device in self.devices:
            self.workers.append(Worker(self.folder, device, dtype, threads))


def divide(
    pairs: Sequence[EncodedPair], together: list[list[int]], alone: list[int], workers: int, most: int
) -> list[list[int]]:
    """Pieces of about equally many tokens, some `most` or less, as many for each worker where the pairs suffice.

    Neighbours are of a length or share their prefix, so a piece fills batches as well as the whole would.
    """
    costs: dict[int, int] = {}  # its order is that of the work: the longest first
    for row in sorted(alone, key=lambda row: -pairs[row].num_tokens):
        costs[row] = pairs[row].num_tokens
    for rows in sorted(together, key=lambda rows: -len(pairs[rows[0]].prefix)):
        for row in sorted(rows, key=lambda row: -pairs[row].num_tokens):
            costs[row] = pairs[row].num_tokens - len(pairs[row].prefix)
        costs[rows[0]] += len(pairs[rows[0]].prefix)
    total = sum(costs.values())
    number = workers * ceil(total / (workers * most))
    pieces: list[list[int]] = [[] for _ in range(number)]
    before = 0
    for row, cost in costs.items():
        pieces[before * number // total].append(row)
        before += cost
    # In the order given, so that the first pair to fail in a piece is the first one of the caller's.
    return [sorted(piece) for piece in pieces if piece]


def end(workers: list[Worker], pid: int) -> None:
    if os.getpid() == pid:  # a forked child runs this too when it exits
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.wait()


def read_devices(devices: Any) -> list[torch.device]:
    """Raises ValueError for what is no list of devices of this machine."""
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise ValueError(f'devices must be a list that names at least one, like ["cuda:0", "cuda:1"], not {devices!r}.')
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"]
    if accelerator is not None:
        here += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    found = []
    for name in devices:
        try:
            device = torch.device(name)
        except (RuntimeError, TypeError):
            device = None
        if device is None or (str(device) not in here and device != accelerator):
            raise ValueError(f"{name!r} is no device of this machine. It has: {', '.join(here)}.")
        found.append(device)
    return found


def work(folder: str, device: str, dtype: str, threads: str) -> None:
    """The life of a worker: lines of pairs in, lines of logits out, until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches every process of a terminal; the parent ends this one
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    if device == "cpu":
        torch.set_num_threads(int(threads))
    model = QueritForSequenceClassification.from_pretrained(folder, dtype=dtype).to(device)  # type: ignore[arg-type]
    for line in sys.stdin:
        fields, options = json.loads(line)
        pairs = [EncodedPair(tuple(p), tuple(d), tuple(s), *rest) for p, d, s, *rest in fields]
        answer: dict[str, Any]
        try:
            answer = {"logits": score_pairs(model, pairs, *options, progress=False).tolist()}  # type: ignore[misc]
        except NonFiniteScoreError as error:
            answer = {"index": error.index, "value": error.value, "dtype": dtype}
        except (ValueError, MemoryError) as error:
            answer = {"error": "MemoryError" if isinstance(error, MemoryError) else "ValueError", "text": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    work(*sys.argv[1:])
