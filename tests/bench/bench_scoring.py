"""Pairs per second of the pipeline beside other ways to score the same pairs, in one run.

    python -m tests.bench.bench_scoring --output tests/bench/results/scoring.json

- `pipeline`: this package, as a user calls it; for a causal model also without the shared prefix.
- `CrossEncoder`: sentence-transformers on the same folder in the same dtype, otherwise its defaults.
- `padded wrapper`: mteb's copy of the first published wrapper, which pads every pair to 4,095 tokens with a dense mask.
  It knows causal models only, and Nano's positions end at 512, so it runs on the causal model alone.

Models: the released Nano, and one of Qwen3's architecture with random weights (8 layers, 512 wide), small enough to be
padded. The median of the repeats counts, after one warm-up.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mteb.models.model_implementations.querit_models import QueritWrapper
from sentence_transformers import CrossEncoder
from torch.utils.data import DataLoader
from transformers import Qwen3Config, pipeline

from hub_card.sentence_transformers_files import write_sentence_transformers_files
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.scoring_querit import fastest_cpu_dtype
from tests.tokenizers_for_tests import qwen3_like_tokenizer

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"
TEXT = "the tide rises twice a day because moon pulls on near side of earth more strongly than far sea falls"
QUERY = "why does the sea rise and fall twice a day"


class Rows(torch.utils.data.Dataset):
    """What mteb's wrapper reads: batches with `text`, and a data set with `features`."""

    features: tuple[str, ...] = ("text",)

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": self.texts[index]}


def documents_of(count: int, shortest: int, longest: int) -> list[str]:
    """Documents of mixed lengths in words, the same in every run."""
    words = TEXT.split()
    lengths = torch.randint(shortest, longest + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(n)) for i, n in enumerate(lengths)]


def causal_folder(folder: Path) -> Path:
    tokenizer = qwen3_like_tokenizer()
    tokenizer.model_max_length = 4096
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=4, head_dim=64, **shape)
    torch.manual_seed(0)
    model = QueritForSequenceClassification(config).to(fastest_cpu_dtype())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sentence_transformers_files(folder, model.head.weight, model.head.bias, model.pooling, chat_template=True)
    return folder


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    measured = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = []

    def compare(model: str, work: str, ways: dict[str, tuple[Callable[[], object], int]]) -> None:
        rates = {way: pairs / seconds(run, args.repeats) for way, (run, pairs) in ways.items()}
        for way, rate in rates.items():
            ratio = rates["pipeline"] / rate
            row = {"model": model, "work": work, "way": way, "pairs_per_second": rate, "pipeline_is_x_times": ratio}
            rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
            print(f"{model:7} {work:22} {way:24} {rate:9.1f} pairs/s   pipeline is {ratio:7.2f} x", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        for model, folder in (("nano", NANO), ("causal", causal_folder(Path(scratch) / "causal"))):
            ranker = pipeline("text-ranking", model=str(folder), trust_remote_code=True)
            encoder = CrossEncoder(str(folder), model_kwargs={"dtype": ranker.model.dtype})
            for work, shortest, longest in (("short, 10-30 words", 10, 30), ("mixed, 10-250 words", 10, 250)):
                texts = documents_of(128, shortest, longest)
                pairs = [(QUERY, text) for text in texts]
                ways: dict[str, tuple[Callable[[], object], int]] = {
                    "pipeline": (lambda texts=texts, ranker=ranker: ranker(QUERY, texts), len(texts)),
                    "CrossEncoder": (lambda pairs=pairs, encoder=encoder: encoder.predict(pairs), len(texts)),
                }
                if model == "causal":
                    few = texts[:2]
                    wrapper = QueritWrapper(str(folder), fp_options=ranker.model.dtype, batch_size=1)
                    queries, found = DataLoader(Rows([QUERY] * 2), batch_size=2), DataLoader(Rows(few), batch_size=2)
                    options = {"task_metadata": None, "hf_split": "", "hf_subset": ""}
                    ways["pipeline, no sharing"] = (
                        lambda texts=texts, ranker=ranker: ranker(QUERY, texts, shared_prefix=False),
                        len(texts),
                    )
                    ways["padded wrapper"] = (
                        lambda a=queries, b=found, w=wrapper, o=options: w.predict(a, b, **o),
                        len(few),
                    )
                compare(model, work, ways)

    if args.output:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
        machine = {"cpu": cpu, "system": platform.system(), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "dtype": str(fastest_cpu_dtype())}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
