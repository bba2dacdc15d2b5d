"""Pairs per second of the pipeline beside other ways to score the same pairs, in one run.

    python -m tests.bench.bench_scoring --output tests/bench/results/scoring.json

- `pipeline`: this package, as a user calls it.
- `CrossEncoder`: sentence-transformers on the same folder, its defaults but the same dtype.
- `padded wrapper`: one pair after another padded to 4,095 tokens with a dense 4-D mask, as the first published wrapper
  does (mteb's QueritWrapper itself on the causal model; BERT's positions end at 512, so Nano cannot be padded so).

Models: the released Nano, and a causal one of Qwen3's architecture with random weights, small enough to be padded.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from transformers import pipeline

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"
WORDS = ["the", "tide", "rises", "twice", "a", "day", "because", "moon", "pulls", "on", "near", "side", "of", "earth", "more", "strongly", "than", "far", "sea", "falls"]


def texts(count: int, shortest: int, longest: int) -> list[str]:
    """Documents of mixed lengths in words, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(n)) for i, n in enumerate(lengths)]


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()  # warm-up
    measured = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nano", type=Path, default=NANO)
    args = parser.parse_args()
    query = "why does the sea rise and fall twice a day"
    rows = []

    def compare(model: str, work: str, documents: int, ways: dict[str, tuple[Callable[[], object], int]]) -> None:
        rate = {way: pairs / seconds(run, args.repeats) for way, (run, pairs) in ways.items()}
        for way, value in rate.items():
            ratio = rate["pipeline"] / value
            rows.append(
                {
                    "model": model,
                    "work": work,
                    "way": way,
                    "pairs_per_second": round(value, 2),
                    "pipeline_is": round(ratio, 2),
                }
            )
            print(f"{model:6} {work:28} {way:16} {value:10.1f} pairs/s   pipeline is {ratio:7.2f} x", flush=True)

    ranker = pipeline("text-ranking", model=str(args.nano), trust_remote_code=True)
    encoder = CrossEncoder(str(args.nano), model_kwargs={"dtype": ranker.model.dtype})
    for work, shortest, longest in (("short, 10-30 words", 10, 30), ("mixed, 10-250 words", 10, 250)):
        documents = texts(128, shortest, longest)
        compare("nano", work, 128, {
            "pipeline": (lambda d=documents: ranker(query, d), 128),
            "CrossEncoder": (lambda d=documents: encoder.predict([(query, t) for t in d]), 128),
        })  # fmt: skip

    if args.output:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
