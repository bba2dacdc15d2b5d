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
# What a run writes into its work folder, in this order, and what it does until then.
STAGES = [
    ("plan.json", "Measuring how fast this machine is"),
    ("mined", "Writing queries from the documents"),
    ("scored.parquet", "Scoring candidates for each query"),
    ("adapted/trainer_state.json", "Training on the scores"),
    ("merged", "Merging with the model as it was"),
    ("evaluation/results.json", "Judging before and after on documents held aside"),
]
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


def stage_of(work: Path, seconds: float, minutes: float) -> Progress:
    """How far a run is: by what stands in its folder, and within a stage by the clock."""
    # The last that stands there: some are removed when they have served.
    done = max((place for place, (name, _) in enumerate(STAGES, 1) if (work / name).exists()), default=0)
    stage = STAGES[done][1] if done < len(STAGES) else "Packing"
    clock = min(seconds / (60 * minutes), 1.0)
    return Progress(min((done + clock) / (len(STAGES) + 1), 0.99), stage, seconds)


def adapt(models: Models, documents: list[str], name: str, minutes: float) -> Iterator[Progress | Adapted]:
    """Run `querit adapt` in a process of its own; closing this generator ends that process and all it started."""
    limit = allowed_minutes()
    if not limit:
        raise RefusedError("Adapting is not enabled on this page; run the command on your own machine.")
    if not 0 < minutes <= limit:
        raise RefusedError(f"At most {limit:g} minutes can be spent here.")
    source, _, revision = models.sources[models.name(name)].partition("@")
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
        start, step = time.monotonic(), Progress(0.0, STAGES[0][1], 0.0)
        while process.poll() is None:
            seconds = time.monotonic() - start
            if seconds > 60 * (GRACE * minutes + 2):
                raise RefusedError("The run took far longer than asked for and was stopped.")
            now = stage_of(Path(f"{output}.work"), seconds, minutes)
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
