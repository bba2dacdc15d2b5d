"""Whether an adapted model is better than it was, by queries held aside: the numbers, the words, the card."""

from pathlib import Path
from typing import Any

import numpy as np

from recipes.lib.budget import FEWEST_JUDGED
from recipes.lib.results import BASE, interval_of_mean

CEILING = 97.0  # nDCG@10 before, from which on nothing that could be gained would be seen
GENERATOR = "a --generator that is a language model asks what people ask"


def values(results: dict, system: str) -> dict[str, float]:
    """Query -> nDCG@10 in [0, 1] of a system on the one set that was measured."""
    (entry,) = results["sets"].values()
    (found,) = entry["per_query"][system].values()
    return found


def compare(before: dict[str, float], after: dict[str, float], seed: int) -> tuple[float, float, float]:
    """Mean gain of after over before in points, and its 95% bootstrap interval, paired by query."""
    gains = np.array([after[query] - before[query] for query in before])
    low, high = interval_of_mean([gains], [1.0], seed)
    return round(100 * float(gains.mean()), 2), round(100 * low, 2), round(100 * high, 2)


def mean(found: dict[str, float]) -> float:
    return round(100 * sum(found.values()) / len(found), 2)


def no_use(before: dict, teacher: str | None, seed: int) -> str | None:
    """Why training cannot help, by what the model and the system that is its teacher score before; None if it may."""
    general = values(before, "general")
    if mean(general) >= CEILING:
        return (
            f"The model already has an nDCG@10 of {mean(general):.1f} on {len(general)} such queries of documents "
            f"held aside: more of them would teach it nothing. Harder ones might: {GENERATOR}."
        )
    if teacher is None:
        return None
    taught = values(before, teacher)
    _, _, high = compare(general, taught, seed)
    if high <= 0:
        return (
            f"The teacher ranks no better than the model: {mean(taught):.1f} against {mean(general):.1f} nDCG@10 on "
            f"{len(general)} queries of documents held aside. Name a stronger one with --teacher; {GENERATOR}."
        )
    return None


def judge(before: dict, after: dict, seed: int) -> dict[str, Any]:
    general, merged = values(before, "general"), values(after, "merged")
    gain, low, high = compare(general, merged, seed)
    return {
        "queries": len(general),
        "ndcg@10": {"retriever": mean(values(before, BASE)), "general": mean(general), "merged": mean(merged)},
        "gain": gain,
        "interval": [low, high],
        "better": low > 0 and len(general) >= FEWEST_JUDGED,
    }


def in_words(verdict: dict, output: str) -> str:
    if why := verdict.get("not_tried"):
        return f"Not trained. {why} {output} holds the model as it was."
    points = verdict["ndcg@10"]
    low, high = verdict["interval"]
    facts = (
        f"On {verdict['queries']} queries of documents held aside, nDCG@10 is {points['merged']:.1f} after adaptation "
        f"and {points['general']:.1f} before ({verdict['gain']:+.1f}; 95% interval {low:+.1f} to {high:+.1f}). "
        f"The first stage by itself has {points['retriever']:.1f}."
    )
    if verdict["better"]:
        return f"Better. {facts} {output} holds the adapted model."
    if verdict["queries"] < FEWEST_JUDGED:
        return f"Too few queries to tell. {facts} {output} holds the model as it was."
    worse = "Worse" if high < 0 else "No clear gain"
    return f"{worse}. {facts} {output} holds the model as it was."


def public_name(model: str) -> str:
    """A folder's own name, not where it lies on somebody's machine; a Hub id as it is."""
    return Path(model).name if Path(model).exists() else model


def card(model: str, output: str, how: str, verdict: dict, tables: list[str]) -> str:
    """README.md of the output. `how` says what was made of which documents, and by whom."""
    name, given = Path(output).name, public_name(model)
    origin = f"{given}, adapted by `querit adapt`: {how}" if verdict["better"] else f"{given} as it was. Tried: {how}"
    shown = "\n".join(tables)
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-ranking
tags: [reranker, cross-encoder, custom_code, sentence-transformers]
---

# {name}

{origin}

{in_words(verdict, name)}
The queries that judged were written in the same way as those of the training; people's own may be different.

{shown}
"""
