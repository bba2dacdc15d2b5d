"""The real clients against a Hub on this machine: what they get by name, at a commit, and when something is wrong.

Scores and errors come from a second process, started with HF_ENDPOINT and an empty cache, as a user's would be. It
lives as long as the module: transformers takes its seconds to import. Each test has repos of its own, so nothing is
cached.
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from transformers import dynamic_module_utils

from modeling_querit.modeling_querit import REMOTE_CODE
from tests.loopback_hub import File, LoopbackHub, Tree, git_oid, read_tree
from tests.models_for_tests import folder_of, save_folder, tiny_model

ROOT = Path(__file__).parents[2]
NANO = ROOT / "hub_card" / "querit-reranker-nano"
ID = "querit/querit-reranker-nano"
HF = Path(sys.executable).with_name("hf")
TOKEN = "hf_reader"  # noqa: S105
QUERY = "Why does the sea rise twice a day?"
DOCUMENTS = ["The Moon pulls on the water.", "Salt lowers its freezing point.", "Flour, water and time make bread."]
EVIL = b"from pathlib import Path\n\nPath(__file__).with_name('ran').touch()\nraise SystemExit('foreign code ran')\n"


# What runs in the other process


def scores_of(ranker) -> list[float]:
    return [row["score"] for row in sorted(ranker(QUERY, DOCUMENTS), key=lambda row: row["index"])]


def pipeline_scores(model: str, revision: str | None = None, trust: bool | None = True) -> list[float]:
    from transformers import pipeline

    options = {"revision": revision, "trust_remote_code": trust}
    return scores_of(pipeline("text-ranking", model=model, dtype="float32", **options))


def offline_scores(model: str, revision: str) -> list[float]:
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        return pipeline_scores(model, revision)


def cross_encoder_scores(model: str, revision: str | None = None) -> list[float]:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(model, revision=revision, model_kwargs={"dtype": "float32"})
    return (2 * encoder.predict([(QUERY, document) for document in DOCUMENTS]).astype(float) - 1).tolist()


def querit_scores(model: str, revision: str | None = None) -> list[float]:
    import querit

    ranker = querit.load(model, revision)
    ranker.model.float()
    return scores_of(ranker)


def snapshot(name: str, revision: str | None = None) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, revision=revision)


def attempt(action, *args):
    """What `action` returns and None, or None and what it says on failing."""
    import io
    from contextlib import redirect_stderr

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return action(*args), None
    except (Exception, SystemExit) as error:
        return None, f"{type(error).__name__}: {error} {said.getvalue()}"


class Client:
    def __init__(self, pool: ProcessPoolExecutor, home: Path):
        self.pool, self.home = pool, home

    def __call__(self, action, *args):
        found, error = self.pool.submit(attempt, action, *args).result(timeout=120)
        assert error is None, error
        return found

    def error(self, action, *args) -> str:
        found, error = self.pool.submit(attempt, action, *args).result(timeout=120)
        assert error is not None, f"no error, but {found}"
        return " ".join(error.split())

    def cached(self, name: str) -> list[str]:
        """The files of a repo that this client could load, whatever the commit."""
        folder = self.home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
        return sorted({"/".join(path.relative_to(folder).parts[1:]) for path in folder.rglob("*") if path.is_file()})


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        hub.users[TOKEN] = mock.Mock(organisations=(), role="read")
        hub.users[TOKEN].name = "reader"
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    # A spawned process takes over sys.path, where this one's cache of remote code would come before its own.
    path = [folder for folder in sys.path if folder != dynamic_module_utils.HF_MODULES_CACHE]
    with pool:
        with mock.patch.dict(os.environ, hub.environment(home), clear=True), mock.patch.object(sys, "path", path):
            pool.submit(os.getpid).result(timeout=120)
        yield Client(pool, home)


@pytest.fixture(scope="module")
def nano(hub) -> tuple[str, str]:
    """Two commits of the released folder's repo: the release, and main, whose weights and code are others."""
    tree = read_tree(NANO)
    release = hub.push(ID, tree)
    other = {name: File(EVIL, large=False) for name in REMOTE_CODE}
    weights = save_weights_of_another_seed(tree["model.safetensors"])
    return release, hub.push(ID, {**tree, **other, "model.safetensors": weights})


