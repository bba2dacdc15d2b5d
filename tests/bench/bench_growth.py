"""Time and memory as the work grows: documents of one query, and tokens of a document.

    python -m tests.bench.bench_growth --output tests/bench/results/growth.json

- `documents`: the released Nano ranks 10 to 10,000 passages of 60 to 250 tokens.
- `tokens`: four layers of Qwen3-0.6B's shape with random weights score 8 documents of 64 to 4,096 tokens.

Beside the pipeline runs sentence-transformers' CrossEncoder with its defaults. Each size and way has a process of its
own; `working_mib` is its largest resident set less what it holds when the model is loaded and has scored two pairs. A
plot of the same name, `.svg`, is drawn beside the JSON.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from tests.bench.bench_scoring import Way, Work, requests_of
from tests.bench.machine import machine

DOCUMENTS = (10, 100, 1_000, 10_000)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)


def series(folder: Path, dtype, works: dict[int, Work], most: dict[str, int]) -> list[dict]:
    from tests.bench import ways

    loaders = {
        "pipeline": partial(ways.querit, folder, dtype),
        "CrossEncoder": partial(ways.cross_encoder, folder, dtype, batch_size=32),
    }
    rows = []
    for size, work in works.items():
        requests = requests_of(work, folder)
        for name, load in loaders.items():
            if size > most.get(name, size):
                continue
            way = Way(load)
            before = way.measure([(requests[0][0][:100], ["one", "two"])]).peak_mib
            measured = way.measure(requests)
            way.pool.shutdown()
            row = {"size": size, "way": name, "seconds": round(measured.seconds, 3)}
            rows.append(row | {"working_mib": round(max(0.0, measured.peak_mib - before))})
            print(rows[-1], flush=True)
    return rows


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "querit"  # the same bytes for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    labels = {"documents": "documents of a query", "tokens": "tokens of a document"}
    for column, (name, label) in enumerate(labels.items()):
        for row, (key, unit) in enumerate((("seconds", "seconds"), ("working_mib", "working memory, MiB"))):
            axis = axes[row][column]
            for way in dict.fromkeys(found["way"] for found in results[name]):
                points = [(found["size"], found[key]) for found in results[name] if found["way"] == way]
                axis.plot(*zip(*points, strict=True), marker="o", label=way)
            axis.set(xscale="log", xlabel=label, ylabel=unit)
            if key == "seconds":
                axis.set_yscale("log")
            axis.set_ylim(bottom=0 if key != "seconds" else None)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()

    import torch

    from modeling_querit.scoring_querit import fastest_cpu_dtype
    from tests.bench import shapes

    dtype = fastest_cpu_dtype()
    passages = {count: Work(12, 60, 250, count) for count in DOCUMENTS}
    results = {"machine": machine() | {"dtype": str(dtype).removeprefix("torch.")}}
    results["documents"] = series(shapes.NANO, dtype, passages, {"CrossEncoder": 1_000})
    with tempfile.TemporaryDirectory() as scratch:
        folder = shapes.write_folder(Path(scratch) / "model", shapes.config_06b(layers=4))
        lengths = {tokens: Work(12, tokens - 40, tokens - 40, 8) for tokens in TOKENS}
        results["tokens"] = series(folder, torch.bfloat16, lengths, {})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
