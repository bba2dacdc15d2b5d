"""What a lower precision costs the released Nano in quality: bfloat16, and int8 of its ONNX export, beside float32.

    python -m tests.bench.bench_precision --output tests/bench/results/precision.json \\
        --data ../shared/data/dev/wikiqa --retriever runs/querit-nano/retriever

nDCG@10 of each over the same candidates of judged BEIR folders, and the difference from float32 with its 95% paired
bootstrap interval. How fast each is, `bench_scoring` tells.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.machine import machine

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"


def quality(exported: Path, data: list[str], retriever: str, max_queries: int | None, scratch: Path) -> dict:
    """Set -> nDCG@10 times 100 of the first stage and of each precision, and the others' gains over float32."""
    import numpy as np
    from mteb.models import ModelMeta

    from querit import load
    from recipes.evaluate import EvaluateArguments, first_stages, rerank
    from recipes.lib.judged_sets import judged_sets
    from recipes.lib.results import BASE, interval_of_mean
    from recipes.lib.systems import QueritCrossEncoder, find_weights

    class OnnxCrossEncoder(QueritCrossEncoder):
        def __init__(self, file: Path):
            self.ranker = load(file)
            self.max_length = None
            self.mteb_model_meta = ModelMeta.create_empty({"name": f"querit/{file.stem}"})

    args = EvaluateArguments(
        models={}, output_dir=str(scratch), data=data, retriever=retriever, max_queries=max_queries
    )
    tasks = [task for members in judged_sets([], data).values() for task in members]
    folders = first_stages(tasks, find_weights(retriever), args)
    rankers = {
        "float32": QueritCrossEncoder(str(NANO), device="cpu", dtype="float32"),
        "bfloat16": QueritCrossEncoder(str(NANO), device="cpu", dtype="bfloat16"),
        "onnx int8": OnnxCrossEncoder(exported / "onnx" / "model_int8.onnx"),
    }
    sets: dict[str, dict] = {}
    gains: dict[str, list[np.ndarray]] = {}
    for task in tasks:
        name = task.metadata.name
        first = json.loads((folders[name] / "measured.json").read_text(encoding="utf-8"))["systems"][BASE]
        measured = {way: rerank(task, ranker, folders[name], args)[""] for way, ranker in rankers.items()}
        values = {
            way: {(part, query): value for part, of in found["per_query"].items() for query, value in of.items()}
            for way, found in measured.items()
        }
        exact = values.pop("float32")
        for way, other in values.items():
            gains.setdefault(way, []).append(np.array([other[key] - exact[key] for key in exact]))
        sets[name] = {"queries": len(exact), "first_stage": round(100 * first["score"], 2)}
        sets[name] |= {way: round(100 * found["score"], 2) for way, found in measured.items()}
        print(name, sets[name], flush=True)
    over_float32 = {}
    for way, of_sets in gains.items():
        low, high = interval_of_mean(of_sets, [1 / len(of_sets)] * len(of_sets), seed=0)
        gain = float(np.mean([values.mean() for values in of_sets]))
        over_float32[way] = {"gain": round(100 * gain, 2), "interval": [round(100 * x, 2) for x in (low, high)]}
        print(way, "over float32, mean of the sets:", over_float32[way])
    return {"metric": "ndcg_at_10", "retriever": Path(retriever).name, "sets": sets, "over_float32": over_float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--data", nargs="+", required=True, help="judged BEIR folders")
    parser.add_argument("--retriever", required=True, help="first stage: sentence-transformers folder or Hub repo")
    parser.add_argument("--max-queries", type=int, help="judge only a sample of so many queries a set")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "onnx"
        subprocess.run([sys.executable, "-m", "querit", "export", str(NANO), str(exported), "--to", "onnx"], check=True)
        megabytes = {
            file.name: round(file.stat().st_size / 1e6, 1)
            for file in (NANO / "model.safetensors", *sorted((exported / "onnx").iterdir()))
        }
        results = quality(exported, args.data, args.retriever, args.max_queries, Path(scratch))
    if args.output:
        from onnxruntime import __version__ as onnxruntime_version

        about = {"machine": machine() | {"onnxruntime": onnxruntime_version}, "megabytes": megabytes}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(about | results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
