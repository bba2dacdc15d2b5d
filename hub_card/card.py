"""The card of a release, README.md: from its template, with numbers from the folder and from result files only.

A member of the family has two files in templates/: `<name>.yaml`, the metadata and where its facts stand, and
`<name>.md.jinja`, what its card says beyond card.md.jinja, which all share. Other models get that one alone.
"""

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hub_card.convert import CHAT_TEMPLATE, read_headers, weight_files
from hub_card.engines import OLDEST_FOR_BERT, OLDEST_FOR_OTHERS
from hub_card.lineage import data_sets, stages_of, training_table
from hub_card.provenance import RELIABILITY, merges_of
from modeling_querit.modeling_querit import OLDEST_TRANSFORMERS

TEMPLATES = Path(__file__).parent / "templates"
RECIPES = Path(str(resources.files("recipes")))  # their YAML files are in the wheel, too
SPEED = RECIPES.parent / "tests" / "bench" / "results" / "scoring.json"  # of a checkout; a wheel has none
PRECISION = SPEED.with_name("precision.json")
SHARED = "card.md.jinja"
FEWEST_PAIRS = 20
FIRST_STAGE, WORDS, FUSED = "retriever", "BM25", " + first stage"  # systems, as recipes.lib.results names them
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
    stages = stages_of(RECIPES / about["recipe"], about["released"]) if "released" in about else []
    sources = sources_of(data_sets(stages), about.get("data", []))
    hub_ids = sorted({source["hub"] for source in sources if "hub" in source})
    told = facts(folder)
    evaluated = evaluations(measured, about) + statements(published, about)
    data = ModelCardData(
        **{**METADATA, **about.get("metadata", {}), **({"datasets": hub_ids} if hub_ids else {})},
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
        hub_id=about.get("hub_id", f"YOUR-NAME/{name}"),
        **told,
        oldest=OLDEST_FOR_BERT if told["model_type"] == "bert" else OLDEST_FOR_OTHERS,
        oldest_for_code=OLDEST_TRANSFORMERS,
        measured=measured,
        speed=speed_table(about["speed"]) if "speed" in about else "",
        precision=precision_table() if "speed" in about else "",
        merges=merges_of(folder),
        recipe=about.get("recipe"),
        published=published and {**published, "table": published_table(published)},
        own=published["members"][about["published"]] if published else None,
        sources=sources_table(sources),
        by_language=languages_table(measured, about["languages"]) if measured and "languages" in about else "",
        reliability=reliability_table(folder / RELIABILITY),
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
        "behind": [name for name, x in results["sets"].items() if x["scores"][system] < x["scores"][FIRST_STAGE]],
        "fused": results["mean"][fused] if fused else None,
        "fused_system": fused,
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


def languages_table(measured: dict, languages: dict[str, str]) -> str:
    """Means over the sets of each language, or of question's and documents' language, in Markdown."""
    shown = [FIRST_STAGE, measured["system"], *([measured["fused_system"]] if measured["fused_system"] else [])]
    rows = [["language", "sets", "first stage", "**this model**", "**this model** + first stage"][: 2 + len(shown)]]
    for language in dict.fromkeys(languages.values()):
        sets = [x["scores"] for name, x in measured["sets"].items() if languages.get(name) == language]
        if sets:
            means = [f"{sum(scores[system] for scores in sets) / len(sets):.1f}" for system in shown]
            rows.append([language, str(len(sets)), *means])
    return markdown(rows)


def reliability_table(path: Path) -> str:
    """What recipes.calibrate measured of the probabilities, by language; "" where that was not.

    Of fewer pairs than FEWEST_PAIRS an error by bins is chance: such languages are left out.
    """
    if not path.is_file():
        return ""
    rows = [["language", "pairs", "expected calibration error", "mean for right answers", "mean for others"]]
    for language, found in json.loads(path.read_text(encoding="utf-8")).items():
        if found["n"] < FEWEST_PAIRS:
            continue
        means = ("" if found[key] is None else f"{found[key]:.2f}" for key in ("right_mean", "wrong_mean"))
        rows.append([language, f"{found['n']:,}", f"{found['ece']:.3f}", *means])
    return markdown(rows)


def sources_of(names: list[str], known: list[dict]) -> list[dict]:
    """The entries of a card's YAML for the data sets of these names, in its order.

    Raises ValueError for a set without an entry: a card tells the licence of all that was trained on.
    """
    sources = [entry for entry in known if any(name.startswith(tuple(entry["folders"])) for name in names)]
    told = tuple(prefix for entry in known for prefix in entry["folders"])
    if unknown := [name for name in names if not name.startswith(told)]:
        raise ValueError(f"The card's YAML tells no licence of {', '.join(unknown)}. Add them under data.")
    return sources


def sources_table(sources: list[dict]) -> str:
    """What was trained on and under which licence, in Markdown; "" if nothing is known."""
    return markdown([["data", "licence"], *([s["what"], s["licence"]] for s in sources)]) if sources else ""


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
