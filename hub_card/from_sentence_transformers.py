"""A checkpoint's model, also where sentence-transformers trained and saved it: there may be a head beside our own.

Of a `bert` there is one head, whoever saves it. Of other backbones `CrossEncoder` trains the one row that
sentence_transformers_files.py wrote beside the weights, and knows nothing of the two-way head in them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hub_card.convert import read_headers, read_tensor, weight_files
from hub_card.sentence_transformers_files import POOLING_MODES
from modeling_querit.modeling_querit import POOLER_MODEL_TYPE, QueritForSequenceClassification

ROW = Path("2_Dense") / "model.safetensors"  # linear.weight (1, hidden_size), linear.bias (1,)
POOLING = Path("1_Pooling") / "config.json"


def load_checkpoint(folder: Path, dtype: torch.dtype) -> QueritForSequenceClassification:
    """The model of `folder`. Where sentence-transformers' row says other than the two-way head, the row was trained.

    Raises ValueError, naming the fix, for a folder that is no reranker.
    """
    row = read_row(folder)
    if row is None or ((head := read_head(folder)) is not None and same(head, row)):
        return QueritForSequenceClassification.from_pretrained(folder, dtype=dtype)
    if head is None:  # saved without trust in our code: the backbone alone
        model = with_new_head(folder, dtype)
    else:
        model = QueritForSequenceClassification.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():  # z1 - z0 is the row
        for parameter, value in zip((model.head.weight, model.head.bias), row, strict=True):
            parameter.copy_(torch.cat([-value / 2, value / 2]))
    return model


def with_new_head(folder: Path, dtype: torch.dtype) -> QueritForSequenceClassification:
    backbone, info = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks {', '.join(sorted(info['missing_keys'])[:5])}: no whole {type(backbone)}.")
    backbone.config.classifier_pooling = read_pooling(folder)
    model = QueritForSequenceClassification(backbone.config)
    setattr(model, model.base_model_prefix, backbone)
    model.head.to(dtype)
    return model


def check_one_head(folder: Path) -> None:
    """Raise ValueError where engines would disagree: CrossEncoder has a row that the two-way head, if any, is not."""
    row, head = read_row(folder), read_head(folder)
    if row is not None and not (head is not None and same(head, row)):
        raise ValueError(
            f"{folder} was saved by sentence-transformers, with a head that is not in model.safetensors. Make it a "
            f"release, with one head for every engine: querit build {folder} NEW-FOLDER"
        )


def read_row(folder: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight (1, hidden_size) and bias (1,) that CrossEncoder computes; None where there is no such head."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type == POOLER_MODEL_TYPE or not (folder / ROW).is_file():
        return None
    row = load_file(folder / ROW)
    return row["linear.weight"].float(), row["linear.bias"].float()


def read_head(folder: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The two-way head, (2, hidden_size) and (2,); None where the weights have none."""
    _, places = read_headers(weight_files(folder))
    if "head.weight" not in places:
        return None
    return read_tensor(places["head.weight"], "head.weight"), read_tensor(places["head.bias"], "head.bias")


def same(head: tuple[torch.Tensor, torch.Tensor], row: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.allclose(a.float().diff(dim=0).flatten(), b.flatten()) for a, b in zip(head, row, strict=True))


def read_pooling(folder: Path) -> str:
    mode = json.loads((folder / POOLING).read_text(encoding="utf-8"))["pooling_mode"]
    return next(name for name, theirs in POOLING_MODES.items() if theirs == mode)
