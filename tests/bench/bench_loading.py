"""From the start of a process to its first score, and the memory that it takes, beside the size of the weights.

    python -m tests.bench.bench_loading --output tests/bench/results/loading.json

Each way runs in a new process, the files in the system's cache. `peak_over_weights` is the largest resident set, less
what the imports take (`imports_mib`), by the size of the weights; a page of the file that is mapped counts as one of
the process. The whole models are made with random weights (`shapes.py`): 4B needs 9 GB of disk, A0.4B 10 GB, and as
much memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.bench.machine import machine, own_mib, peak_mib

QUERY, DOCUMENT = "Why does the sea rise twice a day?", "The Moon pulls on the water."
WAYS = ("pipeline", "CrossEncoder")


def first_score(way: str, folder: Path, started: float) -> dict:
    import torch

    from tests.bench import ways

    loaders = {"pipeline": ways.querit, "CrossEncoder": partial(ways.cross_encoder, batch_size=32)}
    if way == "pipeline":
        from transformers import pipeline  # noqa: F401
    else:
        from sentence_transformers import CrossEncoder  # noqa: F401
    imports, imported = peak_mib(), time.time()
    run = loaders[way](folder, torch.bfloat16)
    loaded = time.time()
    run([(QUERY, [DOCUMENT])])
    done = time.time()
    seconds = {"imports": imported - started, "load": loaded - imported, "score": done - loaded}
    return {"seconds": seconds, "imports_mib": imports, "peak_mib": peak_mib(), "own_mib": own_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--models", nargs="+", default=["nano", "4B", "A0.4B"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FOLDER", "STARTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        from tests.bench import shapes

        shapes.write_folder(Path(args.make[1]), {"4B": shapes.config_4b, "A0.4B": shapes.config_a04b}[args.make[0]]())
        return
    if args.measure:
        way, folder, started = args.measure
        print(json.dumps(first_score(way, Path(folder), float(started))))
        return
    this = [sys.executable, "-m", "tests.bench.bench_loading"]
    rows = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"
            if model != "nano":
                folder = Path(scratch) / "model"
                subprocess.run([*this, "--make", model, str(folder)], check=True)
            weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
            measured: dict[str, list[dict]] = {way: [] for way in WAYS}
            for _ in range(args.repeats + 1):  # the first fills the system's cache of files
                for way in WAYS:
                    command = [*this, "--measure", way, str(folder), str(time.time())]
                    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    measured[way].append(json.loads(printed.splitlines()[-1]))
            for way, turns in measured.items():
                seconds = {
                    key: round(statistics.median(turn["seconds"][key] for turn in turns[1:]), 2)
                    for key in turns[0]["seconds"]
                }
                peak, imports = (max(turn[key] for turn in turns) for key in ("peak_mib", "imports_mib"))
                row = {"model": model, "way": way, "weights_mib": round(weights), "imports_mib": round(imports)}
                row |= {"own_mib": round(max(turn["own_mib"] for turn in turns))}
                row |= {"peak_mib": round(peak), "peak_over_weights": round((peak - imports) / weights, 2)}
                rows.append(row | {"seconds": seconds | {"whole": round(sum(seconds.values()), 2)}})
                print(rows[-1], flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
