"""Make a trained model's probability one: scale and shift its head on queries that it was not trained on.

    python -m recipes.calibrate --config recipes/querit-nano/5_merge_calibrate.yaml

A ranking loss fixes the differences of the logits within a query and leaves their level to chance. Platt scaling (Platt
1999) fits sigmoid(a * logit + b) to known relevance; a and b go into the head. The order of documents does not change.
Every other query fits; the others tell how far the probability can be trusted in each language: `reliability.json`,
which `querit build` puts into the release and its card.

How many candidates are right is another number in every collection, and in the data here an accident of how negatives
were drawn. So right and wrong pairs weigh the same, all told: the probability is that of relevance at even odds.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer
from trl import TrlParser

from hub_card.provenance import RELIABILITY, merges_of, write_merges
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from modeling_querit.scoring_querit import score_pairs
from querit.files import appears_whole, write_json
from recipes.lib.documents import detect_language, is_other_language
from recipes.lib.records import already_made

REPORT = "calibrate.json"
BINS = 10  # of equal width over the probabilities


@dataclass
class CalibrateArguments:
    model_name_or_path: str = field(metadata={"help": "A trained reranker."})
    data: str = field(metadata={"help": "Parquet file of recipes.score."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    first_group: int = field(metadata={"help": "Queries before this one were trained on; those from it on are used."})
    groups: int = field(default=500, metadata={"help": "Queries to use: every other one fits, the rest measure."})
    max_length: int = field(default=160, metadata={"help": "Longest pair in tokens."})


def fit(logits: torch.Tensor, relevant: torch.Tensor) -> tuple[float, float]:
    """(a, b) of sigmoid(a * logit + b), by maximum likelihood at even odds; `logits`, bool `relevant` of `(pairs,)`."""
    model = LogisticRegression(C=float("inf"), class_weight="balanced").fit(
        logits.double().reshape(-1, 1).numpy(), relevant.numpy()
    )
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        raise ValueError("Higher logits go with less relevance here: this model ranks upside down on these data.")
    return slope, intercept


def rescale(model: QueritForSequenceClassification, slope: float, intercept: float) -> None:
    """Turn the model's logit into slope * logit + intercept, whether the head has one label or two."""
    head = model.relevance_head
    shift = [intercept] if head.out_features == 1 else [-intercept / 2, intercept / 2]
    with torch.no_grad():
        head.weight.mul_(slope)
        head.bias.mul_(slope).add_(torch.tensor(shift).to(head.bias))


def languages_of(query: str, documents: list[str]) -> str:
    """`de`, or `de-en` of a German query whose documents are English.

    A query's few words tell its language less surely than the documents tell theirs.
    """
    language = detect_language(" ".join(documents))
    return f"{detect_language(query)}-{language}" if is_other_language(query, language) else language


def reliability(probabilities: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
    """How far probabilities, `(pairs,)`, are the rates at which pairs are relevant, bool `(pairs,)`, at even odds.

    `ece` is the expected calibration error, sum over bins of w_b |rate_b - mean probability_b| (Naeini et al. 2015);
    w_b is the bin's share of the pairs' weights, of which right and wrong pairs have half each.
    `right_mean` and `wrong_mean` are the mean probabilities of relevant and of other pairs, None where there are none.
    """
    places = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    weights = np.where(relevant, 1 / max(1, relevant.sum()), 1 / max(1, (~relevant).sum()))
    weights /= weights.sum()
    bins, error = [], 0.0
    for place in range(BINS):
        inside = places == place
        if count := int(inside.sum()):
            mean, rate = (float(np.average(x[inside], weights=weights[inside])) for x in (probabilities, relevant))
            error += float(weights[inside].sum()) * abs(rate - mean)
            bins.append({"from": place / BINS, "n": count, "probability": round(mean, 4), "relevant": round(rate, 4)})
    means = (probabilities[relevant], probabilities[~relevant])
    right, wrong = (round(float(values.mean()), 4) if len(values) else None for values in means)
    return {
        "n": len(probabilities),
        "ece": round(error, 4),
        "right_mean": right,
        "wrong_mean": wrong,
        "bins": bins,
    }


def by_language(groups: list[dict], logits: torch.Tensor) -> dict[str, dict]:
    """Language, or query's and documents' -> `reliability` of the groups' pairs, whose logits stand in their order."""
    found: dict[str, tuple[list[float], list[bool]]] = {}
    probabilities = iter(torch.sigmoid(logits.double()).tolist())
    for group in groups:
        values, flags = found.setdefault(languages_of(group["query"], group["documents"]), ([], []))
        values += [next(probabilities) for _ in group["documents"]]
        flags += group["relevant"]
    ordered = sorted(found.items(), key=lambda item: -len(item[1][0]))
    return {language: reliability(np.array(values), np.array(flags)) for language, (values, flags) in ordered}


def held_aside(args: CalibrateArguments) -> list[dict]:
    """Groups that the model was not trained on and whose relevance is known."""
    data = load_dataset("parquet", data_files=args.data, split="train")
    groups = [group for group in data.select(range(args.first_group, len(data))) if any(group["relevant"])]
    if len(groups) < 2:
        raise ValueError(
            f"{args.data} has {len(groups)} queries with known relevance from row {args.first_group} on; give more, "
            "half to fit and half to measure."
        )
    return groups[: args.groups]


def main(args: CalibrateArguments) -> None:
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    model = QueritForSequenceClassification.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    encoder = PromptEncoder(tokenizer, args.max_length)
    groups = held_aside(args)

    def logits_of(chosen: list[dict]) -> torch.Tensor:
        pairs = [pair for group in chosen for pair in encoder.encode(group["query"], group["documents"])]
        return score_pairs(model, pairs, tokenizer.pad_token_id)

    fitted, measured = groups[::2], groups[1::2]
    relevant = torch.tensor([flag for group in fitted for flag in group["relevant"]])
    slope, intercept = fit(logits_of(fitted), relevant)
    rescale(model, slope, intercept)
    report = {"slope": slope, "intercept": intercept, "queries": len(fitted), "pairs": len(relevant)}
    with appears_whole(out) as folder:
        folder.mkdir()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_merges(folder, merges_of(args.model_name_or_path))
        write_json(folder / RELIABILITY, by_language(measured, logits_of(measured)))
        write_json(folder / REPORT, {**report, "settings": asdict(args)})
    print(
        f"{out}: logit = {slope:.3f} * logit {intercept:+.3f}, fitted on {len(fitted)} queries, {len(relevant)} pairs"
    )


if __name__ == "__main__":
    (arguments,) = TrlParser(CalibrateArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
