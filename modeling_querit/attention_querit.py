"""Attention for bfloat16 on a CPU, where PyTorch's fused kernel (2.13) takes 2 to 4 times as long.

That kernel multiplies its small blocks without the CPU's bfloat16 instructions. Here queries are taken a block at a
time, so that scores stay in the cache, and each block is two batched products, which do use them. Heads that share
keys (grouped-query attention) are rows of one product: keys are never repeated. Of causal attention only the keys up
to the end of the block are read.
"""

from dataclasses import dataclass, field
from typing import Any

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
# Queries of sequences laid end to end are padded to a multiple of this, so that the shapes of blocks are few.
QUERIES_MULTIPLE = 16


@dataclass
class Prefix:
    """What a sequence continues: so many tokens, and each layer's keys and values `(key_heads, length, size)`."""

    length: int = 0
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass
class Spans:
    """Sequences laid end to end in one row; each attends to its prefix and causally to itself.

    prefixes: of each sequence. computed: where the sequences' own keys and values are kept, to be prefixes of others.
    """

    prefixes: list[Prefix]
    computed: list[Prefix] | None = None
    starts: list[int] = field(default_factory=lambda: [0])  # and the last one's end

    def add(self, tokens: int) -> None:
        self.starts.append(self.starts[-1] + tokens)


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
    `(batch, queries, heads, size)`. Anywhere else, and with dropout or a position bias, it is PyTorch's own. With
    `spans` among kwargs, the one row is the sequences that they tell, and no mask counts.
    """
    if kwargs.get("spans") is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer: Any = module.layer_idx
        return end_to_end_attention(layer, query[0] * scaling, key[0], value[0], kwargs["spans"])[None], None
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


def end_to_end_attention(
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans
) -> torch.Tensor:
    """query `(heads, tokens, size)`, scaled; key and value `(key_heads, tokens, size)` -> `(tokens, heads, size)`."""
    heads, tokens, size = query.shape
    key_heads = key.shape[0]
    output = value.new_zeros(tokens, heads, value.shape[-1])
    # What follows a sequence in the row stands in for the padding of its queries: their results go nowhere.
    query = nn.functional.pad(query, (0, 0, 0, QUERIES_MULTIPLE)).view(key_heads, heads // key_heads, -1, size)
    nothing = [x.new_zeros(key_heads, QUERIES_MULTIPLE + KEYS_MULTIPLE, x.shape[-1]) for x in (key, value)]
    future = query.new_full((BLOCK, BLOCK + KEYS_MULTIPLE), torch.finfo(query.dtype).min).triu(1)
    for number, prefix in enumerate(spans.prefixes):
        start, stop = spans.starts[number : number + 2]
        past, length = prefix.length, stop - start + -(stop - start) % QUERIES_MULTIPLE
        own = key[:, start:stop], value[:, start:stop]
        if spans.computed is not None:
            spans.computed[number].layers[layer] = own
        # Keys are padded in earnest: a number that is not finite would get through a mask.
        padding = length - (stop - start) + -(past + length) % KEYS_MULTIPLE
        parts = [own, tuple(x[:, :padding] for x in nothing)]
        if past:
            parts.insert(0, prefix.layers[layer])
        keys, values = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        keys = keys.transpose(1, 2)
        for first in range(0, length, BLOCK):
            rows = min(BLOCK, length - first)
            seen = past + first + rows + -(past + first + rows) % KEYS_MULTIPLE
            block = query[:, :, start + first : start + first + rows].reshape(key_heads, -1, size)
            scores = torch.bmm(block, keys[:, :, :seen])
            latest = scores.view(key_heads, -1, rows, seen)[..., past + first :]
            latest += future[:rows, : latest.shape[-1]]
            found = torch.bmm(scores.softmax(-1), values[:, :seen]).view(heads, rows, -1)
            real = min(rows, stop - start - first)
            output[start + first : start + first + real] = found[:, :real].transpose(0, 1)
    return output


def use_fast_cpu_kernels(model: PreTrainedModel) -> None:
    """Set what is faster on a CPU than what transformers sets by itself; an implementation asked for is kept."""
    if model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(bfloat16_cpu_attention.__name__)
    # Expert after expert, each with its own small tensors: the grouped product is a loop on a CPU, over large ones.
    if model.config._experts_implementation == "grouped_mm" and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


AttentionInterface.register(bfloat16_cpu_attention.__name__, bfloat16_cpu_attention)
AttentionMaskInterface.register(bfloat16_cpu_attention.__name__, sdpa_mask)
