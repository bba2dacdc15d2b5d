"""Releases as `querit build` makes them, of the tiny models and of the released Nano: made once, for reading only."""

from functools import cache
from pathlib import Path

import yaml

from hub_card.build import build
from hub_card.card import TEMPLATES, render
from tests.models_for_tests import KINDS, SCRATCH, folder_of

ROOT = Path(__file__).parents[2]
NANO = ROOT / "hub_card" / "querit-reranker-nano"
DEV = ROOT / "recipes" / "querit-nano" / "results" / "dev"
CARDS = {"qwen3": "querit-reranker-4b", "deepseek_v3": "querit-reranker-a0.4b", "nano": "querit-reranker-nano"}
SYSTEM = yaml.safe_load((TEMPLATES / "querit-reranker-nano.yaml").read_text())["system"]  # of the results: Nano
BUILT = [*KINDS, "nano"]  # bert: with the card that any model gets
LENGTH = 256  # tokens of a pair of the tiny ones


@cache
def built(kind: str) -> Path:
    source, card = NANO if kind == "nano" else folder_of(kind), CARDS.get(kind)
    results = DEV if kind == "nano" else None
    folder = SCRATCH / "built" / (card or kind)
    return build(source, folder, lambda made: render(made, card, results), None if kind == "nano" else LENGTH)


def by_index(results: list[dict], key: str = "score") -> list[float]:
    return [result[key] for result in sorted(results, key=lambda result: result["index"])]
