"""tests/bench/results/README.md from the results beside it: run it after a benchmark.

python -m tests.bench.report
"""

import json
from pathlib import Path

from hub_card.card import markdown, precision_table

RESULTS = Path(__file__).parent / "results"
NOTHING_SHARED = "long documents"
TITLES = {
    "nano": "Nano, the released weights",
    "0.6B": "Qwen3-0.6B's shape",
    "4B": "Querit-Reranker-4B's shape",
    "A0.4B": "Querit-Reranker-A0.4B's shape, a mixture of experts",
    "dense 0.4B": "a dense model that multiplies each token by as many weights as A0.4B",
}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def described(machine: dict) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, torch {machine['torch']}"


def scoring() -> str:
    measured = read("scoring")
    parts = []
    for model in dict.fromkeys(row["model"] for row in measured["rows"]):
        rows = [row for row in measured["rows"] if row["model"] == model]
        layers = f", {measured['layers'][model]} layers" if model in measured["layers"] else ""
        works = list(dict.fromkeys(row["work"] for row in rows))
        table = [["way", *works]]
        for way in dict.fromkeys(row["way"] for row in rows):
            found = {row["work"]: row for row in rows if row["way"] == way}
            table.append([way, *(cell(found[work]) if work in found else "" for work in works)])
        ours = {row["work"]: row for row in rows if row["way"] == "pipeline"}
        table.append(["pipeline: share of the limit", *(f"{ours[work]['share_of_limit']:.0%}" for work in works)])
        table.append(["pipeline over the best CrossEncoder", *(f"{over_best(rows, work):.2f} x" for work in works)])
        parts.append(f"### {TITLES[model]}{layers}\n\n{markdown(table)}")
    dtype = measured["rows"][0]["dtype"]
    limits = [row["limit_gflops"] for row in measured["rows"]]
    head = (
        f"Pairs per second; in brackets, how many times as fast the pipeline is; the largest resident set in MiB. "
        f"{described(measured['machine'])}, "
        f"{dtype} where no other is named; the limit, one large matrix product, was {min(limits):.0f} to "
        f"{max(limits):.0f} Gflop/s. The weights of slices are random."
    )
    return "\n\n".join([head, *parts])


def cell(row: dict) -> str:
    rate = f"{row['pairs_per_second']:.3g}"
    ratio = "" if row["way"] == "pipeline" else f" ({row['pipeline_is_x_times']:.2f} x)"
    return f"{rate}{ratio}, {row['peak_mib']:,.0f}"


def noise() -> str:
    """Where next to nothing is shared, the pipeline runs the same code with and without sharing; "" without rows."""
    same = [
        row for row in read("scoring")["rows"] if (row["way"], row["work"]) == ("pipeline, no sharing", NOTHING_SHARED)
    ]
    if not same:
        return ""
    told = ", ".join(f"{row['pipeline_is_x_times']:.2f} x ({row['least']:.2f} to {row['most']:.2f})" for row in same)
    return (
        f"How far chance goes: on {NOTHING_SHARED} the pipeline shares next to nothing: it is the same code with "
        f"and without sharing. Beside itself it was {told}, in brackets the rounds' own."
    )


def over_best(rows: list[dict], work: str) -> float:
    """How many times as fast the pipeline is as CrossEncoder at its best batch size."""
    peers = [row for row in rows if row["work"] == work and row["way"].startswith("CrossEncoder")]
    return min(row["pipeline_is_x_times"] for row in peers)


def mixture() -> str:
    """Time of the mixture by that of the dense model, for the same number of operations that useful tokens need.

    Per operation, since of a slice of either not the same share is the wider first layer or attention. "" where either
    was not measured.
    """
    shares = {
        (row["model"], row["work"]): row["share_of_limit"] * row["limit_gflops"]
        for row in read("scoring")["rows"]
        if row["way"] == "pipeline"
    }
    works = [work for model, work in shares if model == "dense 0.4B" and ("A0.4B", work) in shares]
    if not works:
        return ""
    told = ", ".join(f"{shares['dense 0.4B', work] / shares['A0.4B', work]:.2f} x on {work}" for work in works)
    return f"The mixture takes, beside the dense model of its active size, per useful operation: {told}."


