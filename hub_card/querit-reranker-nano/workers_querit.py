"""Scoring spread over devices: one process each, the weights of all CPU processes in one shared memory."""

import signal
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import torch
from torch import multiprocessing
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .attention_querit import bfloat16_cpu_attention  # noqa: F401 - registered here, or a worker would not know it
from .layouts_querit import can_share_prefix
from .prompting_querit import EncodedPair
from .scoring_querit import NonFiniteScoreError, in_places, score_pairs, split_by_prefix, unique_pairs

# Most tokens handed to a worker at once: enough to fill several batches, few enough that all end at about one time.
PIECE_TOKENS_CPU, PIECE_TOKENS_GPU = 2**14, 2**17


class Worker(NamedTuple):
    device: torch.device
    process: SpawnProcess
    connection: Connection


class Workers:
    """A process for each of `devices`, started by the first call of `score_pairs` and ended by `close`.

    The weights of `model`, which must be on the CPU, are moved to shared memory: changed in place here, they change in
    the CPU's workers too; after any other change call `close`, and the next call starts workers with the new ones.
    Workers end too when this object is collected, and when this process ends in whatever way.
    """

    def __init__(self, model: PreTrainedModel, devices: Sequence[torch.device]):
        self.model, self.devices = model, devices
        self._workers: list[Worker] = []
        self._lock = threading.Lock()  # a worker does one thing at a time

    def score_pairs(
        self,
        pairs: Sequence[EncodedPair],
        pad_token_id: int | None = None,
        batch_tokens: int | None = None,
        shared_prefix: bool | None = None,
    ) -> torch.Tensor:
        """As `scoring_querit.score_pairs`, to the same tolerance. Raises RuntimeError when a worker dies."""
        unique, places = unique_pairs(pairs)
        share = shared_prefix is not False and can_share_prefix(self.model)
        together, alone = split_by_prefix(unique, shared_prefix) if share else ([], list(range(len(unique))))
        on_cpus = all(device.type == "cpu" for device in self.devices)
        most = PIECE_TOKENS_CPU if on_cpus else PIECE_TOKENS_GPU
        pieces = divide(unique, together, alone, len(self.devices), most)
        logits = torch.zeros(len(unique), dtype=torch.float32)
        with self._lock:
            try:
                failed = self._compute(unique, pieces, (pad_token_id, batch_tokens, shared_prefix), logits)
            except BaseException:  # Ctrl+C too: what the workers are at is of no use to the next call
                self.close()
                raise
        if failed is not None:
            raise failed
        return in_places(logits, places, self.model.dtype)

    def _compute(
        self, unique: list[EncodedPair], pieces: list[list[int]], options: tuple, logits: torch.Tensor
    ) -> Exception | None:
        """Fill `logits`; whoever is done gets the next piece. Returns what went wrong, once no worker is busy."""
        if pieces and not self._workers:
            self._start()
        todo, idle, failed = pieces[::-1], self._workers[::-1], None
        busy: dict[Any, tuple[Worker, list[int]]] = {}
        with tqdm(total=len(unique), desc="Scoring", unit="pair", delay=3, disable=None) as bar:
            while todo or busy:
                while todo and idle:
                    worker, rows = idle.pop(), todo.pop()
                    busy[worker.connection] = worker, rows
                    with suppress(ConnectionError):  # told below, where its answer is missing
                        worker.connection.send(([unique[row] for row in rows], *options))
                for connection in wait(list(busy)):
                    worker, rows = busy.pop(connection)
                    answer = answer_of(worker)
                    if isinstance(answer, NonFiniteScoreError):
                        logits[rows[answer.index]] = answer.value
                    elif isinstance(answer, Exception):
                        failed = answer
                        todo.clear()
                    else:
                        logits[rows] = torch.tensor(answer)
                    idle.append(worker)
                    bar.update(len(rows))
        return failed

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        threads = max(1, torch.get_num_threads() // max(1, sum(device.type == "cpu" for device in self.devices)))
        far_ends = []
        self._end = weakref.finalize(self, end, self._workers)
        try:
            self.model.share_memory()
            for device in self.devices:
                connection, far_end = spawn.Pipe()
                far_ends.append(far_end)
                process = spawn.Process(
                    target=work, args=(far_end, self.model, device, threads), name=f"querit-{device}", daemon=True
                )
                self._workers.append(Worker(device, process, connection))
            with ThreadPoolExecutor(len(self.devices)) as pool:  # each start waits until the process reads its weights
                list(pool.map(lambda worker: worker.process.start(), self._workers))
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"The workers could not be started: {error}. They need shared memory for the weights (in a container: "
                "docker run --shm-size=...) and open files (ulimit -n); one device needs neither."
            ) from error
        for far_end in far_ends:
            far_end.close()  # else nobody would be told of its other end's death
        for worker in self._workers:
            answer_of(worker)

    def close(self) -> None:
        """End the workers, whatever they are at. The next call starts new ones."""
        if self._workers:
            self._workers = []
            self._end()


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
            costs[row] = len(pairs[row].document) + len(pairs[row].suffix)
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


def work(connection: Connection, model: PreTrainedModel, device: torch.device, threads: int) -> None:
    """The life of a worker: pairs in, logits out, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches every process of a terminal; the parent ends this one
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which an ended process leaves behind
    if device.type == "cpu":
        torch.set_num_threads(threads)
    elif device.index is not None:
        torch.accelerator.set_device_index(device.index)
    model.to(device)  # type: ignore[arg-type]
    with suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            pairs, pad_token_id, batch_tokens, shared_prefix = connection.recv()
            try:
                logits = score_pairs(model, pairs, pad_token_id, batch_tokens, shared_prefix, progress=False)
                answer: Any = logits.tolist()
            except (ValueError, MemoryError) as error:
                answer = error
            connection.send(answer)


def answer_of(worker: Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        raise RuntimeError(
            f"The worker on {worker.device} ended with exit code {worker.process.exitcode}. If it is 1, its error "
            'stands above; a script must start workers under `if __name__ == "__main__":`. If it is -9, memory most '
            "likely ran out: use fewer devices, or lower batch_tokens. The next call starts new workers."
        ) from None


def end(workers: list[Worker]) -> None:
    started = [worker.process for worker in workers if worker.process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    for worker in workers:
        worker.connection.close()


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
