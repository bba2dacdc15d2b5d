"""A small adaptation in a process of its own, which is ended with the request."""

import zipfile

import psutil
import pytest

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
    with pytest.raises(RefusedError, match="not enabled"):
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


def test_stages_follow_what_stands_in_the_folder(tmp_path):
    shares = [stage_of(tmp_path, 0, 1).share]
    for name, _ in adaptation.STAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        shares.append(stage_of(tmp_path, 0, 1).share)
    assert shares == sorted(set(shares)) and shares[0] == 0 and stage_of(tmp_path, 9999, 1).share < 1


def test_the_command_is_one_that_the_cli_takes():
    from typer.testing import CliRunner

    import querit

    words = command("org/model").split()
    assert words[0] == "querit"
    result = CliRunner().invoke(querit.app, [*words[1:], "--help"])
    assert result.exit_code == 0
