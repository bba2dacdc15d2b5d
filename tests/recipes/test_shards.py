import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.lib.shards import batched, own_gpu, read_rows, run_shards, shard_name, write_items

NUMBERS = pa.schema({"number": pa.int64()})
SQUARES = pa.schema({"number": pa.int64(), "square": pa.int64()})
ROOT = Path(__file__).parents[2]


class Square:
    """Squares numbers, keeps the odd ones twice; tells in a folder which shards it saw."""

    def __init__(self, seen: Path | None = None):
        self.seen = seen

    def __call__(self, rows):
        if self.seen is not None:
            (self.seen / str(rows[0]["number"])).touch()
        squares = [{"number": row["number"], "square": row["number"] ** 2} for row in rows]
        return [square for square in squares for _ in range(1 + square["number"] % 2)]


class DiesOnce(Square):
    """The process that first sees the shard of number 12 kills itself; it leaves a mark, so that none does again."""

    def __init__(self, mark: Path):
        super().__init__()
        self.mark = mark

    def __call__(self, rows):
        if rows[0]["number"] == 12 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)


class Fails(Square):
    def __call__(self, rows):
        raise RuntimeError(f"number {rows[0]['number']} is refused")


class FailsLate(Square):
    def __call__(self, rows):
        if rows[0]["number"] == 203:
            raise RuntimeError("number 203 is refused")
        return super().__call__(rows)


class FailsBesideAnother(Square):
    """Refuses the shard of number 8 once another process has begun that of 12, which takes longer."""

    def __call__(self, rows):
        found, number = super().__call__(rows), rows[0]["number"]
        if number == 8:
            while not (self.seen / "12").exists():
                time.sleep(0.01)
            raise RuntimeError("number 8 is refused")
        if number == 12:
            time.sleep(1)
        return found


class TellsItsGpu(Square):
    def __init__(self, seen: Path):
        super().__init__()
        (seen / os.environ.get("CUDA_VISIBLE_DEVICES", "none")).touch()


@pytest.fixture(scope="module")
def local_ray():
    """Two workers on loopback, nothing reported, no dashboard."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    import ray

    memory = 80 * 2**20
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
        object_store_memory=memory,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.parquet"
    assert write_items(({"number": n} for n in range(23)), path, NUMBERS, 4) == 23
    assert pq.ParquetFile(path).num_row_groups == 6
    return path


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


EXPECTED = [{"number": n, "square": n * n} for n in range(23) for _ in range(1 + n % 2)]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 50))
def test_batches_hold_every_row_once_in_order(rows, size):
    batches = list(batched(iter(rows), size))
    assert [row for batch in batches for row in batch] == rows
    assert all(len(batch) == size for batch in batches[:-1]) and all(batches)


def test_one_process_and_two_write_the_same_files(items, tmp_path):
    for workers in (1, 2):
        run_shards(Square, items, tmp_path / str(workers), SQUARES, {"power": 2}, workers=workers)
        assert list(read_rows(tmp_path / str(workers))) == EXPECTED
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["complete"] and [entry["rows"] for entry in manifest["shards"]] == [6, 6, 6, 6, 6, 4]


def test_ray_writes_the_same_and_a_killed_worker_loses_nothing(items, tmp_path, local_ray):
    run_shards(Square, items, tmp_path / "local", SQUARES, {})
    run_shards(Square, items, tmp_path / "ray", SQUARES, {}, engine="ray", workers=2)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    mark = tmp_path / "mark"
    run_shards(partial(DiesOnce, mark), items, tmp_path / "killed", SQUARES, {}, engine="ray", workers=2)
    assert mark.exists() and list(read_rows(tmp_path / "killed")) == EXPECTED
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "local")


def test_only_what_is_missing_or_broken_is_made_again(items, tmp_path, capsys):
    seen, out = tmp_path / "seen", tmp_path / "out"
    seen.mkdir()

    def run(settings):
        for mark in seen.iterdir():
            mark.unlink()
        run_shards(partial(Square, seen), items, out, SQUARES, settings)
        assert list(read_rows(out)) == EXPECTED
        return sorted(int(mark.name) for mark in seen.iterdir())

    assert run({"power": 2}) == [0, 4, 8, 12, 16, 20]
    assert run({"power": 2}) == []
    (out / shard_name(1)).unlink()
    pq.write_table(pa.table({"number": [1], "square": [5]}, schema=SQUARES), out / shard_name(3))
    (out / f"{shard_name(4)}.77.writing").write_bytes(b"half")
    assert run({"power": 2}) == [4, 12]
    assert "not what was written" in capsys.readouterr().out
    assert not list(out.glob("*.writing"))
    assert run({"power": 3}) == [0, 4, 8, 12, 16, 20]  # other settings
    write_items(({"number": n} for n in range(23)), items, NUMBERS, 23)
    assert run({"power": 3}) == [0]  # other shards of the same items
    assert [path.name for path in sorted(out.iterdir())] == ["manifest.json", "shard-00000.parquet"]


KILLED = """
    import sys, time
    from functools import partial
    from pathlib import Path
    from recipes.lib.shards import run_shards
    from tests.recipes.test_shards import SQUARES, Square

    class Waits(Square):
        def __call__(self, rows):
            while rows[0]["number"] >= 8:
                time.sleep(60)
            return super().__call__(rows)

    run_shards(Waits, Path(sys.argv[1]), Path(sys.argv[2]), SQUARES, {})
