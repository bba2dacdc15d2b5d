"""From a trained checkpoint to the folder that is released: 16-bit weights, code, tokenizer, card.

python -m hub_card.release runs/querit-nano/general hub_card/querit-reranker-nano \\
    --max-length 160 --results recipes/querit-nano/results/dev
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hub_card.sentence_transformers_files import write_sentence_transformers_files
from modeling_querit.modeling_querit import QueritForSequenceClassification

CARD = Path(__file__).parent / "querit-reranker-nano.md"
LICENSE = Path(__file__).parents[1] / "LICENSE"


def release(
    checkpoint: str | Path,
    folder: Path,
    card: str,
    max_length: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `folder` whole or not at all; what stood there before is replaced.

    `card` is the text of its README.md. `max_length`, in tokens, becomes the tokenizer's: every engine cuts pairs
    there, whatever the positions allow. `checkpoint` is a folder, or a Hub id at `revision`.
    """
    model = QueritForSequenceClassification.from_pretrained(
        checkpoint, revision=revision or "main", dtype=torch.float32
    ).to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision or "main")
    tokenizer.model_max_length = max_length or tokenizer.model_max_length
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        built = Path(scratch) / folder.name
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        write_sentence_transformers_files(
            built, model.head.weight, model.head.bias, model.pooling, chat_template=bool(tokenizer.chat_template)
        )
        shutil.copyfile(LICENSE, built / "LICENSE")
        (built / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")  # removed with the scratch folder, once the new one stands
        built.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, help="output_dir of recipes.evaluate")
    parser.add_argument("--max-length", type=int, help="longest pair in tokens; the tokenizer's own if not given")
    arguments = parser.parse_args()
    table = (arguments.results / "results.md").read_text(encoding="utf-8") if arguments.results else "Not measured.\n"
    card = CARD.read_text(encoding="utf-8").replace("{results}", table)
    release(arguments.checkpoint, arguments.folder, card, arguments.max_length)
