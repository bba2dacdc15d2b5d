"""The stages of a recipe: a folder of YAML files, in the order in which they run."""

import heapq
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from recipes.lib.records import ROOT, fingerprint

# A word of a YAML's name -> its script. The last such word counts: 1_general_score is score's, 1_general_long train's.
WORDS = {
    "retriever": "packaged", "teacher": "packaged", "vocabulary": "vocabulary", "base": "base", "backbone": "backbone",
    "fetch": "fetch", "align": "align", "general": "train", "groups": "crosslingual", "adapt": "train", "mine": "mine",
    "score": "score", "calibrate": "calibrate", "merge": "merge", "evaluate": "evaluate",
}  # fmt: skip
# The dataclasses that a script reads its YAML into.
ARGUMENTS = {
    "packaged": ("PackagedArguments",), "vocabulary": ("VocabularyArguments",), "base": ("BaseArguments",),
    "backbone": ("BackboneArguments",), "fetch": ("FetchArguments",), "align": ("AlignArguments", "RewardConfig"),
    "train": ("ScriptArguments", "RewardConfig"), "mine": ("MineArguments",), "score": ("ScoreArguments",),
    "crosslingual": ("CrosslingualArguments",), "calibrate": ("CalibrateArguments",), "merge": ("MergeArguments",),
    "evaluate": ("EvaluateArguments",),
}  # fmt: skip
OUTPUT_KEYS = ("output", "output_dir")


@dataclass(frozen=True)
class Stage:
    path: Path  # of the YAML
    script: str
    config: dict[str, Any]
    output: Path
    inputs: tuple[str, ...] = ()  # paths that the config names
    after: tuple[str, ...] = ()  # names of the stages that make some of them
    accelerate: str | None = None  # config file of `accelerate launch`

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def script_path(self) -> Path:
        return ROOT / "recipes" / f"{self.script}.py"

    def fingerprint(self) -> dict[str, dict]:
        return fingerprint(self.config, self.script_path, self.inputs)


def script_of(path: Path) -> str:
    """The script of a YAML file, told by its name."""
    words = [word for word in re.split(r"[^a-z]+", path.stem) if word in WORDS]
    if not words:
        raise ValueError(f"{path}: the name tells no stage; put one of {', '.join(WORDS)} into it.")
    return WORDS[words[-1]]


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def is_within(path: str, folder: Path) -> bool:
    return Path(path) == folder or folder in Path(path).parents


def is_path(text: str, outputs: list[Path]) -> bool:
    """Whether a config's value is a path: one that is there, or can be nothing else (`owner/name` is on the Hub)."""
    if not text or "\n" in text or "://" in text:
        return False
    # os.path: Path.exists raises for names that are too long
    if os.path.exists(text) or any(is_within(text, output) for output in outputs):
        return True
    first = Path(text).parts[0]
    known = os.path.exists(first) or any(first == output.parts[0] for output in outputs)
    return "/" in text and (known or text.count("/") > 1 or text.startswith(("/", ".")))


def read_stages(folder: str | Path, accelerate: str | None = None) -> list[Stage]:
    """The stages of a folder of YAMLs, in the order in which they run.

    Raises:
        ValueError: a file whose name tells no stage or that names no output, two stages with one output, a cycle.
    """
    files = sorted(Path(folder).glob("*.yaml"))
    if not files:
        raise ValueError(f"{folder} has no YAML files: it is no recipe. Those of the family are folders of recipes/.")
    found: dict[str, Stage] = {}
    for path in files:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        output = next((config[key] for key in OUTPUT_KEYS if config.get(key)), None)
        if output is None:
            raise ValueError(f"{path} names no output: add `output` or `output_dir`, as its script has it.")
        found[path.stem] = Stage(path, script_of(path), config, Path(output))
    for stage in found.values():
        for other in found.values():
            if other is not stage and is_within(str(other.output), stage.output):
                raise ValueError(f"{other.path} writes to {other.output}, which is {stage.path}'s: give it its own.")
    outputs = [stage.output for stage in found.values()]
    stages = {}
    for name, stage in found.items():
        texts = [text for key, value in stage.config.items() if key not in OUTPUT_KEYS for text in texts_in(value)]
        launcher = accelerate if stage.script == "train" else None
        paths = [text for text in texts if is_path(text, outputs) and not is_within(text, stage.output)]
        inputs = tuple(dict.fromkeys([*paths, *([launcher] if launcher else [])]))
        after = [n for n, other in found.items() if n != name and any(is_within(i, other.output) for i in inputs)]
        stages[name] = Stage(stage.path, stage.script, stage.config, stage.output, inputs, tuple(after), launcher)
    return in_order(stages)


def in_order(stages: dict[str, Stage]) -> list[Stage]:
    sorter = TopologicalSorter({name: stage.after for name, stage in stages.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        raise ValueError(f"These stages wait for each other: {' <- '.join(error.args[1])}. Break the circle.") from None
    ordered, ready = [], list[str]()
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, name)
        name = heapq.heappop(ready)
        ordered.append(stages[name])
        sorter.done(name)
    return ordered
