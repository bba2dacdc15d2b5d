"""Tiny models of each kind with random weights, and hub folders of them, for every test that needs scores."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    dynamic_module_utils,
)

from modeling_querit.modeling_querit import QueritForSequenceClassification
from tests.tokenizers_for_tests import bert_like_tokenizer, deepseek_v3_like_tokenizer, qwen3_like_tokenizer

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "qwen3": qwen3_like_tokenizer,
    "deepseek_v3": deepseek_v3_like_tokenizer,
    "bert": bert_like_tokenizer,
}
SCRATCH = Path(tempfile.mkdtemp(prefix="querit-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
# transformers copies the code of folders loaded with trust_remote_code there: not into the user's own cache.
dynamic_module_utils.HF_MODULES_CACHE = str(SCRATCH / "modules")

KINDS = list(TOKENIZERS)
CAUSAL_KINDS = ["qwen3", "deepseek_v3"]
MAX_LENGTH = 512


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[kind]()


def tiny_config(kind: str, **changes) -> PreTrainedConfig:
    tokenizer = tokenizer_of(kind)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen3":
        config = Qwen3Config(
            **shape, intermediate_size=96, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True
        )
    elif kind == "deepseek_v3":
        config = DeepseekV3Config(  # the first layer is dense, the second has experts
            **shape, intermediate_size=96, num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=8,
            num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, n_group=1, topk_group=1,
            q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        )  # fmt: skip
    else:
        config = BertConfig(**shape, intermediate_size=96)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def tiny_model(
    kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes
) -> QueritForSequenceClassification:
    """A model in eval mode whose scores differ clearly: with weights of the usual size, all pairs score the same."""
    model = QueritForSequenceClassification(tiny_config(kind, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name and parameter.dim() == 2:
                parameter.normal_(generator=generator)
            elif parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(std=0.1, generator=generator)
        model.relevance_head.weight.normal_(std=0.2, generator=generator)
        model.relevance_head.bias.normal_(std=0.2, generator=generator)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # as from_pretrained does: buffers like RoPE's stay in float32
    return model.eval()


def save_folder(folder: Path, kind: str, model: QueritForSequenceClassification | None = None, **kwargs) -> Path:
    """A hub folder as it is released: weights, config, code, tokenizer, prompt."""
    (model or tiny_model(kind)).save_pretrained(folder, **kwargs)
    tokenizer_of(kind).save_pretrained(folder)
    return folder


@cache
def folder_of(kind: str) -> Path:
    """The saved folder of `tiny_model(kind)`, made once per process: for reading only."""
    return save_folder(SCRATCH / "folders" / kind, kind)
