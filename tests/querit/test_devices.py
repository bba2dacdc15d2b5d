"""Several devices: two CPU processes score as one, are forgotten by forked children, and never outlive their parent."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import querit
from modeling_querit.prompting_querit import EncodedPair
from modeling_querit.scoring_querit import TOLERANCE, split_by_prefix
from querit import devices
from tests.models_for_tests import CAUSAL_KINDS, folder_of, save_folder, tiny_model
from tests.tokenizers_for_tests import CORPUS

ROOT = Path(__file__).parents[2]
QUERY = "Where does the river rise?"
LONG = {"title": "A title", "text": " ".join(CORPUS[8:14]) * 2}
DOCUMENTS = [CORPUS[8], CORPUS[12], "oil", LONG, CORPUS[14], "oil", {"title": "Der Zug", "text": CORPUS[11]}]
REQUESTS = [
    {"query": QUERY, "documents": DOCUMENTS},
    {"query": "oil?", "documents": []},
    {"query": "図書館", "documents": [*CORPUS[9:18], "oil"]},
]


@pytest.fixture(scope="module", params=["qwen3", "bert"])
def rankers(request):
    folder = folder_of(request.param)
    with querit.load(folder, devices=["cpu", torch.device("cpu")]) as two:
        yield request.param, querit.load(folder, device="cpu"), two


def assert_same(results: list[dict], expected: list[dict]) -> None:
    assert [result["index"] for result in results] == [result["index"] for result in expected]
    for result, wanted in zip(results, expected, strict=True):
        assert result["score"] == pytest.approx(wanted["score"], abs=TOLERANCE[torch.float32])
        assert {**result, "score": 0, "probability": 0} == {**wanted, "score": 0, "probability": 0}


def pids_of(ranker) -> list[int]:
    return [worker.process.pid for worker in ranker.workers]


def gone(pids: list[int]) -> bool:
    for _ in range(600):  # never reached where they end
        if not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_two_processes_rank_as_one(rankers, monkeypatch):
    kind, one, two = rankers
    monkeypatch.setattr(devices, "PIECE_TOKENS_CPU", 300)
    for options in ({}, {"batch_tokens": 64, "top_k": 3}, {"long_documents": "max_passage", "max_length": 96}):
        for results, expected in zip(two(REQUESTS, **options), one(REQUESTS, **options), strict=True):
            assert_same(results, expected)
    oil = [result["score"] for result in two(QUERY, DOCUMENTS) if result["document"] == "oil"]
    assert oil[0] == oil[1]  # equal pairs, to the last bit
    assert two(QUERY, []) == [] == two([])
    with ThreadPoolExecutor(4) as threads:  # as a server calls it
        for results in threads.map(lambda _: two(QUERY, DOCUMENTS), range(6)):
            assert_same(results, one(QUERY, DOCUMENTS))
    assert len(set(pids_of(two))) == 2
    if kind in CAUSAL_KINDS:
        assert_same(two(QUERY, DOCUMENTS, shared_prefix=True), one(QUERY, DOCUMENTS))
    else:
        with pytest.raises(ValueError, match="shared_prefix needs a causal"):
            two(QUERY, DOCUMENTS, shared_prefix=True)


def test_a_forked_child_starts_its_own_and_ends_nobodys(rankers):
    """As gunicorn's workers have it: both sides rank at once, and the child exits first, its exit hooks run."""
    _, one, two = rankers
    two("oil?", ["oil"])
    before = pids_of(two)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            scores = [[result["score"] for result in two("図書館", CORPUS[:6])] for _ in range(3)]
            os.write(writing, json.dumps([scores, pids_of(two)]).encode())
            two.close()
        finally:
            two._end()  # what the end of a process calls
            os._exit(0)
    os.close(writing)
    rankings = [two(QUERY, DOCUMENTS) for _ in range(3)]
    with os.fdopen(reading) as answer:
        scores, pids = json.loads(answer.read())
    os.waitpid(child, 0)
    expected = [result["score"] for result in one("図書館", CORPUS[:6])]
    assert all(row == pytest.approx(expected, abs=TOLERANCE[torch.float32]) for row in scores)
    for results in rankings:
        assert_same(results, one(QUERY, DOCUMENTS))
    assert not set(pids) & set(before) and gone(pids)
    assert pids_of(two) == before
    assert_same(two(QUERY, DOCUMENTS), one(QUERY, DOCUMENTS))


