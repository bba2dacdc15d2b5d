"""How many items a stage has before it, and how long and how dear they are likely to be.

Counts come from the config and the inputs, or from the stage that will make an input. Rates come from the records of
former runs in the same folder; where there are none, from rates.yaml, which says what each of its numbers is.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from querit.files import read_record
from recipes.lib.stages import Stage, is_within

RATES = Path(__file__).with_name("rates.yaml")
UNITS = {
    "packaged": "models", "vocabulary": "models", "base": "models", "backbone": "models", "fetch": "data sets",
    "align": "pairs", "crosslingual": "queries", "train": "queries", "mine": "documents", "score": "queries",
    "calibrate": "queries", "merge": "models", "evaluate": "queries",
}  # fmt: skip


@dataclass
class Estimate:
    items: int | None
    unit: str
    rows: int | None  # queries in what the stage writes, for the stages that read it
    seconds: float | None = None
    dollars: float | None = None
    source: str = ""


def count_lines(folder: str | Path, name: str) -> int | None:
    """Lines of `<folder>/<name>.jsonl` or `.jsonl.gz`, or None if there is no such file."""
    for path in (Path(folder) / f"{name}.jsonl", Path(folder) / f"{name}.jsonl.gz"):
        if path.exists():
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return None


def count_queries(path: str, stages: list[Stage]) -> int | None:
    """Queries in a Parquet file or BEIR folder, or in what the stage that will make it is expected to write."""
    if Path(path).is_file() and path.endswith(".parquet"):
        return pq.read_metadata(path).num_rows
    if (lines := count_lines(path, "queries")) is not None:
        return lines
    maker = next((stage for stage in stages if is_within(path, stage.output)), None)
    return count(maker, stages)[1] if maker else None


def at_most(limit: int | None, number: int | None) -> int | None:
    return min((value for value in (limit, number) if value), default=None)


def added(numbers: list[int | None]) -> int | None:
    return sum(number for number in numbers if number) if any(numbers) else None


def steps(config: dict) -> int:
    """Rows that a training of `max_steps` reads."""
    step = config.get("per_device_train_batch_size", 8) * config.get("gradient_accumulation_steps", 1)
    return config["max_steps"] * step


def count(stage: Stage, stages: list[Stage]) -> tuple[int | None, int | None]:
    """(items, queries written) of a stage; None where it cannot be told."""
    config = stage.config
    if stage.script == "mine":
        lines = count_lines(config["documents"], "corpus") if config.get("sample") is None else None
        documents = config.get("sample") or lines
        each = config.get("queries_per_document", 3) * len(config.get("generators") or [])
        return documents, documents * each if documents else None
    if stage.script == "score":
        queries = [
            added([at_most(target.get("queries"), added([count_queries(f, stages) for f in target["folders"]]))])
            for target in config["targets"].values()
        ]
        total = added([*queries, *(target.get("crops") for target in config["targets"].values())])
        return total, total
    if stage.script == "crosslingual":
        groups = sum(config["mix"].values())
        return groups, groups
    if stage.script == "align":
        return steps(config), None
    if stage.script == "train":
        groups = at_most(config.get("max_groups"), count_queries(config["train_data"], stages))
        if config.get("max_steps", -1) > 0:
            return steps(config), None
        return (round(groups * config.get("num_train_epochs", 3)) if groups else None), None
    if stage.script == "evaluate":
        folders = [at_most(config.get("max_queries"), count_lines(f, "queries")) for f in config.get("data") or []]
        return added(folders), None
    if stage.script == "calibrate":
        return config.get("groups", 500), None
    return {"merge": len(config.get("models", [])), "fetch": len(config.get("datasets", []))}.get(stage.script, 1), None


def rate_of(stage: Stage, stages: list[Stage], table: dict) -> tuple[float | None, str]:
    """(items per second, where that number is from): this stage's own last run, its kind's runs here, the table.

    The table may name a stage itself, where it is faster or slower than others of its script.
    """
    records = [read_record(other.output) for other in stages if other.script == stage.script]
    timed = [record for record in records if record and record.get("seconds") and record.get("items")]
    own = [record for record in timed if record["stage"] == stage.name]
    if runs := own or timed:
        return sum(r["items"] for r in runs) / sum(r["seconds"] for r in runs), "rates of former runs"
    name = stage.path.resolve().parent.name
    member = name if name in table["members"] else table["default"]
    rates = table["members"][member]["rates"]
    return rates.get(stage.name, rates.get(stage.script)), f"rates.yaml, {table['members'][member]['hardware']}"


def dollars_of(stage: Stage, documents: int | None, table: dict) -> float | None:
    """What the servers that write queries ask, where rates.yaml has the model's price."""
    cost = None
    for entry in stage.config.get("generators") or []:
        price: dict[str, Any] | None = table["prices"].get(entry.get("model"))
        if entry.get("kind") == "openai" and price and documents:
            tokens = table["tokens_per_document"]
            each = (tokens["input"] * price["input"] + tokens["output"] * price["output"]) / 1e6
            cost = (cost or 0) + documents * each
    return cost


def estimate(stage: Stage, stages: list[Stage]) -> Estimate:
    table = yaml.safe_load(RATES.read_text(encoding="utf-8"))
    items, rows = count(stage, stages)
    rate, source = rate_of(stage, stages, table)
    seconds = items / rate if items and rate else None
    return Estimate(items, UNITS[stage.script], rows, seconds, dollars_of(stage, items, table), source)


def in_words(seconds: float | None, dollars: float | None) -> str:
    if seconds is None:
        time = "time unknown"
    elif seconds < 90:
        time = f"{seconds:.0f} s"
    elif seconds < 90 * 60:
        time = f"{seconds / 60:.0f} min"
    else:
        time = f"{seconds / 3600:.1f} h"
    return f"{time}, ${dollars:,.0f}" if dollars else time
