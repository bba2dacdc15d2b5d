"""A small adaptation in a process of its own, which is ended with the request."""

import zipfile

import psutil
import pytest

from recipes.lib.progress import Bar, Steps
from space_app import adaptation
from space_app.adaptation import MINUTES, Adapted, Progress, adapt, allowed_minutes, command, stage_of
from space_app.limits import RefusedError

DOCUMENTS = [
    f"# The lamp number {n}\n\nLamp {n} is mended by the harbour. It is older than {n + 3}." for n in range(120)
]


@pytest.fixture
def enabled(monkeypatch):
    monkeypatch.setenv(MINUTES, "2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def children():
    return [process for process in psutil.Process().children(recursive=True) if "adapt" in " ".join(process.cmdline())]


def test_nothing_runs_unless_it_is_enabled(models, monkeypatch):
    monkeypatch.delenv(MINUTES, raising=False)
    assert allowed_minutes() == 0
    with pytest.raises(RefusedError, match="turned off"):
        next(adapt(models, DOCUMENTS, "Tiny", 1))


def test_more_minutes_and_other_models_are_refused(models, enabled):
    with pytest.raises(RefusedError, match="At most 2 minutes"):
        next(adapt(models, DOCUMENTS, "Tiny", 3))
    with pytest.raises(RefusedError, match="no such model"):
        next(adapt(models, DOCUMENTS, "evil/repo", 1))


def test_a_run_tells_its_stages_and_gives_the_model(models, enabled, tmp_path):
    steps = list(steps_of(adapt(models, DOCUMENTS, "Tiny", 1), tmp_path))
    shares = [step.share for step in steps[:-1]]
    assert shares == sorted(shares) and len({step.stage for step in steps[:-1]}) >= 3
    assert "nDCG@10" in steps[-1].words and str(tmp_path) not in steps[-1].words
    with zipfile.ZipFile(tmp_path / "kept.zip") as archive:
        assert {"my-reranker/model.safetensors", "my-reranker/README.md"} <= set(archive.namelist())
    assert not steps[-1].archive.exists() and not children()


def steps_of(steps, folder):
    for step in steps:
        if isinstance(step, Adapted):
            (folder / "kept.zip").write_bytes(step.archive.read_bytes())
        yield step


def test_closing_ends_the_process_and_leaves_no_folder(models, enabled, monkeypatch, tmp_path):
    monkeypatch.setattr(adaptation.tempfile, "tempdir", str(tmp_path))
    steps = adapt(models, DOCUMENTS, "Tiny", 2)
    assert isinstance(next(steps), Progress) and children() and list(tmp_path.iterdir())
    steps.close()
    assert not children() and not list(tmp_path.iterdir())


def test_a_failed_run_says_why_without_paths(models, enabled):
    with pytest.raises(RefusedError, match="documents; an adaptation needs some hundreds") as refusal:
        list(adapt(models, DOCUMENTS[:3], "Tiny", 1))
    assert "/tmp" not in str(refusal.value)  # noqa: S108


def test_stages_are_told_as_the_run_writes_them(tmp_path):
    assert stage_of(tmp_path, 3).share == 0 and stage_of(tmp_path, 3).seconds == 3
    steps = Steps({"a": 10.0, "b": 30.0})
    bar = Bar(steps, {"a": "Writing queries", "b": "Training"}, tmp_path / adaptation.PROGRESS)
    with bar.step("a", tmp_path / "log.txt"):
        bar.show()
        assert stage_of(tmp_path, 3).stage == "Writing queries"
    steps.end(steps.began + 10)
    bar.show()
    assert stage_of(tmp_path, 9).share == pytest.approx(0.25) and stage_of(tmp_path, 9).stage == "Packing"


def test_the_command_is_one_that_the_cli_takes():
    from typer.testing import CliRunner

    from querit import cli

    words = command("org/model").split()
    assert words[0] == "querit"
    result = CliRunner().invoke(cli.app, [*words[1:], "--help"])
    assert result.exit_code == 0
