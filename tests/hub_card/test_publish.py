"""`querit publish` with the real client against a Hub on this machine."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import hub_card.publish
from hub_card.build import build
from hub_card.publish import Plan, plan_release, show_size, upload
from querit import cli
from tests.loopback_hub import HubError, LoopbackHub, User, read_tree
from tests.models_for_tests import folder_of

ROOT = Path(__file__).parents[2]
TOKEN, READER, STRANGER = "hf_writerSecretValue", "hf_readerSecretValue", "hf_strangerSecretValue"
REPO = "querit/tides"
TAG = f"v{version('querit-reranker')}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process, too, takes for the Hub, with a token that may write to querit/*."""
    with LoopbackHub(page_size=2) as hub:
        hub.users = {
            TOKEN: User("writer", ("querit",)),
            READER: User("writer", ("querit",), role="read"),
            STRANGER: User("stranger"),
        }
        for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        yield hub


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to publish. What makes a folder ready is tested with `verify` and, here, in the tests named so."""
    monkeypatch.setattr(hub_card.publish, "verify", lambda folder: [])
    return write(tmp_path / "tides", {"README.md": "---\nlicense: apache-2.0\n---\nTides.\n"})


def write(folder: Path, changes: dict[str, str]) -> Path:
    contents = {"config.json": "{}\n", "model.safetensors": "w" * 5000, "1_Pooling/config.json": "[]\n", **changes}
    contents[".eval_results/tides.yaml"] = "- task: tides\n"
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def publish(*args, answer: str | None = None):
    result = CliRunner().invoke(cli.app, ["publish", *map(str, args)], input=answer)
    for token in (TOKEN, READER, STRANGER):
        assert token not in result.output and token not in repr(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def published(*args, answer: str | None = None) -> str:
    result = publish(*args, answer=answer)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args, answer: str | None = None) -> str:
    result = publish(*args, answer=answer)
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


def at(hub, ref: str = "refs/heads/main") -> dict[str, bytes]:
    """What the Hub has at a ref, but for its own .gitattributes."""
    repo = hub.repos[REPO]
    return {path: file.content for path, file in repo.commits[repo.refs[ref]].items() if path != ".gitattributes"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path: file.content for path, file in read_tree(folder).items()}


def test_a_new_repo_gets_the_folder_in_one_commit_and_the_versions_tag(hub, folder):
    said = published(folder, REPO)
    assert f"{REPO}: a new repo\n" in said and "+ model.safetensors  5.0 kB" in said
    assert "5 added, 0 changed, 0 deleted, 0 unchanged" in said and f"tagged {TAG}" in said
    repo = hub.repos[REPO]
    assert at(hub) == contents(folder) and not repo.private and len(repo.commits) == 2
    assert repo.refs[f"refs/tags/{TAG}"] == repo.refs["refs/heads/main"]
    assert repo.commits[repo.refs["refs/heads/main"]]["model.safetensors"].large
    assert ".gitattributes" in repo.commits[repo.refs["refs/heads/main"]]


def test_private_is_asked_of_the_hub_and_never_a_public_repo_passed_for_one(hub, folder):
    assert "a new private repo" in published(folder, REPO, "--private")
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    assert "public already" in refused(folder, REPO, "--private")


def test_a_dry_run_shows_all_and_changes_nothing(hub, folder, monkeypatch):
    assert "5 added" in published(folder, REPO, "--dry-run")
    assert hub.repos == {}
    hub.push(REPO, folder)
    (folder / "config.json").write_text('{"more": 1}\n')
    monkeypatch.delenv("HF_TOKEN")  # to look at a public repo takes none
    said = published(folder, REPO, "--dry-run")
    assert "~ config.json  3 B -> 12 B" in said and "0 added, 1 changed, 0 deleted, 4 unchanged" in said
    assert "nothing was changed" in said and hub.writes() == []


def test_the_changes_are_told_by_hash_and_only_they_are_sent(hub, folder, tmp_path):
    tree = read_tree(write(tmp_path / "old", {"README.md": "Old.\n", "old.txt": "old\n", "vocab.txt": "a\n"}))
    first = hub.push(REPO, tree)
    (folder / "model.safetensors").write_text("v" * 5000)  # as long as before
    (folder / "vocab.txt").write_text("a\n")
    (folder / "new.json").write_text("1\n")
    said = published(folder, REPO, answer="y\n")
    for line in ("+ new.json", "~ README.md  5 B -> 35 B", "~ model.safetensors  5.0 kB -> 5.0 kB", "- old.txt  4 B"):
        assert line in said
    assert "1 added, 2 changed, 1 deleted, 4 unchanged" in said
    assert at(hub) == contents(folder)
    commit = next(request for request in hub.writes() if "/commit/" in request.path)
    header, *changes = [json.loads(line) for line in commit.body.splitlines()]
    assert header["value"]["parentCommit"] == first and TAG in header["value"]["summary"]
    assert {change["value"]["path"] for change in changes} == {"README.md", "model.safetensors", "new.json", "old.txt"}


def test_nothing_is_overwritten_without_a_yes(hub, folder):
    hub.push(REPO, write(folder.parent / "old", {"config.json": "{ }\n"}))
    before = at(hub)
    assert "nothing was published" in refused(folder, REPO, answer="n\n")
    assert "--yes" in refused(folder, REPO, answer="")
    assert at(hub) == before and hub.writes() == []
    published(folder, REPO, "--yes")
    assert at(hub) == contents(folder)


def test_what_is_only_added_is_not_asked_about(hub, folder):
    hub.push(REPO, write(folder.parent / "old", {}))
    assert "Change what" not in published(folder, REPO)
    assert at(hub) == contents(folder)


def test_the_same_folder_again_is_nothing_to_publish(hub, folder):
    published(folder, REPO)
    hub.requests.clear()
    assert "nothing to publish" in published(folder, REPO)
    assert hub.writes() == []
    del hub.repos[REPO].refs[f"refs/tags/{TAG}"]  # as where the connection broke before the tag
    assert f"tagged {TAG}" in published(folder, REPO)
    assert hub.repos[REPO].refs[f"refs/tags/{TAG}"] == hub.repos[REPO].refs["refs/heads/main"]


def test_a_version_that_is_out_already_is_refused_before_anything_is_sent(hub, folder):
    published(folder, REPO)
    (folder / "config.json").write_text('{"more": 1}\n')
    hub.requests.clear()
    for options in (["--yes"], ["--dry-run"]):
        error = refused(folder, REPO, *options)
        assert TAG in error and "Raise the version" in error
    assert hub.writes() == []


def test_a_branch_is_made_and_filled_and_is_no_release(hub, folder):
    first = hub.push(REPO, write(folder.parent / "old", {"config.json": "{ }\n"}))
    assert "a new branch" in published(folder, REPO, "--revision", "next", "--yes")
    repo = hub.repos[REPO]
    assert at(hub, "refs/heads/next") == contents(folder) and repo.refs["refs/heads/main"] == first
    assert not any(ref.startswith("refs/tags/") for ref in repo.refs)
    (folder / "config.json").write_text("[]\n")
    published(folder, REPO, "--revision", "next", "--yes")
    assert at(hub, "refs/heads/next")["config.json"] == b"[]\n"


def test_a_pull_request_leaves_main_and_needs_no_yes(hub, folder):
    first = hub.push(REPO, write(folder.parent / "old", {"config.json": "{ }\n"}))
    assert f"{hub.url}/{REPO}/discussions/1" in published(folder, REPO, "--create-pr")
    refs = hub.repos[REPO].refs
    assert at(hub, "refs/pr/1") == contents(folder)
    assert set(refs) == {"refs/heads/main", "refs/pr/1"} and refs["refs/heads/main"] == first
    assert "leave --revision out" in refused(folder, REPO, "--create-pr", "--revision", "next")
    assert "no repo querit/nowhere" in refused(folder, "querit/nowhere", "--create-pr")


def test_a_branch_that_moved_after_the_plan_is_not_overwritten(hub, folder):
    hub.push(REPO, write(folder.parent / "old", {"config.json": "{ }\n"}))
    plan = plan_release(folder, REPO)
    theirs = hub.push(REPO, write(folder.parent / "theirs", {"config.json": "theirs\n"}))
    with pytest.raises(OSError, match=r"changed while this ran.*run again"):
        upload(plan)
    assert hub.repos[REPO].refs == {"refs/heads/main": theirs}


def test_a_repo_that_somebody_made_after_the_plan_is_not_filled(hub, folder):
    plan = plan_release(folder, REPO)
    theirs = hub.push(REPO, write(folder.parent / "theirs", {"config.json": "theirs\n"}))
    with pytest.raises(OSError, match="changed while this ran"):
        upload(plan)
    assert hub.repos[REPO].refs == {"refs/heads/main": theirs}


def test_a_file_that_changes_while_it_is_uploaded_is_told_and_not_tagged(hub, folder):
    plan = plan_release(folder, REPO)

    def change(request):
        if "/commit/" in request.path:
            (folder / "config.json").write_text('{"later": 1}\n')

    with mock.patch.object(hub, "before", change), pytest.raises(OSError, match=r"config\.json differ.*not tagged"):
        upload(plan)
    assert set(hub.repos[REPO].refs) == {"refs/heads/main"}


def test_who_may_not_is_told_what_to_do_before_anything_is_sent(hub, folder, monkeypatch):
    hub.push(REPO, write(folder.parent / "old", {"config.json": "{ }\n"}))
    before = dict(hub.repos[REPO].refs)
    for token, said in (
        (READER, "your token can only read: make one of role write"),
        ("hf_unknownSecretValue", "log in with `hf auth login`"),
        (None, "There is no token"),
    ):
        monkeypatch.setenv("HF_TOKEN", token or "")
        error = refused(folder, REPO, "--yes")
        assert said in error and "SecretValue" not in error
        assert hub.writes() == []
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    for repo in (REPO, "querit/new"):
        error = refused(folder, repo, "--yes")
        assert "your token may not write there" in error and "settings/tokens" in error
    assert hub.repos[REPO].refs == before and set(hub.repos) == {REPO} and hub.uploads == {}


def test_a_hub_that_repeats_the_token_does_not_get_it_shown(hub, folder):
    def repeat(request):
        if "/commit/" in request.path:
            raise HubError(403, f"Bearer {request.token} is not enough")

    with mock.patch.object(hub, "before", repeat):
        assert "Bearer *** is not enough" in refused(folder, REPO)
        plan = plan_release(folder, REPO)
        with pytest.raises(OSError) as raised:
            upload(plan)
    assert TOKEN not in str(raised.value) and TOKEN not in repr(raised.value)


def test_bad_names_folders_and_networks_are_told(hub, folder, monkeypatch):
    assert "neither a folder here nor the name of a Hub repo" in refused(folder, "querit/a/b")
    assert "has no namespace" in refused(folder, "tides")
    assert "no folder" in refused(folder / "nowhere", REPO)
    (folder / "README.md").write_text("---\n- a list\n---\n")
    assert "Invalid metadata in README.md" in refused(folder, REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused(folder, REPO)
    assert "cannot be reached" in error and "HF_ENDPOINT" in error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(folder, REPO)


def test_a_plan_reads_well():
    plan = Plan(Path("x"), REPO, "main", False, False, TAG, "a" * 40, added={"w": 94_080_108}, deleted={"o": 1_500})
    assert str(plan).splitlines() == [
        f"{REPO}, branch main, at aaaaaaaa",
        "  + w  94.1 MB",
        "  - o  1.5 kB",
        "1 added, 0 changed, 1 deleted, 0 unchanged; 94.1 MB at most to upload",
        f"tag {TAG}",
    ]
    assert [show_size(size) for size in (0, 999, 1000, 8e9, 8e12)] == ["0 B", "999 B", "1.0 kB", "8.0 GB", "8000.0 GB"]


def test_a_process_of_its_own_publishes_a_built_release_and_stops_at_a_spoilt_one(hub, tmp_path):
    card = "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-ranking\n---\nTides.\n"
    release = build(folder_of("bert"), tmp_path / "release", card)
    sent = contents(release)
    environment = hub.environment(tmp_path / "home", TOKEN)

    def run(*args):
        command = [sys.executable, "-m", "querit", "publish", str(release), REPO, *args]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)

    result = run()
    assert result.returncode == 0, result.stderr
    assert at(hub) == sent and f"refs/tags/{TAG}" in hub.repos[REPO].refs
    assert TOKEN not in result.stdout + result.stderr
    (release / "pytorch_model.bin").write_bytes(b"\x80\x02")
    result = run("--yes")
    assert result.returncode == 1 and "is not ready to be published" in result.stderr
    assert "pytorch_model.bin" in result.stderr and at(hub) == sent
