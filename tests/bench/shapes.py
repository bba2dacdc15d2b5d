"""Hub folders of the family's true shapes with random weights, for benchmarks where the weights cannot be had.

Widths, heads, experts and vocabulary are those of the released models, so a layer costs what theirs costs; `layers`
may be fewer, so that several ways to run one stand in memory at once. Weights are bfloat16, as released.
"""

from pathlib import Path

import torch
from transformers import DeepseekV3Config, PreTrainedConfig, Qwen3Config

from hub_card.sentence_transformers_files import write_sentence_transformers_files
from modeling_querit.modeling_querit import QueritForSequenceClassification
from tests.tokenizers_for_tests import deepseek_v3_like_tokenizer, qwen3_like_tokenizer

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"
MAX_LENGTH = 4096


def config_06b(layers: int = 28) -> Qwen3Config:
    """Qwen3 as in Qwen3-Reranker-0.6B and Qwen3-Embedding-0.6B."""
    return Qwen3Config(
        vocab_size=151_670, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=40_960,
    )  # fmt: skip


def config_4b(layers: int = 36) -> Qwen3Config:
    """Querit-Reranker-4B: 4,021,782,018 parameters with all of its layers."""
    return Qwen3Config(
        vocab_size=151_666, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=40_960,
    )  # fmt: skip


def config_a04b(layers: int = 24) -> DeepseekV3Config:
    """Querit-Reranker-A0.4B. The sizes of MLA, one shared expert and the first layer's width are ours, such that the
    totals are the published ones to 0.1%: 4.92 B parameters, 434 M of them active."""
    return DeepseekV3Config(
        vocab_size=128_816, hidden_size=1024, intermediate_size=5376, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, n_routed_experts=128, num_experts_per_tok=4, n_shared_experts=1, moe_intermediate_size=512,
        first_k_dense_replace=1, n_group=1, topk_group=1, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def config_dense04b(layers: int = 24) -> Qwen3Config:
    """A dense model that multiplies each token by as many weights as A0.4B does: what the mixture is measured by."""
    return Qwen3Config(
        vocab_size=128_816, hidden_size=1024, intermediate_size=2720, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


def random_model(config: PreTrainedConfig) -> QueritForSequenceClassification:
    """Weights of std 0.02 in bfloat16, made in place: a whole 4B stands in memory once."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        return QueritForSequenceClassification(config)
    finally:
        torch.set_default_dtype(default)


def write_folder(folder: Path, config: PreTrainedConfig) -> Path:
    """A folder that every engine loads; shards of at most 5 GB."""
    tokenizer = deepseek_v3_like_tokenizer() if config.model_type == "deepseek_v3" else qwen3_like_tokenizer()
    tokenizer.model_max_length = MAX_LENGTH
    model = random_model(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sentence_transformers_files(folder, model.head.weight, model.head.bias, model.pooling, chat_template=True)
    return folder


def linear_parameters(config: PreTrainedConfig) -> int:
    """Weights that each token is multiplied by: of a mixture, those of the experts it goes to; no head's, nor a
    pooler's, which are multiplied by once a pair."""
    with torch.device("meta"):
        model = QueritForSequenceClassification(config)
    model.model.pooler = None
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    all_of_them = sum(p.numel() for p in model.model.parameters() if p.dim() > 1)
    embeddings = sum(p.numel() for name, p in model.model.named_parameters() if "embed" in name and p.dim() > 1)
    active = experts * config.num_experts_per_tok // config.n_routed_experts if experts else 0
    return all_of_them - embeddings - experts + active