def growth() -> str:
    measured = read("growth")
    parts = [f"![time and memory as the work grows](growth.svg)\n\n{described(measured['machine'])}."]
    for name, label in (("documents", "documents of a query"), ("tokens", "tokens of a document")):
        ways = list(dict.fromkeys(row["way"] for row in measured[name]))
        table = [[label, *(f"{way}: {unit}" for way in ways for unit in ("s", "MiB"))]]
        for size in dict.fromkeys(row["size"] for row in measured[name]):
            found = {row["way"]: row for row in measured[name] if row["size"] == size}
            empty = {"seconds": "", "working_mib": ""}
            cells = [str(found.get(way, empty)[key]) for way in ways for key in ("seconds", "working_mib")]
            table.append([f"{size:,}", *cells])
        parts.append(markdown(table))
    return "\n\n".join(parts)


def loading() -> str:
    measured = read("loading")
    header = "model|way|weights, MiB|peak over imports / weights|own, MiB|imports, s|load, s|first score, s"
    table = [header.split("|")]
    for row in measured["rows"]:
        seconds = row["seconds"]
        times = [f"{seconds[key]:.1f}" for key in ("imports", "load", "score")]
        memory = [str(row["weights_mib"]), f"{row['peak_over_weights']:.2f}", str(row["own_mib"])]
        table.append([row["model"], row["way"], *memory, *times])
    return f"{described(measured['machine'])}.\n\n{markdown(table)}"


def corpus() -> str:
    measured = read("corpus")
    table = [["stage", "documents", "documents per second", "peak, MiB", "of them before the first document"]]
    for row in measured["rows"]:
        rate, peak = f"{row['documents_per_second']:,}", f"{row['peak_mib']:.0f}"
        table.append([row["stage"], f"{row['documents']:,}", rate, peak, f"{row['imports_mib']:.0f}"])
    return f"{described(measured['machine'])}.\n\n{markdown(table)}"


def precision() -> str:
    return f"nDCG@10 of the released Nano on {len(read('precision')['sets'])} judged sets.\n\n{precision_table()}"


def space() -> str:
    measured = read("space")
    load = measured["load"]
    table = [
        ["what", "value"],
        ["start to first page, s", str(measured["start_to_first_page_s"])],
        ["first ranking of 20 documents, s", str(measured["first_ranking_of_20_s"])],
        ["later ones, median, s", str(measured["ranking_of_20_median_s"])],
        [f"{load['users']} users for {load['seconds']:.0f} s: requests", str(load["requests"])],
        ["... of them wrong, lost", f"{load['wrong']}, {load['lost']}"],
        ["... median and 95th percentile, s", f"{load['median_s']}, {load['p95_s']}"],
    ]
    return markdown(table)


SECTIONS = [
    ("Scoring", "scoring", lambda: "\n\n".join(filter(None, [scoring(), mixture(), noise()]))),
    ("As the work grows", "growth", growth),
    ("From the start to the first score", "loading", loading),
    ("Mining and scoring as the corpus grows", "corpus", corpus),
    ("What a lower precision costs", "precision", precision),
    ("The Space under load", "space", space),
]


def report() -> str:
    """A section for each benchmark that has results."""
    parts = [
        "# Benchmarks\n\n`make bench` measures this again and writes this page from the "
        "JSON beside it; `bench_precision`, which wants judged sets, is run by hand."
    ]
    for title, name, make in SECTIONS:
        if (RESULTS / f"{name}.json").exists():
            parts.append(f"## {title} (`bench_{name}`)\n\n{make()}")
    parts.append((Path(__file__).parent / "notes.md").read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (RESULTS / "README.md").write_text(report(), encoding="utf-8")
