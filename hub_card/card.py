"""The card of a release, README.md: from its template, with numbers from the folder and from result files only.

A member of the family has two files in templates/: `<name>.yaml`, the metadata and where its facts stand, and
`<name>.md.jinja`, what its card says beyond card.md.jinja, which all share. Other models get that one alone.
"""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hub_card.build import MERGE_RECORD
from hub_card.convert import CHAT_TEMPLATE, read_headers, weight_files
from hub_card.lineage import data_sets, stages_of, training_table

TEMPLATES = Path(__file__).parent / "templates"
ROOT = Path(__file__).parents[1]
SPEED = ROOT / "tests" / "bench" / "results" / "scoring.json"
PRECISION = SPEED.with_name("precision.json")
SHARED = "card.md.jinja"
FIRST_STAGE, WORDS, FUSED = "retriever", "BM25", " + first stage"  # systems, as recipes.results names them
METADATA = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "text-ranking",
    "tags": ["reranker", "cross-encoder", "custom_code", "sentence-transformers"],
}


def members() -> list[str]:
    """The names that have a template."""
    return sorted(path.stem for path in TEMPLATES.glob("querit-reranker-*.yaml"))


def member_of(checkpoint: str | Path, folder: Path) -> str | None:
    """The member that a folder, or else the checkpoint it is built from, is named after."""
    return next((name for name in (folder.name, Path(checkpoint).name) if name in members()), None)


