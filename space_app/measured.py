"""What the released model scored beside its first stage: from the results in recipes/, or a Space's summary of them."""

import json
from dataclasses import asdict, dataclass
from importlib import resources

import yaml

import querit

RESULTS = "querit-nano/results/dev/results.json"  # of recipes.evaluate
KEPT = "measured.json"
FIRST_STAGE, WORDS, FUSED = "retriever", "BM25", " + first stage"  # as recipes names them


@dataclass(frozen=True)
class Measured:
    """Mean nDCG@10, times 100, of each system over the judged sets."""

    systems: list[tuple[str, float]]  # in the order shown: (name, score)
    sets: int
    queries: int
    candidates: int  # of the first stage, reranked for each query


def measured() -> Measured | None:
    """None where the results are not at hand, or are of another form."""
    kept = resources.files("space_app") / KEPT
    if kept.is_file():
        return Measured(**json.loads(kept.read_text(encoding="utf-8")))
    try:
        path = resources.files("recipes") / RESULTS
        return summary(json.loads(path.read_text(encoding="utf-8")), released_system())
    except (ModuleNotFoundError, FileNotFoundError, KeyError, IndexError, TypeError):
        return None


def released_system() -> str | None:
    """What the results call the release; the facts of its card say so."""
    card = resources.files("hub_card") / "templates" / f"{querit.HUB_ID.rpartition('/')[2]}.yaml"
    return yaml.safe_load(card.read_text(encoding="utf-8")).get("system")


def summary(results: dict, system: str | None = None) -> Measured:
    """Of `results.json`; the system is the last one measured if it is not named, as for a card."""
    means, settings = results["mean"], results["settings"]
    system = system or [*settings["models"]][-1]
    names = {
        WORDS: "BM25, a keyword search",
        FIRST_STAGE: "First stage, an embedding model",
        system: "Nano, reranking the first stage",
        system + FUSED: "Nano and the first stage together",
    }
    return Measured(
        systems=[(shown, means[name]["score"]) for name, shown in names.items() if name in means],
        sets=len(results["sets"]),
        queries=sum(entry["queries"] for entry in results["sets"].values()),
        candidates=settings["top_k"],
    )


def as_json(found: Measured) -> str:
    return json.dumps(asdict(found), indent=1)