@pytest.fixture(scope="module")
def nano_scores(client) -> list[float]:
    return client(pipeline_scores, str(NANO))


def save_weights_of_another_seed(file: File) -> File:
    content = bytearray(file.content)
    content[-(2**20) :] = bytes(2**20)  # still safetensors: the last tensors are zeros
    return File(bytes(content), large=True)


def tiny(**changes: bytes | None) -> Tree:
    """The tree of a tiny release; `__` in a name stands for its dot."""
    tree = read_tree(folder_of("bert"))
    for name, content in changes.items():
        path = name.replace("__", ".")
        if content is None:
            del tree[path]
        else:
            tree[path] = File(content, large=path.endswith((".safetensors", ".bin")))
    return tree


def tiny_scores(client) -> list[float]:
    return client(pipeline_scores, str(folder_of("bert")))


@contextmanager
def fault(hub, kind: str, path: str, value):
    """The Hub serves a file wrongly for a while: see LoopbackHub."""
    faults = getattr(hub, kind)
    faults[path] = value
    try:
        yield
    finally:
        faults.pop(path, None)


def commits_read(hub, name: str) -> set[str]:
    return {re.search(r"/(?:resolve|tree|revision)/([^/]+)", request.path)[1] for request in hub.contents(name)}


def files_read(hub, name: str) -> set[str]:
    return {
        request.path.split("/resolve/")[1].partition("/")[2]
        for request in hub.contents(name)
        if "/resolve/" in request.path
    }


# By name


def test_hf_download_brings_the_released_folder_and_keeps_the_token_from_the_store(hub, nano, tmp_path):
    release, _ = nano
    command = [HF, "download", ID, "--revision", release, "--local-dir", tmp_path / "nano"]
    environment = hub.environment(tmp_path / "home", TOKEN)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for path in (path for path in NANO.rglob("*") if path.is_file()):
        assert (tmp_path / "nano" / path.relative_to(NANO)).read_bytes() == path.read_bytes()
    tokens = {request.path.startswith("/store/"): request.token for request in hub.requests}
    assert tokens == {False: TOKEN, True: None}
    assert TOKEN not in result.stdout + result.stderr


def test_a_snapshot_of_a_revision_is_that_commit(hub, client):
    first, second = hub.push("querit/two", tiny()), hub.push("querit/two", tiny(README__md=b"second\n"))
    assert not (Path(client(snapshot, "querit/two", first)) / "README.md").exists()
    assert (Path(client(snapshot, "querit/two")) / "README.md").read_text() == "second\n"
    assert (Path(client(snapshot, "querit/two", "main")).name, commits_read(hub, "querit/two") - {"main"}) == (
        second,
        {first, second},
    )


@pytest.mark.parametrize("scores", [pipeline_scores, cross_encoder_scores, querit_scores])
def test_a_revision_reaches_everything_that_is_read(hub, client, nano, nano_scores, scores):
    release, _ = nano
    shutil.rmtree(client.home, ignore_errors=True)
    hub.requests.clear()
    assert client(scores, ID, release) == pytest.approx(nano_scores, abs=1e-4)
    assert commits_read(hub, ID) == {release}
    read = files_read(hub, ID)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= read
    code = {path for path in read if path.endswith(".py")}
    assert code == (set(REMOTE_CODE) if scores is pipeline_scores else set())


