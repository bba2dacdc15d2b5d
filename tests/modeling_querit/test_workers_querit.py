"""Several devices: two CPU processes score as one, share the work and the weights, and never outlive their parent."""

import gc
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline
from typer.testing import CliRunner

import querit
from modeling_querit import pipeline_querit, workers_querit
from modeling_querit.pipeline_querit import TextRankingPipeline
from modeling_querit.prompting_querit import EncodedPair
from modeling_querit.scoring_querit import TOLERANCE, NonFiniteScoreError, score_pairs, split_by_prefix
from modeling_querit.workers_querit import Workers, divide
from tests.modeling_querit.bar_for_tests import RecordingBar
from tests.modeling_querit.probe_model import DIE, GO, NAN, OUT_OF_MEMORY, THREADS, WAIT, WEIGHTS, ProbeModel
from tests.models_for_tests import CAUSAL_KINDS, KINDS, folder_of, tiny_config, tiny_model, tokenizer_of
from tests.tokenizers_for_tests import CORPUS

QUERY = "Where does the river rise?"
LONG = {"title": "A title", "text": " ".join(CORPUS[8:14]) * 2}
DOCUMENTS = [CORPUS[8], CORPUS[12], "oil", LONG, CORPUS[14], "oil", {"title": "Der Zug", "text": CORPUS[11]}]
REQUESTS = [
    {"query": QUERY, "documents": DOCUMENTS},
    {"query": "oil?", "documents": []},
    {"query": "図書館", "documents": [*CORPUS[9:18], "oil"]},
    {"query": "Where does the train to Köln stop on its way, and when does it leave?", "documents": CORPUS[:6]},
]
CPUS = [torch.device("cpu"), torch.device("cpu")]
POOLS: dict[str, TextRankingPipeline] = {}


@cache
def alone(kind: str) -> TextRankingPipeline:
    return TextRankingPipeline(model=tiny_model(kind), tokenizer=tokenizer_of(kind), device="cpu")


def pool_of(kind: str) -> TextRankingPipeline:
    if kind not in POOLS:
        POOLS[kind] = TextRankingPipeline(
            model=tiny_model(kind), tokenizer=tokenizer_of(kind), devices=["cpu", torch.device("cpu")]
        )
    return POOLS[kind]


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left():
    yield
    for ranker in POOLS.values():
        ranker.close()
    assert not workers_of_this_process()


def workers_of_this_process() -> list:
    return [process for process in active_children() if process.name.startswith("querit-")]


def pair(length: int, *tokens: int, prefix: int = 0, seed: int = 0) -> EncodedPair:
    """A pair of `length` tokens before the last, these among them; prefixes of one length are equal."""
    body = torch.randint(200, 900, (length - len(tokens),), generator=torch.Generator().manual_seed(length * 7 + seed))
    return EncodedPair(tuple(range(300, 300 + prefix)), (*tokens, *body.tolist()), (5,), False, None)


def assert_same(results: list[dict], expected: list[dict]) -> None:
    assert [result["index"] for result in results] == [result["index"] for result in expected]
    for result, wanted in zip(results, expected, strict=True):
        assert list(result) == list(wanted)
        for key, value in wanted.items():
            if isinstance(value, float):
                assert result[key] == pytest.approx(value, abs=TOLERANCE[torch.float32]), key
            else:
                assert result[key] == value, key


# ---------------------------------------------------------------- the same scores


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_rank_as_one(kind, monkeypatch):
    one, two = alone(kind), pool_of(kind)
    monkeypatch.setattr(workers_querit, "PIECE_TOKENS_CPU", 300)
    first_stage = [0.1, 9.0, -3, 4.5, 2, 3, 1]
    for options in (
        {}, {"shared_prefix": False}, {"batch_tokens": 64}, {"top_k": 3}, {"threshold": 0.0},
        {"return_documents": False}, {"instruction": "Find a text about water."}, {"max_length": 96},
        {"long_documents": "max_passage", "max_length": 96},
        *([{"shared_prefix": True}] if kind in CAUSAL_KINDS else []),
    ):  # fmt: skip
        rankings = two(REQUESTS, **options)
        for results, expected in zip(rankings, one(REQUESTS, **options), strict=True):
            assert_same(results, expected)
        if not options:
            oil = [result["score"] for result in rankings[0] if result["document"] == "oil"]
            assert len(oil) == 2
            assert oil[0] == oil[1]  # equal pairs, to the last bit
    assert_same(
        two(QUERY, DOCUMENTS, first_stage_scores=first_stage), one(QUERY, DOCUMENTS, first_stage_scores=first_stage)
    )
    assert two(QUERY, []) == [] == two([])
    assert len(workers_of_this_process()) >= 2
    if kind not in CAUSAL_KINDS:
        with pytest.raises(ValueError, match="shared_prefix needs a causal"):
            two(QUERY, DOCUMENTS, shared_prefix=True)
    with ThreadPoolExecutor(4) as threads:  # as a server calls it
        for results in threads.map(lambda _: two(QUERY, DOCUMENTS), range(8)):
            assert_same(results, one(QUERY, DOCUMENTS))


