"""The Querit reranker: a transformers backbone and a relevance head.

The config keeps the backbone's own `model_type`, and the weights its own key prefix, so every engine that knows the
backbone reads the same file. A `bert` is a plain `BertForSequenceClassification` with one label (`bert.*` with its
pooler, `classifier.*`); to any other backbone (`model.*` of Qwen3 and DeepSeek-V3) a two-way `head.*` is added.
"""

import inspect
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

if TYPE_CHECKING:  # never run: transformers reads these lines and fetches the files; of any age, to be told below
    from .pipeline_querit import TextRankingPipeline  # noqa: F401
    from .prompting_querit import PromptEncoder  # noqa: F401
    from .scoring_querit import score_pairs  # noqa: F401

OLDEST_TRANSFORMERS = "5.19.0"  # 5.17 and 5.18 do not load published code over a backbone of their own
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 19):
    raise ImportError(
        f"Querit rerankers need transformers {OLDEST_TRANSFORMERS} or newer, not {transformers.__version__}: "
        "pip install -U transformers"
    )
POOLINGS = ("last", "cls")
# The one backbone whose own pooler and one-label classifier are the head, so that every engine has the whole model.
POOLER_MODEL_TYPE = "bert"
# What is published beside the weights: this folder.
REMOTE_CODE = tuple(sorted(path.name for path in Path(__file__).parent.glob("*_querit.py")))


@dataclass
class QueritOutput(SequenceClassifierOutputWithPast):
    """
    loss (`torch.FloatTensor` of shape `(1,)`): binary cross-entropy, when labels are given.
    logits (`torch.FloatTensor` of shape `(batch_size, 1)`): the log-odds of relevance in float32: the classifier's
        output, or z1 - z0 of the two-way head.
    score (`torch.FloatTensor` of shape `(batch_size, 1)`): p1 - p0 = tanh(logits / 2) in float32, in [-1, 1].
    """

    score: torch.Tensor | None = None


class RelevanceHead(nn.Linear):
    """A linear layer that computes in float32 whatever the weights' dtype: near-equal scores must not tie."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float(), self.bias.float())


class QueritForSequenceClassification(PreTrainedModel):
    """Scores (query, document) token sequences.

    A `bert` is read out by its own pooler, and `classifier` gives the logit. Of any other backbone the read-out is
    `config.classifier_pooling`: "last" (the last real token, whatever the padding side) or "cls" (the first real
    token); without it, a causal backbone reads the last token out and any other the first.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: transformers.PreTrainedConfig):
        config.num_labels = 1
        super().__init__(config)
        # trust_remote_code=False: auto_map names this class, which is not the backbone.
        backbone = AutoModel.from_config(config, trust_remote_code=False)
        self.base_model_prefix = backbone.base_model_prefix
        setattr(self, self.base_model_prefix, backbone)
        self.is_causal = any(getattr(module, "is_causal", False) for module in backbone.modules())
        if config.model_type == POOLER_MODEL_TYPE:
            self.pooling = "cls"
            self.classifier = RelevanceHead(config.hidden_size, 1)
        else:
            if getattr(backbone, "pooler", None) is not None:
                backbone.pooler = None  # a second head that nobody trained
            self.pooling = getattr(config, "classifier_pooling", None) or ("last" if self.is_causal else "cls")
            if self.pooling not in POOLINGS:
                raise ValueError(f"classifier_pooling is {self.pooling!r}; it must be one of {', '.join(POOLINGS)}.")
            config.classifier_pooling = self.pooling
            self.head = RelevanceHead(config.hidden_size, 2)
        parameters = inspect.signature(backbone.forward).parameters
        # RoBERTa's kin (XLM-R, MPNet, ...) number their positions themselves, from the padding id on.
        numbers_itself = hasattr(getattr(backbone, "embeddings", None), "create_position_ids_from_inputs_embeds")
        self._takes_position_ids = "position_ids" in parameters and not numbers_itself
        self.post_init()

    @property
    def model(self) -> PreTrainedModel:
        """The backbone, whatever its key prefix."""
        return self._modules[self.base_model_prefix]  # type: ignore[return-value]

    @property
    def relevance_head(self) -> RelevanceHead:
        return self.classifier if self.config.model_type == POOLER_MODEL_TYPE else self.head

    # transformers looks for these switches in the source of the model's own file; here they are the backbone's.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _can_set_experts_implementation(self) -> bool:  # type: ignore[override]
        # PreTrainedModel itself must not be asked: it would keep its answer, a wrong one, for every model there is.
        backbone: Any = AutoModel._model_mapping.get(type(self.config), None)
        return backbone is not None and backbone._can_set_experts_implementation()

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
        kwargs["ignore_mismatched_sizes"] = True  # without it, transformers raises by itself and names no key
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} is no Querit reranker: {', '.join(missing[:8])} missing or of another"
                " shape. A plain backbone is trained with `recipes.train`, a published one made by `querit convert`."
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):  # type: ignore[override]
        """Write a folder that `pipeline("text-ranking")` and the AutoModel classes load, its code included."""
        self.config.update(remote_code_config())
        super().save_pretrained(save_directory, **kwargs)
        if self.config.model_type == POOLER_MODEL_TYPE and kwargs.get("is_main_process", True):
            plain: Any = AutoModelForSequenceClassification._model_mapping[type(self.config)]
            self.config.architectures = [plain.__name__]
            self.config.save_pretrained(save_directory)
        copy_remote_code(save_directory)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, return_dict=None, **kwargs,
    ) -> QueritOutput | tuple:  # fmt: skip
        """
        Args:
            input_ids: `(batch_size, sequence_length)`.
            attention_mask: `(batch_size, past + sequence_length)`, 1 for real tokens; None when every token is real.
            position_ids, past_key_values, inputs_embeds, kwargs (`token_type_ids` of a `bert`): passed through to the
                backbone.
            labels: `(batch_size,)` or `(batch_size, 1)`, relevance in [0, 1].
        """
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
            attention_mask = attention_mask.any(dim=(1, 2)).long()  # of mteb's wrapper: all real tokens
        tokens: Any = input_ids if input_ids is not None else inputs_embeds
        if attention_mask is not None and position_ids is None and self._takes_position_ids:
            # A padded row has the positions of the same row alone.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        given = {"position_ids": position_ids, "past_key_values": past_key_values}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        pooled = self.pool(outputs.last_hidden_state, attention_mask)
        if self.config.model_type == POOLER_MODEL_TYPE:
            # Not outputs.pooler_output, which is of the row's first token, padding or not.
            logits = self.classifier(self.model.pooler(pooled.unsqueeze(1)))  # type: ignore[operator]
        else:
            logits = self.head(pooled).diff(dim=-1)
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
        if attention_mask is None:
            return hidden_states[:, 0 if self.pooling == "cls" else -1]
        mask = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device).long()
        place = mask.argmax(-1) if self.pooling == "cls" else mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
        return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), place]


def remote_code_config() -> dict:
    """The keys of a release's config.json that name its code."""
    name = f"{Path(__file__).stem}.{QueritForSequenceClassification.__name__}"
    pipeline = {"impl": "pipeline_querit.TextRankingPipeline", "pt": ["AutoModelForSequenceClassification"]}
    return {
        "auto_map": {"AutoModel": name, "AutoModelForSequenceClassification": name},
        "custom_pipelines": {"text-ranking": {**pipeline, "type": "text"}},
    }


def copy_remote_code(folder: str | os.PathLike) -> None:
    for file in REMOTE_CODE:
        source, target = Path(__file__).with_name(file), Path(folder) / file
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
