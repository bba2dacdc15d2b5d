"""From measured values per query to the tables: means over sets, gains with intervals, Markdown."""

import numpy as np
from scipy.stats import bootstrap

BASE = "retriever"
SAMPLES = 2000


def mean_and_interval(sets: dict[str, dict], seed: int) -> dict[str, dict]:
    """Per system the mean over sets, and over the retriever its gain with a 95% paired bootstrap interval, times 100.

    Queries are drawn anew within each part of a set (Sakai 2006); sets and parts are not. A set is the mean of its
    parts, a part the mean of its queries.
    """
    summary = {}
    for system in next(iter(sets.values()))["scores"]:
        weights, gains = [], []
        for entry in sets.values():
            base, values = entry["per_query"][BASE], entry["per_query"][system]
            for part in values:
                weights.append(1 / (len(sets) * len(values)))
                gains.append(np.array([value - base[part][query] for query, value in values[part].items()]))
        gain = sum(weight * x.mean() for weight, x in zip(weights, gains, strict=True))
        interval = interval_of_mean(gains, weights, seed) if system != BASE else (0.0, 0.0)
        summary[system] = {
            "score": round(float(np.mean([entry["scores"][system] for entry in sets.values()])), 2),
            "gain": round(100 * float(gain), 2),
            "interval": [round(100 * float(x), 2) for x in interval],
        }
    return summary


def interval_of_mean(samples: list[np.ndarray], weights: list[float], seed: int) -> tuple[float, float]:
    """95% percentile interval of the weighted sum of the samples' means, each sample drawn from by itself."""

    def weighted(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return np.sum([weight * x.mean(axis=axis) for weight, x in zip(weights, drawn, strict=True)], axis=0)

    # scipy wants two values at least; of the same value twice, every draw has the same mean.
    samples = [x if len(x) > 1 else np.repeat(x, 2) for x in samples]
    found = bootstrap(
        samples, weighted, n_resamples=SAMPLES, batch=100, vectorized=True, method="percentile", rng=seed
    ).confidence_interval
    return float(found.low), float(found.high)


def display(metric: str) -> str:
    return metric.replace("ndcg", "nDCG").replace("_at_", "@")


def table(results: dict) -> str:
    """The sets' scores times 100 in Markdown, a column per system, then the means and the gains over the retriever."""
    systems = list(results["mean"])
    lines = ["| set | score | queries | " + " | ".join(systems) + " |", "|---" * (len(systems) + 3) + "|"]
    for name, entry in results["sets"].items():
        values = " | ".join(f"{entry['scores'][system]:.1f}" for system in systems)
        lines.append(f"| {name} | {display(entry['metric'])} | {entry['queries']} | {values} |")
    mean = results["mean"]
    lines.append("| **mean** | | | " + " | ".join(f"**{mean[system]['score']:.1f}**" for system in systems) + " |")
    gains = []
    for system in systems:
        low, high = mean[system]["interval"]
        gains.append(f"{mean[system]['gain']:+.1f} [{low:+.1f}, {high:+.1f}]" if system != BASE else "")
    lines.append("| gain over the first stage (95%) | | | " + " | ".join(gains) + " |")
    return "\n".join(lines) + "\n"