sizes = st.tuples(st.integers(1, 30), st.sampled_from([0, 0, 9, 25]), st.integers(0, 2))
all_sizes = st.lists(sizes, max_size=24)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(all_sizes, st.integers(1, 400), st.integers(1, 300), st.sampled_from([None, False, True]))
def test_any_pairs_however_they_are_divided(all_sizes, piece_tokens, batch_tokens, shared_prefix):
    pairs = [pair(length, prefix=prefix, seed=seed) for length, prefix, seed in all_sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers_querit, "PIECE_TOKENS_CPU", piece_tokens)
        logits = pool_of("qwen3").workers.score_pairs(pairs, 0, batch_tokens, shared_prefix)
    expected = score_pairs(alone("qwen3").model, pairs, 0, batch_tokens, shared_prefix)
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    assert (logits - expected).abs().amax() <= TOLERANCE[torch.float32] if pairs else True
    for index, other in enumerate(pairs):
        assert logits[index] == logits[pairs.index(other)]


# ---------------------------------------------------------------- pieces


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(sizes, min_size=1, max_size=60, unique=True), st.integers(1, 5), st.integers(1, 400), st.booleans())
def test_pieces_are_whole_balanced_and_split_few_prefixes(all_sizes, workers, most, share):
    pairs = [pair(length, prefix=prefix, seed=seed) for length, prefix, seed in all_sizes]
    together, apart = split_by_prefix(pairs, True) if share else ([], list(range(len(pairs))))
    pieces = divide(pairs, together, apart, workers, most)
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
    if share:
        cut = sum(len({pairs[row].prefix for row in piece}) for piece in pieces)
        assert cut <= len({pair.prefix for pair in pairs}) + len(pieces) - 1


def test_one_query_spreads_over_all_devices():
    pairs = [pair(20, prefix=30, seed=seed) for seed in range(100)]
    together, apart = split_by_prefix(pairs, None)
    assert not apart
    assert [len(piece) for piece in divide(pairs, together, apart, 4, 2**14)] == pytest.approx([25] * 4, abs=2)
    pieces = divide(pairs, together, apart, 2, 200)
    assert len(pieces) == 12  # 2,130 tokens
    apart = list(range(100))
    assert [len(piece) for piece in divide(pairs, [], apart, 2, 2**14)] == [50, 50]


# ---------------------------------------------------------------- the processes


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    config = tiny_config("bert")
    config.signs = str(tmp_path_factory.mktemp("signs"))
    threads = torch.get_num_threads()
    torch.set_num_threads(6)
    workers = Workers(ProbeModel(config), CPUS)
    assert workers.score_pairs([]).shape == (0,)
    assert not workers._workers  # nothing to do, nothing started
    workers.score_pairs([pair(3)])
    torch.set_num_threads(threads)
    yield workers
    workers.close()


def pids_of(workers: Workers) -> list[int]:
    return [worker.process.pid for worker in workers._workers]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60  # never reached where they end
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_work_is_spread_over_processes_and_threads(probe):
    logits = probe.score_pairs([pair(9), pair(9, seed=1), pair(9)])
    assert set(logits.tolist()) == set(pids_of(probe))
    assert logits[0] == logits[2]
    assert os.getpid() not in logits.tolist()
    assert probe.score_pairs([pair(9, THREADS), pair(8, THREADS)]).tolist() == [3, 3]  # half of six each


def test_whoever_is_done_takes_the_next_piece(probe, monkeypatch):
    monkeypatch.setattr(workers_querit, "PIECE_TOKENS_CPU", 1)
    pairs = [pair(length) for length in range(3, 12)]
    # The longest is begun first and waits for the shortest, which is handed out last.
    first, *others = probe.score_pairs([pair(20, WAIT), *pairs, pair(2, GO)]).tolist()
    assert {first, *others} == set(pids_of(probe))
    assert len(set(others)) == 1


def test_the_weights_are_shared_not_copied(probe):
    count = len(list(probe.model.parameters()))
    for value in (2.0, 3.0):
        with torch.no_grad():
            for parameter in probe.model.parameters():
                parameter.fill_(value)
        assert probe.score_pairs([pair(9, WEIGHTS), pair(8, WEIGHTS)]).tolist() == [count * value] * 2


