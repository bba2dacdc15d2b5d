"""Make a trained model's probability one: scale and shift its head on queries that it was not trained on.

    python -m recipes.calibrate --config recipes/querit-nano/5_merge_calibrate.yaml

A ranking loss fixes the differences of the logits within a query and leaves their level to chance. Platt scaling (Platt
1999) fits sigmoid(a * logit + b) to known relevance; a and b go into the head. The order of documents does not change.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer
from trl import TrlParser

from hub_card.build import MERGE_RECORD
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from modeling_querit.scoring_querit import score_pairs
from recipes.records import already_made

REPORT = "calibrate.json"


@dataclass
class CalibrateArguments:
    model_name_or_path: str = field(metadata={"help": "A trained reranker."})
    data: str = field(metadata={"help": "Parquet file of recipes.score."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    first_group: int = field(metadata={"help": "Queries before this one were trained on; those from it on are used."})
    groups: int = field(default=500, metadata={"help": "Queries to use."})
    max_length: int = field(default=160, metadata={"help": "Longest pair in tokens."})


def fit(logits: torch.Tensor, relevant: torch.Tensor) -> tuple[float, float]:
    """(a, b) of sigmoid(a * logit + b), by maximum likelihood; `logits` and bool `relevant` of shape `(pairs,)`."""
    model = LogisticRegression(C=float("inf")).fit(logits.double().reshape(-1, 1).numpy(), relevant.numpy())
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        raise ValueError("Higher logits go with less relevance here: this model ranks upside down on these data.")
    return slope, intercept


def rescale(model: QueritForSequenceClassification, slope: float, intercept: float) -> None:
    """Turn the model's logit into slope * logit + intercept."""
    with torch.no_grad():
        model.head.weight.mul_(slope)
        model.head.bias.mul_(slope).add_(torch.tensor([-intercept / 2, intercept / 2]).to(model.head.bias))


def main(args: CalibrateArguments) -> None:
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    model = QueritForSequenceClassification.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    encoder = PromptEncoder(tokenizer, args.max_length)
    data = load_dataset("parquet", data_files=args.data, split="train")
    groups = [group for group in data.select(range(args.first_group, len(data))) if any(group["relevant"])]
    groups = groups[: args.groups]
    if not groups:
        raise ValueError(f"{args.data} has no queries with known relevance from row {args.first_group} on.")
    pairs = [pair for group in groups for pair in encoder.encode(group["query"], group["documents"])]
    logits = score_pairs(model, pairs, tokenizer.pad_token_id)
    relevant = torch.tensor([flag for group in groups for flag in group["relevant"]])
    slope, intercept = fit(logits, relevant)
    rescale(model, slope, intercept)
    aside = out.with_name(out.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if (record := Path(args.model_name_or_path) / MERGE_RECORD).is_file():  # how the model came, for its card
        shutil.copy(record, aside)
    report = {"slope": slope, "intercept": intercept, "queries": len(groups), "pairs": len(pairs)}
    (aside / REPORT).write_text(json.dumps({**report, "settings": asdict(args)}, indent=1) + "\n", encoding="utf-8")
    aside.rename(out)
    print(f"{out}: logit = {slope:.3f} * logit {intercept:+.3f}, fitted on {len(groups)} queries, {len(pairs)} pairs")


if __name__ == "__main__":
    (arguments,) = TrlParser(CalibrateArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
