"""The Querit reranker: a transformers backbone and a two-way relevance head.

The config keeps the backbone's own `model_type`, and the weights its own key prefix (`model.` for Qwen3 and
DeepSeek-V3, `bert.` for BERT), so every engine that knows the backbone reads the same file; `head.*` is what is added.
"""

import inspect
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

POOLINGS = ("last", "cls", "mean")
# What is published beside the weights. The import in `remote_code_config` makes transformers fetch them all together.
REMOTE_CODE = (
    "modeling_querit.py", "attention_querit.py", "experts_querit.py", "layouts_querit.py", "linear_querit.py",
    "prompting_querit.py", "scoring_querit.py", "workers_querit.py", "pipeline_querit.py",
)  # fmt: skip


@dataclass
class QueritOutput(SequenceClassifierOutputWithPast):
    """
    loss (`torch.FloatTensor` of shape `(1,)`): binary cross-entropy, when labels are given.
    logits (`torch.FloatTensor` of shape `(batch_size, 1)`): z1 - z0 in float32, the log-odds of relevance.
    score (`torch.FloatTensor` of shape `(batch_size, 1)`): p1 - p0 = tanh(logits / 2) in float32, in [-1, 1].
    """

    score: torch.Tensor | None = None


class RelevanceHead(nn.Linear):
    """`Linear(hidden, 2)` that computes in float32 whatever the weights' dtype: near-equal scores must not tie."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float(), self.bias.float())


class QueritForSequenceClassification(PreTrainedModel):
    """Scores (query, document) token sequences.

    The read-out is `config.classifier_pooling`: "last" (the last real token, whatever the padding side), "cls" (the
    first real token) or "mean" (over the real tokens). Without it, a causal backbone reads the last token out and any
    other the mean.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig):
        config.num_labels = 1
        super().__init__(config)
        backbone_class = type(self)._backbone_class(config)
        options = {}
        if "add_pooling_layer" in inspect.signature(backbone_class.__init__).parameters:
            options["add_pooling_layer"] = False  # a second head that nobody trained
        # trust_remote_code=False: auto_map names this class, which is not the backbone.
        backbone = AutoModel.from_config(config, trust_remote_code=False, **options)
        self.base_model_prefix = backbone.base_model_prefix
        setattr(self, self.base_model_prefix, backbone)
        self.head = RelevanceHead(config.hidden_size, 2)
        self.is_causal = any(getattr(module, "is_causal", False) for module in backbone.modules())
        self.pooling = getattr(config, "classifier_pooling", None) or ("last" if self.is_causal else "mean")
        if self.pooling not in POOLINGS:
            raise ValueError(f"classifier_pooling is {self.pooling!r}; it must be one of {', '.join(POOLINGS)}.")
        config.classifier_pooling = self.pooling
        parameters = inspect.signature(backbone.forward).parameters
        # RoBERTa's kin (XLM-R, MPNet, ...) number their positions themselves, from the padding id on.
        numbers_itself = hasattr(getattr(backbone, "embeddings", None), "create_position_ids_from_inputs_embeds")
        self._takes_position_ids = "position_ids" in parameters and not numbers_itself
        self.post_init()

    @property
    def model(self) -> PreTrainedModel:
        """The backbone, whatever its key prefix."""
        return self._modules[self.base_model_prefix]  # type: ignore[return-value]

    @staticmethod
    def _backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        try:
            return AutoModel._model_mapping[type(config)]  # type: ignore[return-value]
        except KeyError:
            raise ValueError(f"transformers has no backbone of model_type {config.model_type!r}.") from None

    # transformers looks for these switches in the source of the model's own file; here they are the backbone's.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _can_set_experts_implementation(self) -> bool:  # type: ignore[override]
        return self._backbone_class(self.config)._can_set_experts_implementation()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers, but a checkpoint that lacks a key, or has one of another shape, raises a ValueError.

        Weights are read from safetensors only: pickled ones may hold code.
        """
        kwargs.setdefault("use_safetensors", True)
        if config is None:
            names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        wants_info = kwargs.pop("output_loading_info", False)
        # Without it, transformers raises by itself for a wrong shape, and names no key.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        missing = keys_not_loaded(info)
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} is no Querit reranker: {missing} missing or of another shape. "
                "To start training from a plain backbone use `QueritForSequenceClassification.from_backbone`; for a "
                "checkpoint as published use `querit convert`."
            )
        return (model, info) if wants_info else model

    @classmethod
    def from_backbone(cls, pretrained_model_name_or_path, pooling: str | None = None, **kwargs):
        """A model to train: the backbone's weights and a new head (normal, std 0.02). kwargs go to AutoModel."""
        backbone, info = AutoModel.from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        info["missing_keys"] = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
        if missing := keys_not_loaded(info):
            raise ValueError(
                f"{pretrained_model_name_or_path} is no whole {type(backbone).__name__}: {missing} missing."
            )
        backbone.config.classifier_pooling = pooling
        model = cls(backbone.config)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None
        # The loaded module itself: casting another one would round the buffers that stay in float32, like RoPE's.
        setattr(model, model.base_model_prefix, backbone)
        model.head.to(backbone.device, backbone.dtype)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):  # type: ignore[override]
        """Write a folder that `pipeline("text-ranking")` and the AutoModel classes load, its code included."""
        self.config.update(remote_code_config())
        super().save_pretrained(save_directory, **kwargs)
        copy_remote_code(save_directory)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> QueritOutput | tuple:
        """
        Args:
            input_ids: `(batch_size, sequence_length)`.
            attention_mask: `(batch_size, past + sequence_length)`, 1 for real tokens, or the mask of Querit's first
                wrapper, bool `(batch_size, 1, L, L)`; None when every token is real.
            position_ids, past_key_values, inputs_embeds, kwargs: passed through to the backbone.
            labels: `(batch_size,)` or `(batch_size, 1)`, relevance in [0, 1].
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = padding_mask(attention_mask, causal=self.is_causal)
        tokens: Any = input_ids if input_ids is not None else inputs_embeds
        if attention_mask is not None and position_ids is None and self._takes_position_ids:
            # A padded row has the positions of the same row alone.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.head(self.pool(outputs.last_hidden_state, attention_mask)).diff(dim=-1)
        loss = None
        if labels is not None:
            target = labels.reshape(logits.shape).to(logits)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, target)
        result = QueritOutput(
            loss=loss,
            logits=logits,
            score=torch.tanh(logits / 2),
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        # For sentence-transformers, where it trusts this code. No field of the output: Trainer would gather it.
        result.last_hidden_state = outputs.last_hidden_state  # type: ignore[attr-defined]
        return result if return_dict is not False else result.to_tuple()

    def pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`(batch_size, sequence_length, hidden_size)` -> `(batch_size, hidden_size)`."""
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        if attention_mask is None:
            if self.pooling == "mean":
                return hidden_states.float().mean(1)
            return hidden_states[:, 0 if self.pooling == "cls" else -1]
        mask = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device)
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).float()
            return (hidden_states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        if self.pooling == "cls":
            return hidden_states[rows, mask.long().argmax(-1)]
        last = mask.shape[1] - 1 - mask.long().flip(-1).argmax(-1)
        return hidden_states[rows, last]


def remote_code_config() -> dict:
    """The keys of a release's config.json that name its code."""
    from .pipeline_querit import TextRankingPipeline  # the pipeline's file must lie beside this one

    name = f"{Path(__file__).stem}.{QueritForSequenceClassification.__name__}"
    return {
        "auto_map": {"AutoModel": name, "AutoModelForSequenceClassification": name},
        "custom_pipelines": {
            "text-ranking": {
                "impl": f"pipeline_querit.{TextRankingPipeline.__name__}",
                "pt": ["AutoModelForSequenceClassification"],
                "type": "text",
            }
        },
    }


def copy_remote_code(folder: str | os.PathLike) -> None:
    for file in REMOTE_CODE:
        source, target = Path(__file__).with_name(file), Path(folder) / file
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)


def keys_not_loaded(info: dict) -> str:
    """The keys that `from_pretrained` reports as missing or of another shape, the first eight; "" if there are none."""
    keys = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def padding_mask(mask: torch.Tensor, causal: bool) -> torch.Tensor:
    """The 2-D mask of a 4-D bool mask `(batch_size, 1, L, L)`, which must be (causal) attention to all real tokens."""
    if mask.dtype != torch.bool:
        raise TypeError(f"A 4-D attention_mask must be bool (True = attends), not {mask.dtype}.")
    real = mask.any(dim=(1, 2))
    expected = real[:, None, None, :] & real[:, None, :, None]
    if causal:
        expected = expected.tril()
    if not torch.equal(mask & real[:, None, :, None], expected):
        raise ValueError("A 4-D attention_mask may only leave padding out; pass a 2-D mask, or plain causal attention.")
    return real.long()
