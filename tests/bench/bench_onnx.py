"""The released Nano through the pipeline and through its ONNX exports: speed, memory, quality, in one run.

    python -m tests.bench.bench_onnx --output tests/bench/results/onnx.json \\
        --data ../shared/data/dev/wikiqa --retriever runs/querit-nano/base

- Speed: pairs per second of the pipeline in float32 and bfloat16, and over the float32 and int8 exports, on the same
  pairs, tokenisation included. Each way runs in a process of its own, warmed up, and the ways take turns; the median of
  all repeats counts. `peak_mib` is the largest resident set, `imports_mib` the part of it before the model is loaded.
- Quality, with `--data`: nDCG@10 of the pipeline in float32 and of int8 over the same candidates of judged BEIR
  folders, and the difference with its 95% paired bootstrap interval.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.bench_corpus import document, machine, peak_mib

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"
WAYS = {
    "pipeline, float32": "float32",
    "pipeline, bfloat16": "bfloat16",
    "onnx, float32": "onnx/model.onnx",
    "onnx, int8": "onnx/model_int8.onnx",
}
QUERY = "who keeps the lantern by the old river"


def work() -> dict[str, list[str]]:
    """128 documents each: of one passage of some 30 words, and of one to five."""
    return {
        "short, 30 words": [document(number) for number in range(128)],
        "mixed, 30-150 words": [
            " ".join(document(1000 * number + part) for part in range(1 + number % 5)) for number in range(128)
        ],
    }


def load_way(way: str, exported: Path):
    import torch
    from transformers import AutoTokenizer

    from hub_card.exported_onnx import load_onnx_ranker
    from modeling_querit.modeling_querit import QueritForSequenceClassification
    from modeling_querit.pipeline_querit import TextRankingPipeline

    imports = peak_mib()
    if WAYS[way].endswith(".onnx"):
        return load_onnx_ranker(exported / WAYS[way]), imports
    dtype = getattr(torch, WAYS[way])
    model = QueritForSequenceClassification.from_pretrained(NANO, dtype=dtype)
    return TextRankingPipeline(model, tokenizer=AutoTokenizer.from_pretrained(NANO), dtype=dtype, device="cpu"), imports


def measure(way: str, exported: Path, repeats: int) -> dict:
    ranker, imports = load_way(way, exported)
    seconds: dict[str, list[float]] = {}
    for name, documents in work().items():
        ranker(QUERY, documents)
        for _ in range(repeats):
            start = time.perf_counter()
            ranker(QUERY, documents)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {"seconds": seconds, "imports_mib": round(imports), "peak_mib": round(peak_mib())}


def speed(exported: Path, repeats: int, rounds: int) -> list[dict]:
    measured: dict[str, list[dict]] = {way: [] for way in WAYS}
    for way in list(WAYS) * rounds:
        # This process stays small: Linux counts what it holds at the fork as the child's own.
        command = [sys.executable, "-m", "tests.bench.bench_onnx", "--measure", way, str(exported)]
        command += ["--repeats", str(repeats)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured[way].append(json.loads(printed.splitlines()[-1]))
    rows = []
    for name, documents in work().items():
        rates = {
            way: len(documents) / statistics.median(s for found in turns for s in found["seconds"][name])
            for way, turns in measured.items()
        }
        for way, rate in rates.items():
            base = rates["pipeline, float32"]
            row = {"work": name, "way": way, "pairs_per_second": round(rate, 1), "times_float32": round(rate / base, 2)}
            row |= {key: max(found[key] for found in measured[way]) for key in ("imports_mib", "peak_mib")}
            row["file_mb"] = round(weights_of(way, exported).stat().st_size / 1e6, 1)
            rows.append(row)
            print(
                f"{name:20} {way:19} {rate:8.1f} pairs/s  {rate / base:5.2f} x float32   peak {row['peak_mib']:5} MiB, "
                f"{row['imports_mib']:5} of them imports   {row['file_mb']:6.1f} MB on disk",
                flush=True,
            )
    return rows


def weights_of(way: str, exported: Path) -> Path:
    return exported / WAYS[way] if WAYS[way].endswith(".onnx") else NANO / "model.safetensors"


def quality(exported: Path, data: list[str], retriever: str, max_queries: int | None, scratch: Path) -> dict:
    """Set -> nDCG@10 times 100 of the first stage, of float32 and of int8, and int8's gain over float32."""
    import numpy as np
    from mteb.models import ModelMeta

    from hub_card.exported_onnx import load_onnx_ranker
    from recipes.evaluate import EvaluateArguments, first_stages, rerank
    from recipes.judged_sets import judged_sets
    from recipes.results import BASE, interval_of_mean
    from recipes.systems import QueritCrossEncoder, find_weights

    class OnnxCrossEncoder(QueritCrossEncoder):
        def __init__(self, file: Path):
            self.ranker = load_onnx_ranker(file)
            self.max_length = None
            self.mteb_model_meta = ModelMeta.create_empty({"name": f"querit/{file.stem}"})

    args = EvaluateArguments(
        models={}, output_dir=str(scratch), data=data, retriever=retriever, max_queries=max_queries
    )
    tasks = [task for members in judged_sets([], data).values() for task in members]
    folders = first_stages(tasks, find_weights(retriever), args)
    rankers = {
        "float32": QueritCrossEncoder(str(NANO), device="cpu", dtype="float32"),
        "int8": OnnxCrossEncoder(exported / WAYS["onnx, int8"]),
    }
    sets, gains = {}, []
    for task in tasks:
        name = task.metadata.name
        first = json.loads((folders[name] / "measured.json").read_text(encoding="utf-8"))["systems"][BASE]
        measured = {way: rerank(task, ranker, folders[name], args)[""] for way, ranker in rankers.items()}
        (values, other) = (
            {(part, query): value for part, found in x["per_query"].items() for query, value in found.items()}
            for x in (measured["float32"], measured["int8"])
        )
        gains.append(np.array([other[key] - values[key] for key in values]))
        sets[name] = {"queries": len(values), "first_stage": round(100 * first["score"], 2)}
        sets[name] |= {way: round(100 * found["score"], 2) for way, found in measured.items()}
        print(name, sets[name], flush=True)
    low, high = interval_of_mean(gains, [1 / len(gains)] * len(gains), seed=0)
    gain = float(np.mean([x.mean() for x in gains]))
    summary = {"gain": round(100 * gain, 2), "interval": [round(100 * low, 2), round(100 * high, 2)]}
    print("int8 over float32, mean of the sets:", summary)
    return {"metric": "ndcg_at_10", "retriever": Path(retriever).name, "sets": sets, "int8_over_float32": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--data", nargs="+", default=[], help="judged BEIR folders")
    parser.add_argument("--retriever", help="first stage: sentence-transformers folder or Hub repo")
    parser.add_argument("--max-queries", type=int, help="judge only a sample of so many queries a set")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "EXPORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.repeats)))
        return
    if args.data and not args.retriever:
        parser.error("--data needs --retriever, whose candidates are reranked")
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "onnx"
        subprocess.run([sys.executable, "-m", "querit", "export", str(NANO), str(exported), "--to", "onnx"], check=True)
        record = json.loads((exported / "export.json").read_text(encoding="utf-8"))
        results = {"checked": record["checked"], "rows": speed(exported, args.repeats, args.rounds)}
        if args.data:
            results["quality"] = quality(exported, args.data, args.retriever, args.max_queries, Path(scratch))
    if args.output:
        from onnxruntime import __version__ as onnxruntime_version

        described = machine() | {"onnxruntime": onnxruntime_version}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": described} | results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
