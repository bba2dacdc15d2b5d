"""The command that adapts a model to documents, and a small run of it where whoever runs the page has allowed that."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from space_app.limits import RefusedError
from space_app.models import Models

MINUTES = "QUERIT_SPACE_ADAPT_MINUTES"  # the longest run that a visitor may start; not set: none
HOW_TO_ENABLE = f"""pip install "querit-reranker[recipes,space]"
{MINUTES}=10 querit demo  # the longest run that a visitor may start
"""
PROGRESS = "progress.json"  # in a run's work folder: how far it is
GRACE = 3  # times the minutes asked for, after which a run is stopped


@dataclass(frozen=True)
class Progress:
    share: float
    stage: str
    seconds: float


@dataclass(frozen=True)
class Adapted:
    words: str  # the verdict
    archive: Path  # the model's folder, packed; it is there until the run's generator goes on


def command(model: str, documents: str = "documents.jsonl", minutes: float = 30, output: str = "my-reranker") -> str:
    return f"querit adapt {documents} --model {model} --output {output} --budget-minutes {minutes:g}"


def allowed_minutes() -> float:
    """0 where visitors may start nothing."""
    if importlib.util.find_spec("recipes") is None or importlib.util.find_spec("trl") is None:
        return 0.0
    return float(os.environ.get(MINUTES) or 0)


def stage_of(work: Path, seconds: float) -> Progress:
    """How far a run is, as it writes into its folder."""
    if not (work / PROGRESS).exists():
        return Progress(0.0, "Measuring how fast this machine is", seconds)
    run = json.loads((work / PROGRESS).read_text(encoding="utf-8"))
    return Progress(min(run["share"], 0.99), run["words"] or "Packing", seconds)


def adapt(models: Models, documents: list[str], name: str, minutes: float) -> Iterator[Progress | Adapted]:
    """Run `querit adapt` in a process of its own; closing this generator ends that process and all it started."""
    limit = allowed_minutes()
    if not limit:
        raise RefusedError("Adapting is turned off on this page; run the command on your own machine.")
    if not 0 < minutes <= limit:
        raise RefusedError(f"At most {limit:g} minutes can be spent here.")
    source, revision = models.source(models.name(name))
    folder = Path(tempfile.mkdtemp(prefix="querit-adapt-"))
    output, log = folder / "my-reranker", folder / "log.txt"
    process = None
    try:
        with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
            for number, text in enumerate(documents):
                file.write(json.dumps({"_id": str(number), "text": text}) + "\n")
        arguments = ["adapt", str(folder / "documents.jsonl"), "--output", str(output), "--model", source]
        arguments += ["--budget-minutes", f"{minutes:g}"] + (["--revision", revision] if revision else [])
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "querit", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        start, step = time.monotonic(), stage_of(Path(f"{output}.work"), 0.0)
        while process.poll() is None:
            seconds = time.monotonic() - start
            if seconds > 60 * (GRACE * minutes + 2):
                raise RefusedError("The run took far longer than asked for and was stopped.")
            now = stage_of(Path(f"{output}.work"), seconds)
            step = now if now.share >= step.share else replace(step, seconds=seconds)
            yield step
            time.sleep(0.5)
        if process.returncode:
            raise RefusedError(reason(log.read_text(encoding="utf-8", errors="replace"), folder))
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        words = next(line for line in reversed(said) if "nDCG@10" in line)
        packed = shutil.make_archive(str(folder / "my-reranker"), "zip", folder, "my-reranker")
        yield Adapted(words.replace(str(output), "my-reranker"), Path(packed))
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def reason(log: str, folder: Path) -> str:
    """What the command gave as the reason, without this machine's paths."""
    said = [line.removeprefix("querit: ") for line in log.splitlines() if line.startswith("querit: ")]
    if not said:
        return "The run failed; whoever runs this page finds why in its log."
    return said[-1].replace(f"{folder}{os.sep}", "")