def test_querit_rank_takes_a_repo_at_a_commit(hub, nano, nano_scores, tmp_path):
    release, _ = nano
    (tmp_path / "d.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8")
    command = ["rank", QUERY, str(tmp_path / "d.txt"), "--model", ID, "--revision", release, "--json"]
    hub.requests.clear()
    result = subprocess.run(
        [sys.executable, "-m", "querit", *command],
        env=hub.environment(tmp_path / "home"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    rows = sorted(map(json.loads, result.stdout.splitlines()), key=lambda row: row["index"])
    assert [row["score"] for row in rows] == pytest.approx(nano_scores, abs=2e-2)  # in the dtype of this machine
    assert commits_read(hub, ID) == {release}


@pytest.mark.parametrize("scores", [pipeline_scores, querit_scores])
def test_a_branch_that_moves_while_it_is_read_gives_one_commit(hub, client, scores):
    name = f"querit/moving-{scores.__name__.replace('_', '-')}"
    first = hub.push(name, tiny())
    other = tiny_model("bert", seed=7)
    second = tiny(
        model__safetensors=read_tree(save_folder(client.home.parent / name, "bert", other))["model.safetensors"].content
    )

    def move(request):
        if name in request.path and "/resolve/" in request.path and hub.repos[name].refs["refs/heads/main"] == first:
            hub.push(name, second)

    with mock.patch.object(hub, "before", move):
        assert client(scores, name) == pytest.approx(tiny_scores(client), abs=1e-5)
    assert hub.repos[name].refs["refs/heads/main"] != first
    assert commits_read(hub, name) - {"main"} == {first}


# When something is wrong


@pytest.mark.parametrize("scores", [pipeline_scores, querit_scores])
@pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_an_error_and_leaves_nothing_to_load(hub, client, scores, path):
    name = f"querit/truncated-{path.partition('.')[0]}-{scores.__name__.replace('_', '-')}"
    tree = tiny()
    commit = hub.push(name, tree)
    with fault(hub, "instead", path, tree[path].content[:-100]):
        assert "should be of size" in client.error(scores, name, commit)
        assert path not in client.cached(name)
        assert client.error(offline_scores, name, commit)  # nor from the cache alone
    assert client(scores, name, commit) == pytest.approx(tiny_scores(client), abs=1e-5)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, client, nano_scores):
    commit = hub.push("querit/cut-once", read_tree(NANO))
    with fault(hub, "cuts", "model.safetensors", [30 * 2**20]):
        hub.requests.clear()
        assert client(querit_scores, "querit/cut-once", commit) == pytest.approx(nano_scores, abs=1e-4)
    large = [request for request in hub.requests if request.path.startswith("/store/") and request.method == "GET"]
    first, second = (request.headers.get("range") for request in large)
    assert first is None and 0 < int(re.fullmatch(r"bytes=(\d+)-", second)[1]) <= 30 * 2**20


def test_a_connection_that_breaks_again_and_again_is_an_error(hub, client):
    commit = hub.push("querit/cut", tiny())
    with fault(hub, "cuts", "model.safetensors", [1000] + [0] * 20):
        assert "cannot be reached" in client.error(querit_scores, "querit/cut", commit)
    assert "model.safetensors" not in client.cached("querit/cut")
    assert client(querit_scores, "querit/cut", commit) == pytest.approx(tiny_scores(client), abs=1e-5)


@pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json", "config.json"])
def test_content_of_the_right_size_and_a_wrong_hash_is_refused_and_removed(hub, client, path):
    name = f"querit/wrong-{path.partition('.')[0]}"
    tree = tiny()
    commit, right = hub.push(name, tree), tree[path].content
    wrong = right[:-9] + bytes(byte ^ 1 for byte in right[-9:-1]) + right[-1:]
    with fault(hub, "instead", path, wrong):
        error = client.error(querit_scores, name, commit)
        assert f"{path} is not what the Hub says it is" in error and tree[path].etag in error
        assert path not in client.cached(name)
    assert client(querit_scores, name, commit) == pytest.approx(tiny_scores(client), abs=1e-5)


def test_what_hf_download_took_unseen_is_told_by_hf_cache_verify_and_refused_by_querit(hub, client):
    tree = tiny()
    commit = hub.push("querit/unseen", tree)
    with fault(hub, "instead", "model.safetensors", tree["model.safetensors"].content[:-8] + bytes(8)):
        client(snapshot, "querit/unseen", commit)
    verify = [HF, "cache", "verify", "querit/unseen", "--revision", commit]
    result = subprocess.run(verify, env=hub.environment(client.home), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "model.safetensors" in result.stdout + result.stderr
    assert "model.safetensors is not what the Hub says it is" in client.error(querit_scores, "querit/unseen", commit)
    assert client(querit_scores, "querit/unseen", commit) == pytest.approx(tiny_scores(client), abs=1e-5)


def test_a_file_of_another_commit_than_asked_for_is_not_loaded(hub, client):
    for scores in (pipeline_scores, querit_scores):
        commit = hub.push(f"querit/astray-{scores.__name__[0]}", tiny())
        with fault(hub, "moved", "model.safetensors", "b" * 40):
            assert client.error(scores, f"querit/astray-{scores.__name__[0]}", commit)
    assert client(querit_scores, "querit/astray-q", commit) == pytest.approx(tiny_scores(client), abs=1e-5)


@pytest.mark.parametrize("scores", [pipeline_scores, querit_scores])
def test_pickled_weights_do_not_rank(hub, client, scores):
    import torch

    file = client.home.parent / "weights.bin"
    torch.save(tiny_model("bert").state_dict(), file)
    name = f"querit/pickled-{scores.__name__.replace('_', '-')}"
    commit = hub.push(name, tiny(model__safetensors=None, pytorch_model__bin=file.read_bytes()))
    error = client.error(scores, name, commit)
    if scores is pipeline_scores:  # Querit's class refuses; transformers then tries the plain one, which is refused
        assert "loaded as a plain BertForSequenceClassification" in error and "model.safetensors" in error
    else:
        assert "cannot be loaded with `safetensors`" in error or f"{commit} has no *.safetensors" in error
        assert "pytorch_model.bin" not in client.cached(name)


def test_foreign_code_is_neither_run_nor_are_its_weights_fetched(hub, client):
    config = json.loads(tiny()["config.json"].content)
    for number, reference in enumerate(("evil.Model", "other/repo--modeling_querit.QueritForSequenceClassification")):
        name = f"querit/foreign-{number}"
        mapped = {**config, "auto_map": dict.fromkeys(config["auto_map"], reference)}
        commit = hub.push(name, tiny(config__json=json.dumps(mapped).encode(), evil__py=EVIL))
        error = client.error(querit_scores, name, commit)
        assert "code that is not Querit's" in error and reference in error
        assert files_read(hub, name) == {"config.json"}
        assert "trust_remote_code=True" in client.error(pipeline_scores, name, commit, None)
    assert not list(client.home.rglob("evil.py"))


def test_code_under_our_names_is_not_run_without_trust(hub, client):
    commit = hub.push("querit/disguised", tiny(**{name.replace(".", "__"): EVIL for name in REMOTE_CODE}))
    assert client(querit_scores, "querit/disguised", commit) == pytest.approx(tiny_scores(client), abs=1e-5)
    assert "trust_remote_code=True" in client.error(pipeline_scores, "querit/disguised", commit, None)
    assert not {path for path in files_read(hub, "querit/disguised") if path.endswith(".py")}
    assert not list(client.home.rglob("ran"))


def test_what_is_not_there_is_named(hub, client):
    hub.push("querit/there", tiny())
    hub.push("querit/secret", tiny(), private=True)
    hub.push("querit/empty", {"README.md": File(b"nothing yet\n", large=False)})
    gone = "f" * 40
    assert f"no revision {gone}" in client.error(querit_scores, "querit/there", gone)
    assert "no revision v9" in client.error(querit_scores, "querit/there", "v9")
    assert client.cached("querit/there") == []
    for name in ("querit/nowhere", "querit/secret"):
        error = client.error(querit_scores, name)
        assert f"no repo {name} that you may see" in error and "hf auth login" in error
    assert "no such file" in client.error(querit_scores, "querit/empty")
    assert "neither a folder here nor the name of a Hub repo" in client.error(querit_scores, "./not/here")


def test_the_loopback_hub_names_content_as_git_does():
    # `printf 'what is up, doc?' | git hash-object --stdin`, as in the Git Book, chapter 10.2
    assert git_oid(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