@pytest.mark.parametrize("piece_tokens", [1, 2**14])
def test_a_score_that_is_not_finite_names_the_first_of_the_caller(probe, monkeypatch, piece_tokens):
    monkeypatch.setattr(workers_querit, "PIECE_TOKENS_CPU", piece_tokens)
    before = pids_of(probe)
    pairs = [pair(9), pair(9), pair(4, NAN), pair(30, NAN), pair(4, NAN), pair(40, NAN), pair(7)]
    with pytest.raises(NonFiniteScoreError, match=r"Pair 2 scored nan in torch.float32") as error:
        probe.score_pairs(pairs)
    assert error.value.index == 2
    assert probe.score_pairs([pair(9), pair(9, seed=1)]).isfinite().all()
    assert pids_of(probe) == before


def test_what_does_not_fit_is_told_and_the_workers_go_on(probe, monkeypatch):
    monkeypatch.setattr(workers_querit, "PIECE_TOKENS_CPU", 1)
    before = pids_of(probe)
    with pytest.raises(MemoryError, match=r"A single pair of 31 tokens does not fit into memory\. Lower max_length"):
        probe.score_pairs([pair(30, OUT_OF_MEMORY), *(pair(length) for length in range(3, 9))])
    assert set(probe.score_pairs([pair(9), pair(9, seed=1)]).tolist()) == set(before)


def test_the_progress_bar_counts_every_pair(probe, monkeypatch):
    bar = RecordingBar()
    events, options = bar.events, bar.options
    monkeypatch.setattr(workers_querit, "tqdm", bar)
    monkeypatch.setattr(workers_querit, "PIECE_TOKENS_CPU", 20)
    probe.score_pairs([pair(9, seed=seed) for seed in range(6)])
    assert options["total"] == 6
    assert options["delay"] > 0
    assert options["disable"] is None
    assert sorted(events[:-1]) == [1, 1, 2, 2]
    assert events[-1] == "closed"


def test_a_worker_that_dies_is_told_and_the_next_call_starts_new_ones(probe):
    before = pids_of(probe)
    with pytest.raises(RuntimeError, match=r"worker on cpu ended with exit code -9.*use fewer devices"):
        probe.score_pairs([pair(9), pair(8, DIE), pair(7)])
    assert gone(before)
    logits = probe.score_pairs([pair(9), pair(9, seed=1)])
    assert set(logits.tolist()) == set(pids_of(probe))
    assert not set(before) & set(pids_of(probe))


def test_ctrl_c_ends_busy_workers(probe):
    probe.score_pairs([pair(3)])
    signs = os.path.join(probe.model.config.signs, "{}")
    for sign in ("go", "waiting"):
        if os.path.exists(signs.format(sign)):
            os.remove(signs.format(sign))
    before = pids_of(probe)
    assert len(before) == 2

    def press():
        while not os.path.exists(signs.format("waiting")):
            time.sleep(0.01)
        for pid in before:  # a terminal's Ctrl+C goes to all of them
            os.kill(pid, signal.SIGINT)
        # Here to the main thread: another one that gets it, of which pytest has some, would not wake that from waiting.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if not ended.wait(60):
            Path(signs.format("go")).touch()  # fail, rather than wait for ever

    ended = threading.Event()
    # A library that ran in this process before may have put its own handler in the place of Python's.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            probe.score_pairs([pair(9, WAIT), pair(8)])
    finally:
        ended.set()
        signal.signal(signal.SIGINT, handler)
    assert gone(before)


# After all others that use the pools: they end them.


def test_a_worker_that_died_between_calls_is_told():
    ranker = pool_of("deepseek_v3")
    ranker(QUERY, DOCUMENTS)
    before = pids_of(ranker.workers)
    os.kill(before[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exit code -9.*The next call starts new workers"):
        ranker(REQUESTS)
    assert gone(before)


def test_close_and_the_end_of_a_with_block_end_the_workers():
    ranker = pool_of("bert")
    with ranker as same:
        assert same is ranker
        ranker(QUERY, DOCUMENTS)
        before = pids_of(ranker.workers)
        assert all(map(is_alive, before))
    assert gone(before)
    ranker.close()
    alone("bert").close()  # one device: nothing to end


def test_workers_end_with_their_ranker():
    ranker = pool_of("qwen3")
    ranker(QUERY, DOCUMENTS)
    before = pids_of(ranker.workers)
    del POOLS["qwen3"], ranker
    gc.collect()
    assert gone(before)


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], r"devices must be a list that names at least one, .*, not \[\]"),
        ("cuda:0", "devices must be a list .* not 'cuda:0'"),
        (2, "devices must be a list .* not 2"),
        (["cpu", "warp:0"], r"'warp:0' is no device of this machine\. It has: cpu"),
        (["cuda:99"], r"'cuda:99' is no device of this machine\. It has: cpu"),
        (["meta"], "'meta' is no device"),
        ([None, "cpu"], "None is no device"),
        ([["cpu"]], "is no device"),
    ],
)
def test_devices_that_are_none_are_refused_by_name(devices, message):
    with pytest.raises(ValueError, match=message):
        TextRankingPipeline(model=tiny_model("bert"), tokenizer=tokenizer_of("bert"), devices=devices)