"""


def test_a_killed_run_goes_on_after_what_it_finished(items, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(items), str(out)]
    process = subprocess.Popen(command, cwd=ROOT)
    manifest = out / "manifest.json"
    while not manifest.exists() or len(json.loads(manifest.read_text())["shards"]) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ValueError, match="not complete"):
        list(read_rows(out))
    (tmp_path / "seen").mkdir()
    run_shards(partial(Square, tmp_path / "seen"), items, out, SQUARES, {})
    assert sorted(int(mark.name) for mark in (tmp_path / "seen").iterdir()) == [8, 12, 16, 20]
    run_shards(Square, items, tmp_path / "unbroken", SQUARES, {})
    assert files_of(out) == files_of(tmp_path / "unbroken")


def numbers_in(folder):
    return sorted(int(mark.name) for mark in folder.iterdir())


def test_a_failure_begins_no_more_shards_and_loses_none_that_is_finished(items, tmp_path):
    out, seen, again = tmp_path / "out", tmp_path / "seen", tmp_path / "again"
    seen.mkdir()
    again.mkdir()
    with pytest.raises(RuntimeError, match="number 8 is refused"):
        run_shards(partial(FailsBesideAnother, seen), items, out, SQUARES, {}, workers=2)
    assert numbers_in(seen) == [0, 4, 8, 12]
    manifest = json.loads((out / "manifest.json").read_text())
    assert not manifest["complete"] and [entry["shard"] for entry in manifest["shards"]] == [0, 1, 3]
    run_shards(partial(Square, again), items, out, SQUARES, {}, workers=2)
    assert numbers_in(again) == [8, 16, 20] and list(read_rows(out)) == EXPECTED


def test_what_the_manifest_does_not_tell_yet_is_not_lost_by_a_failure(tmp_path):
    """From the 200th shard on it is written after every second one."""
    items, out = tmp_path / "items.parquet", tmp_path / "out"
    write_items(({"number": n} for n in range(206)), items, NUMBERS, 1)
    with pytest.raises(RuntimeError, match="number 203 is refused"):
        run_shards(FailsLate, items, out, SQUARES, {})
    manifest = json.loads((out / "manifest.json").read_text())
    assert not manifest["complete"] and [entry["shard"] for entry in manifest["shards"]] == list(range(203))


@pytest.mark.parametrize(
    ("gpus", "visible", "own"),
    [
        (0, None, [None, None, None]),
        (0, "", [None, None, None]),
        (1, None, ["0", "0", "0"]),
        (2, None, ["0", "1", "0"]),
        (2, "3,1", ["3", "1", "3"]),
        (2, "GPU-8a, GPU-07", ["GPU-8a", "GPU-07", "GPU-8a"]),
        (1, "2,-1,0", ["2", "2", "2"]),  # CUDA reads a list up to the first name of no device
    ],
)
def test_workers_are_dealt_the_gpus_that_are_visible_in_turn(gpus, visible, own):
    assert [own_gpu(worker, gpus, visible) for worker in range(3)] == own


def test_each_process_is_shown_its_own_gpu(items, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for visible, names in ((None, ["0", "1"]), ("7,5", ["5", "7"])):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        seen = tmp_path / f"seen-{visible}"
        seen.mkdir()
        run_shards(partial(TellsItsGpu, seen), items, tmp_path / f"out-{visible}", SQUARES, {}, workers=2)
        assert sorted(mark.name for mark in seen.iterdir()) == names
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_no_items_are_complete_at_once_and_mistakes_are_told(items, tmp_path):
    write_items([], tmp_path / "none.parquet", NUMBERS, 4)
    run_shards(Square, tmp_path / "none.parquet", tmp_path / "none", SQUARES, {})
    assert list(read_rows(tmp_path / "none")) == []
    with pytest.raises(ValueError, match="engine is 'spark'"):
        run_shards(Square, items, tmp_path / "out", SQUARES, {}, engine="spark")
    with pytest.raises(RuntimeError, match="number 0 is refused"):
        run_shards(Fails, items, tmp_path / "out", SQUARES, {})
    with pytest.raises(ValueError, match="not complete"):
        list(read_rows(tmp_path / "nowhere"))
