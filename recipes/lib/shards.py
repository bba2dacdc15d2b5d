"""Long work in idempotent shards: the same rows from one process, several, or Ray; a stopped run goes on.

The items of a stage stand in one Parquet file, a row group a shard. Each shard's result is one Parquet file, written
aside and renamed, and `manifest.json` tells the key of the work and the hash of every finished shard:

    items.parquet -> output/shard-00000.parquet, output/shard-00001.parquet, ..., output/manifest.json

A worker sees one shard's items at a time, so memory does not grow with their number; whatever is random in its work
must depend on the items, not on which worker has them or when.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from querit.files import appears_whole, file_hash, write_json

Rows = list[dict[str, Any]]
Worker = Callable[[Rows], Rows]

ENGINES = ("local", "ray")


def batched(rows: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` rows, the last one shorter (itertools has it from Python 3.12 on)."""
    stream = iter(rows)
    while batch := list(itertools.islice(stream, size)):
        yield batch


def write_items(rows: Iterable[dict], path: Path, schema: pa.Schema, shard_size: int) -> int:
    """Stream rows into a Parquet file with `shard_size` rows a row group. -> the number of rows."""
    total = 0
    with appears_whole(path) as aside, pq.ParquetWriter(aside, schema) as writer:
        for group in batched(rows, shard_size):
            writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=shard_size)
            total += len(group)
    return total


class ShardWriter:
    """One worker at work: items of a shard in, the shard's file out. Made once per process, its model with it."""

    def __init__(self, make_worker: Callable[[], Worker], items: str, output: str, schema: pa.Schema):
        self.items, self.output, self.schema = items, Path(output), schema
        self.worker = make_worker()

    def write(self, shard: int) -> dict:
        """-> {"shard", "rows", "sha256"} of the finished file."""
        rows = self.worker(pq.ParquetFile(self.items).read_row_group(shard).to_pylist())
        path = self.output / shard_name(shard)
        with appears_whole(path) as aside:
            pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), aside)
            return {"shard": shard, "rows": len(rows), "sha256": file_hash(aside)}

    def __call__(self, batch: dict) -> dict:
        """Ray Data's form: a batch of shard numbers in, one of entries out."""
        entries = [self.write(int(shard)) for shard in batch["shard"]]
        return {key: [entry[key] for entry in entries] for key in ("shard", "rows", "sha256")}


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


def finished_shards(output: Path, key: str) -> dict[int, dict]:
    """Shards of this key whose files are what the manifest says. Files of another key, or broken ones, are removed."""
    manifest = output / "manifest.json"
    for path in output.glob("*.writing"):  # of a run that was killed
        path.unlink()
    stored = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    if stored.get("key") != key:
        for path in [manifest, *output.glob("shard-*.parquet")]:
            path.unlink(missing_ok=True)
        return {}
    finished = {}
    for entry in stored["shards"]:
        path = output / shard_name(entry["shard"])
        if path.exists() and file_hash(path) == entry["sha256"]:
            finished[entry["shard"]] = entry
        else:
            print(f"{path} is missing or not what was written; it is made again.")
            path.unlink(missing_ok=True)
    return finished