def render(folder: Path, member: str | None = None, results: Path | None = None) -> str:
    """The card of the release in `folder`, which has all else already.

    Args:
        member: one of `members()`; None for the card that any model gets.
        results: output_dir of recipes.evaluate. Without it the card says that nothing was measured.

    Raises ValueError for an unknown member, and for results without the system that the member's YAML names.
    """
    if member and member not in members():
        raise ValueError(f"There is no card for {member!r}; there are {', '.join(members())}.")
    about = read_yaml(TEMPLATES / f"{member}.yaml") if member else {}
    name = member or folder.name
    measured = read_results(results, about.get("system")) if results else None
    published = read_yaml(TEMPLATES / "published.yaml") if "published" in about else None
    stages = stages_of(ROOT / "recipes" / about["recipe"], about["released"]) if "released" in about else []
    evaluated = evaluations(measured, about) + statements(published, about)
    data = ModelCardData(
        **{**METADATA, **about.get("metadata", {})},
        model_name=about.get("title", name) if evaluated else None,
        eval_results=evaluated or None,
        metrics=["ndcg_at_10"] if measured or published else None,
    )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,  # noqa: S701 - Markdown, of files that are ours
    )  # fmt: skip
    environment.filters |= {"millions": millions, "thousands": "{:,}".format}
    body = environment.get_template(f"{member}.md.jinja" if member else SHARED).render(
        title=about.get("title", name),
        hub_id=about.get("hub_id", name),
        **facts(folder),
        measured=measured,
        speed=speed_table(about["speed"]) if "speed" in about else "",
        precision=precision_table() if "speed" in about else "",
        merge=read_merge(folder),
        recipe=about.get("recipe"),
        published=published and {**published, "table": published_table(published)},
        own=published["members"][about["published"]] if published else None,
        trained_on=sorted(data_sets(stages)),
        training=training_table(stages),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    ModelCard(text)  # raises where the metadata is not valid
    return text


def facts(folder: Path) -> dict[str, Any]:
    """What config, tokenizer and the weights' headers say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    files = weight_files(folder)
    shapes, _ = read_headers(files)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return {
        "model_type": config["model_type"],
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "vocabulary": config["vocab_size"],
        "parameters": parameters,
        "parameters_without_embeddings": parameters - config["vocab_size"] * config["hidden_size"],
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6),
        "max_length": min(int(tokenizer["model_max_length"]), config["max_position_embeddings"]),
        "causal": (folder / CHAT_TEMPLATE.name).is_file(),
    }


def read_results(folder: Path, system: str | None) -> dict[str, Any]:
    """results.json of recipes.evaluate, with `system`: the model that the card is of, the last one if None."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. Give the output_dir of `python -m recipes.evaluate`.")
    results = json.loads(path.read_text(encoding="utf-8"))
    system = system or [*results["settings"]["models"]][-1]
    if system not in results["mean"]:
        raise ValueError(f"{path} measured {', '.join(results['mean'])}, not {system!r}. Name it in the card's YAML.")
    fused = system + FUSED if system + FUSED in results["mean"] else None
    low, high = results["mean"][system]["interval"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "unclear"
    return {
        **results,
        "system": system,
        "verdict": verdict,  # beside the first stage, by the 95% interval
        "table": results_table(results, [WORDS, FIRST_STAGE, system, fused]),
        "way": means_table(results),
        "own": results["mean"][system],
        "fused": results["mean"][fused] if fused else None,
        "metrics": sorted({metric_name(entry["metric"]) for entry in results["sets"].values()}),
        "sampled": results["settings"].get("max_queries"),
        "candidates": results["settings"]["top_k"],
    }


def results_table(results: dict, systems: list[str | None]) -> str:
    """The sets' scores in Markdown, times 100, for these systems; None and those that were not measured left out."""
    shown = [system for system in systems if system and system in results["mean"]]
    names = {FIRST_STAGE: "first stage", WORDS: WORDS}
    own = next(system for system in shown if system not in names)
    header = [names.get(system, system.replace(own, "**this model**")) for system in shown]
    rows = [["set", "score", "queries", *header]]
    for name, entry in results["sets"].items():
        scores = [f"{entry['scores'][system]:.1f}" for system in shown]
        rows.append([name, metric_name(entry["metric"]), str(entry["queries"]), *scores])
    rows.append(["mean", "", "", *(f"{results['mean'][system]['score']:.1f}" for system in shown)])
    rows.append(["gain over the first stage", "", "", *(gain(results["mean"][s]) for s in shown)])
    return markdown(rows)


def means_table(results: dict) -> str:
    """Every system that was measured: the mean over the sets, and the gain over the first stage."""
    rows = [["system", "mean", "gain over the first stage"]]
    for system, mean in results["mean"].items():
        name = "first stage" if system == FIRST_STAGE else system
        rows.append([name, f"{mean['score']:.1f}", gain(mean)])
    return markdown(rows)


def gain(mean: dict) -> str:
    low, high = mean["interval"]
    return "" if low == high == 0 else f"{mean['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"


def speed_table(model: str) -> str:
    """Pairs per second of the benchmark's rows of `model`, a row per way, a column per work; "" if there are none."""
    if not SPEED.is_file():
        return ""
    measured = json.loads(SPEED.read_text(encoding="utf-8"))
    rows = [row for row in measured["rows"] if row["model"] == model]
    if not rows:
        return ""
    works = list(dict.fromkeys(row["work"] for row in rows))
    rates = {(row["work"], row["way"]): f"{row['pairs_per_second']:.0f}" for row in rows}
    table = [["way", *works]]
    table += [[way, *(rates.get((work, way), "") for work in works)] for way in dict.fromkeys(r["way"] for r in rows)]
    machine = measured["machine"]
    about = f"{machine['cpu']}, {machine['threads']} threads, {rows[0]['dtype']} where no other is named"
    return f"{markdown(table)}\n\nPairs per second ({about}, torch {machine['torch']})."


def precision_table() -> str:
    """nDCG@10 over the judged sets of the released Nano in each precision; "" if it was not measured."""
    if not PRECISION.is_file():
        return ""
    measured = json.loads(PRECISION.read_text(encoding="utf-8"))
    sets = measured["sets"].values()
    table = [["precision", "nDCG@10", "difference [95% interval]"]]
    for way in ("float32", *measured["over_float32"]):
        mean = sum(found[way] for found in sets) / len(sets)
        over = measured["over_float32"].get(way)
        table.append([way, f"{mean:.1f}", gain(over) if over else ""])
    queries = sum(found["queries"] for found in sets)
    return f"{markdown(table)}\n\nMean of {len(sets)} development sets, {queries} queries."


def evaluations(measured: dict | None, about: dict) -> list[EvalResult]:
    """What was measured here. A set that is not on the Hub stands under its own name."""
    if not measured:
        return []
    return [
        EvalResult(
            task_type="text-ranking",
            dataset_type=about.get("sets", {}).get(name, name),
            dataset_name=name,
            dataset_config=name,  # else the Hub's form takes all results on one data set for metrics of one result
            dataset_args={"queries": entry["queries"], "candidates": measured["candidates"]},
            metric_type=entry["metric"],
            metric_name=metric_name(entry["metric"]),
            metric_value=entry["scores"][measured["system"]],
        )
        for name, entry in measured["sets"].items()
    ]


def statements(published: dict | None, about: dict) -> list[EvalResult]:
    """What the publishers state of a member, but for what is known to be inflated."""
    if not published:
        return []
    member, source = about["published"], published["source"]
    return [
        EvalResult(
            task_type="text-ranking",
            dataset_type=result["dataset"],
            dataset_name=name,
            metric_type=result["metric"],
            metric_name=metric_name(result["metric"]),
            metric_value=result["values"][member],
            source_name=source["name"],
            source_url=source["url"],
        )
        for name, result in published["results"].items()
        if member not in result.get("inflated", [])
    ]


def published_table(published: dict) -> str:
    systems = published["systems"]
    rows = [["set", "score", *systems.values()]]
    for name, result in published["results"].items():
        values, inflated = result["values"], result.get("inflated", [])
        cells = [f"{values[s]:.2f}{'†' * (s in inflated)}" if s in values else "" for s in systems]
        rows.append([name, metric_name(result["metric"]), *cells])
    return markdown(rows)


def read_merge(folder: Path) -> dict | None:
    path = folder / MERGE_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def metric_name(metric: str) -> str:
    return metric.replace("ndcg", "nDCG").replace("_at_", "@")


def millions(number: int) -> str:
    return f"{number / 1e6:.0f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def markdown(rows: list[list[str]]) -> str:
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
