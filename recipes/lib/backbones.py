"""A plain backbone -> a reranker to train."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from modeling_querit.modeling_querit import POOLER_MODEL_TYPE, QueritForSequenceClassification


def from_backbone(
    name_or_path: str,
    pooling: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    **options,
) -> QueritForSequenceClassification:
    """The backbone's weights and a new head (normal, std 0.02). `options` go to AutoModel.

    Of a `bert`, pooler and classifier are the checkpoint's where it has them, and new where it does not; `pooling` is
    for other backbones. Raises ValueError for a checkpoint that lacks a weight.
    """
    settings: dict[str, Any] = {"revision": revision or "main", "dtype": dtype, "output_loading_info": True, **options}
    whole: Any = None
    new: tuple[str, ...] = ("pooler.",)  # what may be lacking in the checkpoint
    if AutoConfig.from_pretrained(name_or_path, revision=revision).model_type == POOLER_MODEL_TYPE:
        settings |= {"num_labels": 1, "ignore_mismatched_sizes": True}
        whole, info = AutoModelForSequenceClassification.from_pretrained(name_or_path, **settings)
        backbone, new = whole.base_model, (f"{whole.base_model_prefix}.pooler.", "classifier.")
    else:
        backbone, info = AutoModel.from_pretrained(name_or_path, **settings)
        backbone.config.classifier_pooling = pooling
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if missing := sorted(key for key in lacking if not key.startswith(new)):
        raise ValueError(f"{name_or_path} is no whole {type(backbone).__name__}: {', '.join(missing[:8])} missing.")
    model = QueritForSequenceClassification(backbone.config)
    # The loaded module itself: casting another one would round the buffers that stay in float32, like RoPE's.
    setattr(model, model.base_model_prefix, backbone)
    if whole is not None:
        model.classifier.load_state_dict(whole.classifier.state_dict())
    elif getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    model.relevance_head.to(backbone.device, backbone.dtype)
    return model
