"""Attention for bfloat16 on a CPU, where PyTorch's fused kernel (2.13) takes 2 to 4 times as long.

That kernel multiplies its small blocks without the CPU's bfloat16 instructions. Here queries are taken a block at a
time, so that scores stay in the cache, and each block is two batched products, which do use them. Heads that share
keys (grouped-query attention) are rows of one product: keys are never repeated. Of causal attention only the keys up
to the end of the block are read.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Queries of a block. On two cores of an EPYC, four rows of 500 tokens and 12 heads of 32 take 8 ms in blocks of 64, 11
# in blocks of 128, and 23 in one.
BLOCK = 64
# Keys are padded to a multiple of this: the softmax of a row of 186 takes twice as long as that of a row of 192.
KEYS_MULTIPLE = 32


def bfloat16_cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers.

    query `(batch, heads, queries, size)`, key and value `(batch, key_heads, keys, size)`, attention_mask bool
    `(batch, 1, queries, keys)`, True = attends, or None: all, or the causal ones. Returns
    `(batch, queries, heads, size)`. Anywhere else, and with dropout or a position bias, it is PyTorch's own.
    """
    other = kwargs.get("dropout") or kwargs.get("position_bias") is not None
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or other:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1:3]
    group, past = heads // key_heads, keys - queries
    is_causal = kwargs.get("is_causal")
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    padding = -keys % KEYS_MULTIPLE
    bias = None
    if attention_mask is not None or causal or padding:
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
            attention_mask = attention_mask.tril(past) if causal else attention_mask
        # The smallest number and not -inf: a row of padding, which sees no key, must not become nan.
        lowest = torch.finfo(query.dtype).min
        bias = query.new_full((*attention_mask.shape[:3], keys + padding), lowest)
        bias[..., :keys].masked_fill_(attention_mask, 0)
        bias = bias.unsqueeze(2)  # one for all heads of a group
    key, value = (nn.functional.pad(x, (0, 0, 0, padding)).flatten(0, 1) for x in (key, value))
    key = key.transpose(1, 2)
    query = query * (size**-0.5 if scaling is None else scaling)
    output = query.new_empty(batch, queries, heads, value.shape[-1])
    for start in range(0, queries, BLOCK):
        rows = slice(start, min(start + BLOCK, queries))
        seen = keys + padding
        if causal:
            seen = min(seen, past + rows.stop + -(past + rows.stop) % KEYS_MULTIPLE)
        block = query[:, :, rows].reshape(batch * key_heads, -1, size)
        scores = torch.bmm(block, key[:, :, :seen]).view(batch, key_heads, group, -1, seen)
        scores = scores if bias is None else scores + bias[..., rows, :seen]
        weights = scores.softmax(-1).view(batch * key_heads, -1, seen)
        found = torch.bmm(weights, value[:, :seen]).view(batch, heads, -1, value.shape[-1])
        output[:, rows] = found.transpose(1, 2)
    return output, None


def use_fast_cpu_kernels(model: PreTrainedModel) -> None:
    """Set what is faster on a CPU than what transformers sets by itself; an implementation asked for is kept."""
    if model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(bfloat16_cpu_attention.__name__)
    # Expert after expert, each with its own small tensors: the grouped product is a loop on a CPU, over large ones.
    if model.config._experts_implementation == "grouped_mm" and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


AttentionInterface.register(bfloat16_cpu_attention.__name__, bfloat16_cpu_attention)
AttentionMaskInterface.register(bfloat16_cpu_attention.__name__, sdpa_mask)
