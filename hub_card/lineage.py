"""From a recipe's YAML files: which stages made a model, and what a card tells of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Stage(NamedTuple):
    name: str  # of the YAML
    config: dict[str, Any]

    @property
    def output(self) -> str:
        return self.config.get("output_dir") or self.config.get("output") or ""


def stages_of(recipe: Path, output: str) -> list[Stage]:
    """The stages of a recipe's folder that `output` was made by, directly or not, in the order of their names.

    Raises ValueError where no YAML writes `output`.
    """
    stages = [
        Stage(path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))) for path in sorted(recipe.glob("*.yaml"))
    ]
    by_output = {stage.output: stage for stage in stages}
    if output not in by_output:
        raise ValueError(f"No YAML of {recipe} writes {output}. Name the released output in the card's YAML.")
    found: dict[str, Stage] = {}
    pending = [by_output[output]]
    while pending:
        stage = pending.pop()
        found[stage.name] = stage
        inputs = [by_output[text] for text in strings(stage.config) if text in by_output]
        pending += [other for other in inputs if other.name not in found]
    return [found[name] for name in sorted(found)]


def strings(value: Any) -> Iterator[str]:
    """Every string in a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def data_sets(stages: list[Stage]) -> list[str]:
    """The names of the folders and files under a folder `data` that the stages read and no stage wrote."""
    made = {stage.output for stage in stages}
    read = [Path(text) for _, config in stages for text in strings(config) if text not in made]
    return list(dict.fromkeys(path.name.split(".")[0] for path in read if "data" in path.parts[:-1]))


def training_table(stages: list[Stage]) -> str:
    """The trainings, merges and calibrations in Markdown; "" if there are none."""
    rows = [f"| `{name}` | {text} |" for name, config in stages if (text := in_words(config))]
    return "\n".join(["| stage | what |", "| --- | --- |", *rows]) if rows else ""


def in_words(config: dict[str, Any]) -> str:
    """What a stage does to a model, in a line; "" for a stage that makes data."""
    start = Path(config.get("model_name_or_path", "")).name
    if "train_data" in config:
        queries = f"up to {config['max_groups']:,} queries" if config.get("max_groups") else "all queries"
        states = f" and the states of `{Path(config['states_teacher']).name}`" if config.get("states_teacher") else ""
        return (
            f"`{start}`, trained on {queries} of `{Path(config['train_data']).name}`: loss {config['loss']}{states}, "
            f"pairs of up to {config['max_length']} tokens, learning rate {float(config['learning_rate']):g}"
        )
    if "method" in config and "models" in config:
        weights = [f" ({weight:g})" for weight in config.get("weights", [])] or [""] * len(config["models"])
        named = (f"`{Path(model).name}`{weight}" for model, weight in zip(config["models"], weights, strict=True))
        return f"{config['method']} of " + ", ".join(named)
    if "first_group" in config:
        queries = f"up to {config['groups']} queries" if "groups" in config else "queries"
        return f"`{start}`, its head scaled on {queries} so that the probability means what it says"
    return ""