def test_a_worker_that_dies_is_told_and_the_next_call_starts_new_ones(rankers):
    _, one, two = rankers
    two("oil?", ["oil"])
    before = pids_of(two)
    os.kill(before[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker on cpu ended with exit code -9.*use fewer devices"):
        two(REQUESTS)
    assert gone(before)
    assert_same(two(QUERY, DOCUMENTS), one(QUERY, DOCUMENTS))
    assert not set(before) & set(pids_of(two))


def test_a_score_that_is_not_finite_names_its_document(tmp_path):
    model = tiny_model("bert")
    model.classifier.bias.data.fill_(float("nan"))
    folder = save_folder(tmp_path, "bert", model)
    ranker = querit.load(folder, devices=["cpu"])
    with ranker, pytest.raises(ValueError, match=r"Document 0 of query 0.* nan"):
        ranker(QUERY, DOCUMENTS)


sizes = st.tuples(st.integers(1, 30), st.sampled_from([0, 0, 9, 25]), st.integers(0, 2))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(sizes, min_size=1, max_size=60, unique=True), st.integers(1, 5), st.integers(1, 400), st.booleans())
def test_pieces_are_whole_balanced_and_split_few_prefixes(all_sizes, workers, most, share):
    pairs = [
        EncodedPair(tuple(range(300, 300 + prefix)), (*range(seed, seed + length),), (5,), False, None)
        for length, prefix, seed in all_sizes
    ]
    together, apart = split_by_prefix(pairs, True, 1) if share else ([], list(range(len(pairs))))
    pieces = devices.divide(pairs, together, apart, workers, most)
    assert sorted(row for piece in pieces for row in piece) == list(range(len(pairs)))
    assert all(piece == sorted(piece) for piece in pieces)

    def tokens(rows) -> int:  # a shared prefix counts once
        prefixes = {pairs[row].prefix for row in rows} if share else set()
        whole = sum(pairs[row].num_tokens for row in rows)
        return whole if not share else whole - sum(len(pairs[row].prefix) for row in rows) + sum(map(len, prefixes))

    total, largest = tokens(range(len(pairs))), max(pair.num_tokens for pair in pairs)
    number = -(-total // (workers * most)) * workers
    assert all(tokens(piece) <= total / number + 2 * largest for piece in pieces)
    assert len(pieces) <= number


def test_workers_end_with_their_ranker():
    ranker = querit.load(folder_of("bert"), devices=["cpu"])
    ranker(QUERY, ["oil"])
    before = pids_of(ranker)
    del ranker
    gc.collect()
    assert gone(before)


SCRIPT = """
import json, multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
import querit

def rank(folder):
    ranker = querit.load(folder, devices=["cpu"])
    return len(ranker("oil?", ["oil", "rain"])), [worker.process.pid for worker in ranker.workers], ranker

if sys.argv[3] == "daemonic":
    def child():
        found, pids, ranker = rank(sys.argv[2])
        print(json.dumps([found, pids]), flush=True)
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join()
else:  # no guard, no main module: a notebook or a script as people write them
    found, pids, ranker = rank(sys.argv[2])
    print(json.dumps([found, pids]), flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["ends", "killed", "daemonic"])
def test_a_script_leaves_no_process(how, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(folder_of("bert")), how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    count, pids = json.loads(done.stdout)
    assert count == 2 and gone(pids)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"devices must be a list that names at least one, .*, not \[\]"),
        ("cuda:0", "devices must be a list .* not 'cuda:0'"),
        (2, "devices must be a list .* not 2"),
        (["cpu", "warp:0"], r"'warp:0' is no device of this machine\. It has: cpu"),
        (["cuda:99"], r"'cuda:99' is no device of this machine\. It has: cpu"),
        (["meta"], "'meta' is no device"),
        ([None, "cpu"], "None is no device"),
    ],
)
def test_devices_that_are_none_are_refused_by_name(names, message):
    with pytest.raises(ValueError, match=message):
        querit.load(folder_of("bert"), devices=names)


def test_one_device_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'gpu' is no device of this machine\. It has: cpu"):
        querit.load(folder_of("bert"), device="gpu")


def test_one_device_or_several():
    with pytest.raises(ValueError, match="devices takes the place of device"):
        querit.load(folder_of("bert"), device="cpu", devices=["cpu"])
