"""Peak memory and speed of mining and of the candidate stages as the corpus grows.

    python -m tests.bench.bench_corpus --output tests/bench/results/corpus.json

- `mine, crops`: `recipes.mine` with the crop generator; 5,000 documents are asked, whatever the corpus has.
- `candidates, vectors`: `recipes.score` with a bi-encoder as retriever and teacher.
- `candidates, BM25`: `recipes.score` with BM25 as retriever and a cross-encoder as teacher.

Documents are made up, some 30 words each, and 256 queries are asked of them. The models are tiny and random, so that a
million documents take minutes: the rates are those of everything but the model. Each stage and size runs in a process
of its own; `peak_mib` is its largest resident set and `imports_mib` the part that it has before any document is read.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.machine import machine, peak_mib

SIZES = (10_000, 100_000, 1_000_000)
QUERIES, ASKED = 256, 5_000
NOUNS = ["harbour", "lantern", "orchard", "bridge", "violin", "glacier", "market", "candle", "compass", "ferry"]
NOUNS += ["garden", "quarry", "mill", "tower", "kettle"]
VERBS = ["keeps", "repairs", "paints", "visits", "measures", "carries", "opens", "closes", "follows", "forgets"]
PLACES = ["by the old river", "near the northern gate", "under a slate roof", "behind the school", "on the windy hill"]


def document(number: int) -> str:
    """Four sentences, the same in every run; the number makes the document one of its kind."""
    rng = random.Random(number)
    sentences = [
        f"The {rng.choice(NOUNS)} keeper {rng.choice(VERBS)} the {rng.choice(NOUNS)} {rng.choice(PLACES)}."
        for _ in range(3)
    ]
    return " ".join([f"In the year {number} somebody {rng.choice(VERBS)} a {rng.choice(NOUNS)}.", *sentences])


def write_folder(folder: Path, documents: int) -> None:
    """A BEIR folder, written line by line."""
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for number in range(documents):
            file.write(json.dumps({"_id": f"d{number}", "title": "", "text": document(number)}) + "\n")
    step = documents // QUERIES
    queries = [{"_id": f"q{n}", "text": document(n * step).split(". ")[1]} for n in range(QUERIES)]
    lines = [json.dumps(query | {"text": f"{query['text']} {n}"}) for n, query in enumerate(queries)]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    judged = [f"q{n}\td{n * step}\t1" for n in range(QUERIES)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")


def mine_crops(folder: Path, scratch: Path) -> Callable[[], None]:
    from recipes.mine import MineArguments, main

    args = MineArguments(
        documents=str(folder),
        output_dir=str(scratch / "mined"),
        generators=[{"kind": "crop"}],
        sample=ASKED,
        round_trip_top_k=0,
    )
    return lambda: main(args)


def candidates(folder: Path, scratch: Path, **changes) -> Callable[[], None]:
    from recipes.score import ScoreArguments, main

    args = ScoreArguments(
        output=str(scratch / "scored.parquet"),
        targets={"made up": {"folders": [str(folder)]}},
        top_k=20,
        passages_per_document=1,
        batch_size=64,
        **changes,
    )
    return lambda: main(args)


def candidates_vectors(folder: Path, scratch: Path) -> Callable[[], None]:
    from tests.recipes.folders_for_tests import tiny_retriever

    return candidates(folder, scratch, teachers=[{"model": str(tiny_retriever(scratch / "model"))}])


def candidates_bm25(folder: Path, scratch: Path) -> Callable[[], None]:
    from tests.models_for_tests import folder_of

    return candidates(folder, scratch, teachers=[{"model": str(folder_of("bert"))}], retriever="bm25")


STAGES = {"mine, crops": mine_crops, "candidates, vectors": candidates_vectors, "candidates, BM25": candidates_bm25}


def measure(stage: str, folder: Path, scratch: Path) -> dict:
    run = STAGES[stage](folder, scratch)
    imports, start = peak_mib(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "imports_mib": imports, "peak_mib": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="documents")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--measure", nargs=3, metavar=("STAGE", "FOLDER", "SCRATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        stage, folder, scratch = args.measure
        row = measure(stage, Path(folder), Path(scratch))
        (Path(scratch) / "row.json").write_text(json.dumps(row), encoding="utf-8")
        return
    rows = []
    for size in args.sizes:
        for stage in args.stages:
            with tempfile.TemporaryDirectory() as scratch:
                write_folder(Path(scratch) / "folder", size)
                # This process stays small: Linux counts what it holds at the fork as the child's own.
                command = [sys.executable, "-m", "tests.bench.bench_corpus", "--measure", stage]
                subprocess.run([*command, f"{scratch}/folder", scratch], check=True)
                measured = json.loads((Path(scratch) / "row.json").read_text(encoding="utf-8"))
            row = {"stage": stage, "documents": size} | {key: round(value, 1) for key, value in measured.items()}
            row["documents_per_second"] = round(size / measured["seconds"])
            rows.append(row)
            print(
                f"{stage:20} {size:9,} documents {row['documents_per_second']:8,} documents/s   "
                f"peak {row['peak_mib']:7.0f} MiB, {row['imports_mib']:5.0f} of them before the first document",
                flush=True,
            )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
