"""Pairs per second and memory of the ways to score the same pairs with the same weights, side by side in one run.

    python -m tests.bench.bench_scoring --output tests/bench/results/scoring.json

- Ways (`ways.py`): the pipeline, for causal models also without the shared prefix; sentence-transformers' CrossEncoder
  at several batch sizes, of which 32 is its default; a plain transformers loop; the published wrapper, which pads every
  pair to 4,095 tokens, on two passages; for Nano also float32, torch.compile and ONNX Runtime in float32 and int8.
- Models (`shapes.py`): the released Nano, and slices of the causal members: the true width, heads and experts with
  random weights, and a few of the layers, each of which costs what it costs in the whole.
- Each way runs in a process of its own, and the ways take turns: what the machine does at one time, it does to all.
  The median of the repeats counts, after one warm-up; of ratios, the median of the rounds' own, with the least and the
  most. `peak_mib` is the largest resident set from the start of the turn.
- `share_of_limit`: the operations that the useful tokens need (no padding, no repeated prompt) by the time, beside the
  rate of one large matrix product in the same dtype, measured before and after: 2 x the weights that a token is
  multiplied by, and 4 x heads x head size for each layer and each token that it attends to.
"""

import argparse
import json
import math
import multiprocessing
import random
import statistics
import tempfile
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.bench.machine import machine, matmul_rate, peak_mib, reset_peak

TEXT = "the tide rises twice a day because moon pulls on near side of earth more strongly than far sea falls"
SLICES = {"0.6B": 7, "4B": 3, "A0.4B": 4, "dense 0.4B": 6}  # layers, such that all ways of one stand in 24 GiB


class Work(NamedTuple):
    query: int  # tokens
    shortest: int  # tokens of a document; between them all lengths are as likely
    longest: int
    documents: int  # of each query
    queries: int = 1
    geometric: bool = False  # short documents are likelier: their logarithm is as likely