def test_one_device_or_several():
    folder = str(folder_of("bert"))
    with pytest.raises(ValueError, match="devices takes the place of device"):
        pipeline("text-ranking", model=folder, trust_remote_code=True, device="cpu", devices=["cpu", "cpu"])
    model = tiny_model("bert")
    model.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="devices takes the place of device and device_map"):
        TextRankingPipeline(model=model, tokenizer=tokenizer_of("bert"), devices=["cpu"])
    with pytest.raises(TypeError, match="no option devices"):  # of the constructor, not of a call
        alone("bert")(QUERY, DOCUMENTS, devices=["cpu", "cpu"])


def test_the_dtype_follows_the_devices(monkeypatch):
    def dtype(*devices):
        monkeypatch.setattr(pipeline_querit, "read_devices", lambda names: [torch.device(name) for name in names])
        model = tiny_model("qwen3", torch.bfloat16)
        ranker = TextRankingPipeline(model=model, tokenizer=tokenizer_of("qwen3"), devices=devices)
        assert ranker.model.device.type == "cpu"
        return ranker.model.dtype

    monkeypatch.setattr(pipeline_querit, "fastest_cpu_dtype", lambda: torch.float32)
    assert dtype("cuda:0", "cuda:1") == torch.bfloat16
    assert dtype("cuda:0", "cpu") == torch.float32


def test_weights_that_cannot_be_shared_name_the_fix():
    workers = Workers(tiny_model("bert"), CPUS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    few = next(number for number in itertools.count() if len(set(range(number)) - used) > 4)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"could not be started: .*--shm-size.*ulimit -n.*one device"):
            workers.score_pairs([pair(9)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not workers._workers


def test_the_command_takes_devices(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("The tide rises twice a day.\n", encoding="utf-8")
    arguments = ["rank", "tide", str(file), "--model", str(folder_of("bert")), "--devices", "cpu,cuda:99"]
    result = CliRunner().invoke(querit.app, arguments)
    assert result.exit_code == 1
    assert "'cuda:99' is no device of this machine" in result.output


# ---------------------------------------------------------------- scripts

SCRIPT = """
import json, os, signal, sys
sys.modules["modeling_querit"] = None  # as if it were not installed
from multiprocessing import active_children
from transformers import pipeline

def main():
    work = json.loads(sys.argv[1])
    ranker = pipeline("text-ranking", model=work["folder"], trust_remote_code=True, devices=["cpu", "cpu"])
    # Workers must know the attention that the pipeline chooses for bfloat16. In float32 it scores as any other.
    half = pipeline("text-ranking", model=work["folder"], trust_remote_code=True, dtype="bfloat16")
    ranker.model.set_attn_implementation(half.model.config._attn_implementation)
    assert type(ranker).__module__.startswith("transformers_modules.")
    scores = [result["score"] for result in ranker(work["query"], work["documents"])]
    print(json.dumps({"scores": scores, "pids": [process.pid for process in active_children()]}), flush=True)
    if work["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)

GUARD
    main()
"""


def run_script(tmp_path, guard: str, killed: bool = False) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("GUARD", guard), encoding="utf-8")
    work = {"folder": str(folder_of("qwen3")), "query": QUERY, "documents": DOCUMENTS, "killed": killed}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "code")}
    command = [sys.executable, "-I", str(script), json.dumps(work)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "is killed"])
def test_a_script_with_remote_code_leaves_no_process(tmp_path, killed):
    result = run_script(tmp_path, 'if __name__ == "__main__":', killed)
    assert result.returncode == (-signal.SIGKILL if killed else 0), result.stderr
    assert "leaked" not in result.stderr
    found = json.loads(result.stdout)
    expected = [result["score"] for result in alone("qwen3")(QUERY, DOCUMENTS)]
    assert found["scores"] == pytest.approx(expected, abs=TOLERANCE[torch.float32])
    assert len(found["pids"]) == 2
    assert gone(found["pids"])


def test_a_script_without_the_guard_is_told(tmp_path):
    result = run_script(tmp_path, "if True:")
    assert result.returncode == 1
    assert (
        'exit code 1. If it is 1, its error stands above; a script must start workers under `if __name__ == "__main'
        in (result.stderr.splitlines()[-1])
    )