def run_shards(
    make_worker: Callable[[], Worker],
    items: Path,
    output: Path,
    schema: pa.Schema,
    settings: dict,
    engine: str = "local",
    workers: int = 1,
    description: str = "shards",
) -> None:
    """Run every shard of `items` that is not finished yet.

    `make_worker` is a picklable callable (a class or `functools.partial`) that loads what a worker needs once; the
    worker maps a shard's items to its rows, which fit `schema`. `settings` is all that the rows depend on beside the
    items (JSON values): another setting, or other items, make all shards anew. `engine` is local (`workers` processes,
    to which the GPUs are dealt out in turn, if there are any) or ray (`workers` actors of Ray Data on the cluster that
    RAY_ADDRESS names or a local one; `output` must be on a disk that they share; they share its GPUs too).

    Where a shard fails its error is raised, once the shards in work have come to their end; those finished are kept.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}.")
    output.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps([settings, file_hash(items)], sort_keys=True).encode()).hexdigest()
    finished = finished_shards(output, key)
    total = pq.ParquetFile(items).num_row_groups
    waiting = [shard for shard in range(total) if shard not in finished]

    def save(complete: bool) -> None:
        entries = [finished[shard] for shard in sorted(finished)]
        manifest = {"key": key, "complete": complete, "settings": settings, "shards": entries}
        write_json(output / "manifest.json", manifest)

    save(not waiting)
    run = {"local": run_local, "ray": run_ray}[engine]
    arguments = (make_worker, str(items.resolve()), str(output.resolve()), schema)
    progress = tqdm(total=total, initial=len(finished), desc=description, unit="shard")
    saved = len(finished)
    try:
        for entry in run(arguments, waiting, workers) if waiting else ():
            finished[entry["shard"]] = entry
            # The whole manifest after each of a hundred thousand shards would be most of the work.
            if len(finished) - saved >= max(1, saved // 100):
                save(len(finished) == total)
                saved = len(finished)
            progress.update()
    finally:  # where a shard failed, too: what the others hold may have been paid for
        if len(finished) > saved:
            save(len(finished) == total)
        progress.close()


_writer: ShardWriter | None = None  # of a worker process


def own_gpu(worker: int, gpus: int, visible: str | None) -> str | None:
    """What worker number `worker` is to have as CUDA_VISIBLE_DEVICES: one device, in turn. None without any.

    CUDA shows `gpus` devices here, the first of the list `visible`, this process's own CUDA_VISIBLE_DEVICES, if set.
    """
    if gpus == 0:
        return None
    names = visible.split(",")[:gpus] if visible else [str(gpu) for gpu in range(gpus)]
    return names[worker % len(names)].strip()


def _start(numbers: SimpleQueue[int], gpus: int, *arguments) -> None:
    global _writer
    gpu = own_gpu(numbers.get(), gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if gpu is not None:  # before the worker loads a model: CUDA reads it once, when it is first used
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    _writer = ShardWriter(*arguments)


def _write(shard: int) -> dict:
    assert _writer is not None
    return _writer.write(shard)


def run_local(arguments: tuple, shards: list[int], workers: int) -> Iterator[dict]:
    """The entries of the shards as they are finished. Once one has failed no other is begun; its error comes last."""
    if workers == 1:
        writer = ShardWriter(*arguments)
        yield from map(writer.write, shards)
        return
    import torch  # heavy, and here for no more than counting GPUs

    # spawn: a forked process inherits the locks of the parent's OpenMP and tokenizer threads
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    arguments = (numbers, torch.cuda.device_count(), *arguments)
    waiting, running = iter(shards), set[Future[dict]]()
    failure: BaseException | None = None
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=arguments) as pool:
        while True:
            # One for each process: what the pool has taken into its own queue cannot be cancelled.
            free = workers - len(running) if failure is None else 0
            try:
                for shard in itertools.islice(waiting, free):
                    running.add(pool.submit(_write, shard))
            except BrokenExecutor as broken:  # a process has died
                failure = broken
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if error := future.exception():
                    failure = failure or error
                else:
                    yield future.result()
    if failure is not None:
        raise failure


def run_ray(arguments: tuple, shards: list[int], workers: int) -> Iterator[dict]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('The engine is ray, which is not installed: pip install "querit-reranker[ray]"') from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    numbers = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    # A worker that dies is started again, and its shard with it: Ray Data's own default.
    written = numbers.map_batches(
        ShardWriter,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
        num_gpus=min(1, ray.cluster_resources().get("GPU", 0) / workers),
    )
    for row in written.iter_rows():
        yield {"shard": int(row["shard"]), "rows": int(row["rows"]), "sha256": row["sha256"]}


def read_rows(output: Path) -> Iterator[dict]:
    """The rows of a finished output, shard by shard. ValueError if the work is not complete."""
    manifest = output / "manifest.json"
    stored = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    if not stored.get("complete"):
        raise ValueError(f"{output} is not complete: run its stage again, it goes on where it was stopped.")
    for entry in stored["shards"]:
        for batch in pq.ParquetFile(output / shard_name(entry["shard"])).iter_batches():
            yield from batch.to_pylist()