def works(nano: bool) -> dict[str, Work]:
    """Nano reads pairs of up to 256 tokens, so that its longest work is shorter: nothing is cut."""
    count = 128 if nano else 32
    found = {
        "short documents": Work(12, 20, 60, count),
        "passages": Work(12, 60, 230 if nano else 250, count // 2),
        "mixed lengths": Work(12, 10, 230 if nano else 450, count // 2, geometric=True),
        "long queries": Work(120, 40, 120, count // 2) if nano else Work(250, 100, 300, count // 4),
        "32 queries": Work(12, 20, 60, count // (32 if nano else 16), queries=32),
    }
    return found if nano else found | {"long documents": Work(12, 500, 2000, 4)}


def tokens_per_word(folder: Path) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) / len(TEXT.split())


def requests_of(work: Work, folder: Path) -> list[tuple[str, list[str]]]:
    """The same in every run. Lengths are in the folder's tokens."""
    rng, ratio = random.Random(0), tokens_per_word(folder)

    def text(tokens: float) -> str:
        return " ".join(rng.choices(TEXT.split(), k=max(1, round(tokens / ratio))))

    def length() -> float:
        if work.geometric:
            return math.exp(rng.uniform(math.log(work.shortest), math.log(work.longest)))
        return rng.uniform(work.shortest, work.longest)

    return [(text(work.query), [text(length()) for _ in range(work.documents)]) for _ in range(work.queries)]


class Measured(NamedTuple):
    seconds: float
    peak_mib: float


class Way:
    """A way in a process of its own."""

    def __init__(self, load: Callable):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_load, initargs=(load,))

    def measure(self, requests) -> Measured:
        return self.pool.submit(_measure, requests).result()


def _load(load: Callable) -> None:
    global _run
    _run = load()


def _measure(requests) -> Measured:
    # While other ways had their turns, this idle process lost its caches, and pages of its weights where the system
    # takes idle ones: one pair brings them back, and is not what is measured.
    _run([(requests[0][0], requests[0][1][:1])])
    reset_peak()
    seconds = timeit.timeit(lambda: _run(requests), number=1)
    return Measured(seconds, peak_mib())


def ways_of(folder: Path, dtype, exported: Path | None) -> dict[str, Callable]:
    """`exported` is the ONNX folder of Nano; the others are causal."""
    import torch

    from tests.bench import ways

    found: dict[str, Callable] = {"pipeline": partial(ways.querit, folder, dtype)}
    if not exported:
        found["pipeline, no sharing"] = partial(ways.querit, folder, dtype, shared_prefix=False)
    for size in ways.BATCHES:
        found[f"CrossEncoder, {size} a batch"] = partial(ways.cross_encoder, folder, dtype, size)
    found["plain loop"] = partial(ways.plain_loop, folder, dtype)
    if not exported:
        found["published wrapper"] = partial(ways.published_wrapper, folder, dtype)
    if exported:
        found["pipeline, float32"] = partial(ways.querit, folder, torch.float32)
        found["torch.compile"] = partial(ways.querit_compiled, folder, dtype)
        found["onnx, float32"] = partial(ways.onnx, exported / "onnx" / "model.onnx")
        found["onnx, int8"] = partial(ways.onnx, exported / "onnx" / "model_int8.onnx")
    return found


def useful_operations(folder: Path, requests) -> tuple[int, float]:
    """Tokens that the scores need, each prompt once where it can be shared, and the operations that they take."""
    from transformers import AutoConfig, AutoTokenizer

    from modeling_querit.prompting_querit import PromptEncoder
    from tests.bench.shapes import linear_parameters

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    causal = config.model_type != "bert"
    encoder = PromptEncoder(tokenizer, min(tokenizer.model_max_length, config.max_position_embeddings))
    tokens = attended = 0
    for query, documents in requests:
        for place, pair in enumerate(encoder.encode(query, documents)):
            shared = len(pair.prefix) if causal and place else 0
            tokens += pair.num_tokens - shared
            attended += pair.num_tokens**2 - shared**2
    if causal:
        attended //= 2
    head = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    width = config.num_attention_heads * (head or config.hidden_size // config.num_attention_heads)
    return tokens, 2 * linear_parameters(config) * tokens + 4 * width * config.num_hidden_layers * attended


def dtype_of(way: str, dtype_name: str) -> str:
    return next((dtype for dtype in ("float32", "int8") if way.endswith(dtype)), dtype_name)


def bench(
    model: str, folder: Path, exported: Path | None, dtype_name: str, repeats: int, chosen: list[str] | None
) -> list[dict]:
    import torch

    todo = {name: work for name, work in works(exported is not None).items() if not chosen or name in chosen}
    loaders = ways_of(folder, getattr(torch, dtype_name), exported)
    ways = {name: Way(load) for name, load in loaders.items()}
    rows = []
    for name, work in todo.items():
        requests = requests_of(work, folder)
        pairs = work.documents * work.queries
        tokens, operations = useful_operations(folder, requests)
        few = [(requests[0][0], requests[0][1][:2])]
        asked = {way: few if way == "published wrapper" else requests for way in ways}
        if name != "passages":
            asked.pop("published wrapper", None)
        measured: dict[str, list[Measured]] = {way: [] for way in asked}
        limit = matmul_rate(dtype_name)
        for repeat in range(repeats + 1):
            for way, given in asked.items():
                if way != "published wrapper" or repeat < 2:
                    measured[way].append(ways[way].measure(given))
        limit = (limit + matmul_rate(dtype_name)) / 2
        medians = {way: statistics.median(x.seconds for x in turns[1:]) for way, turns in measured.items()}
        ours = [turn.seconds for turn in measured["pipeline"][1:]]
        for way, turns in measured.items():
            count = sum(len(found) for _, found in asked[way])
            rate = count / medians[way]
            # Of each round by itself: what the machine did meanwhile, it did to both.
            times = [turn.seconds / own * pairs / count for turn, own in zip(turns[1:], ours, strict=False)]
            row = {"model": model, "work": name, "way": way, "dtype": dtype_of(way, dtype_name), "pairs": pairs}
            row |= {"useful_tokens": tokens, "pairs_per_second": rate, "tokens_per_second": rate * tokens / pairs}
            row |= {"pipeline_is_x_times": statistics.median(times), "least": min(times), "most": max(times)}
            row |= {"peak_mib": max(x.peak_mib for x in turns), "limit_dtype": dtype_name}
            row |= {"limit_gflops": limit / 1e9, "share_of_limit": rate / pairs * operations / limit}
            rows.append({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()})
            print(
                f"{model:11} {name:16} {way:24} {rate:8.1f} pairs/s   "
                f"pipeline is {row['pipeline_is_x_times']:6.2f} x   "
                f"{row['share_of_limit']:5.1%} of the limit   {row['peak_mib']:6.0f} MiB",
                flush=True,
            )
    for way in ways.values():
        way.pool.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; other models' rows in it stay")
    parser.add_argument("--models", nargs="+", default=["nano", *SLICES], choices=["nano", *SLICES])
    parser.add_argument("--work", nargs="+", help="only these works")
    parser.add_argument("--dtype", help="float32 or bfloat16; what the pipeline takes on this machine if not given")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    from hub_card.export import export
    from modeling_querit.scoring_querit import fastest_cpu_dtype
    from tests.bench import shapes

    dtype = args.dtype or str(fastest_cpu_dtype()).removeprefix("torch.")
    configs = {"0.6B": shapes.config_06b, "4B": shapes.config_4b, "A0.4B": shapes.config_a04b}
    configs["dense 0.4B"] = shapes.config_dense04b
    rows: list[dict] = []
    if args.output and args.output.exists():
        rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"]
    for model in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            made, exported = Path(scratch) / "made", None
            if model == "nano":
                folder, exported = shapes.NANO, export(shapes.NANO, made, to="onnx")
            else:
                folder = shapes.write_folder(made, configs[model](SLICES[model]))
            measured = bench(model, folder, exported, dtype, args.repeats, args.work)
            rows = sorted(
                [row for row in rows if row["model"] != model] + measured,
                key=lambda row: ["nano", *SLICES].index(row["model"]),
            )
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            results = {"machine": machine(), "layers": SLICES, "rows": rows}
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
