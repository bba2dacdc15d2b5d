"""A batch of token sequences -> logits: in rows padded to one length or, on a CPU, laid end to end in one row.

Both layouts give the same three passes: whole pairs, prompts by themselves, and documents after their prompts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .attention_querit import Prefix, Spans, bfloat16_cpu_attention
from .prompting_querit import EncodedPair

# Backbones that hand what they do not know on to their attention, and take positions as they are told.
END_TO_END = ("qwen3", "deepseek_v3")


def padded_length(tokens: int) -> int:
    """The next of 16 lengths per octave, 3% longer on average.

    Each shape that was ever computed stays in memory, on a CPU as code compiled for it, on a GPU as blocks of the
    allocator: with a length for every number of tokens, memory would grow with the number of documents.
    """
    step = 1 << max(0, tokens.bit_length() - 5)
    return -(-tokens // step) * step


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether prefixes can be computed by themselves: they never look at the document, nor the read-out at them."""
    layers = getattr(model.config, "layer_types", None) or []
    slides = not layers and getattr(model.config, "sliding_window", None)
    full = not slides and all(kind == "full_attention" for kind in layers)
    return bool(model.is_causal) and model.pooling == "last" and full


def layout_of(model: PreTrainedModel, pad_token_id: int) -> "Padded | EndToEnd":
    """End to end where that is the faster: no token is padding, and every batch is as large as it should be."""
    known = can_share_prefix(model) and model.config.model_type in END_TO_END
    fast = model.config._attn_implementation == bfloat16_cpu_attention.__name__ and model.device.type == "cpu"
    return (EndToEnd if known and fast and model.dtype == torch.bfloat16 else Padded)(model, pad_token_id)


class Padded:
    """One row for each sequence. Prompts are padded on the left, so that documents can follow them."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int):
        self.model, self.pad_token_id, self.device = model, pad_token_id, model.device

    @staticmethod
    def tokens(count: int, longest: int, longest_past: int, total: int) -> int:
        """What a batch of so many sequences, of so many tokens in all, counts of its budget."""
        return (padded_length(longest) + padded_length(longest_past)) * count

    def whole(self, pairs: Sequence[EncodedPair]) -> torch.Tensor:
        input_ids, mask = self.pad([pair.input_ids for pair in pairs])
        output = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return output.logits.squeeze(-1).cpu()

    def prefixes(self, prefixes: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer."""
        input_ids, mask = self.pad(prefixes, "left")
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.model.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]

    def documents(self, pairs: Sequence[EncodedPair], cache: list, groups: list[int]) -> torch.Tensor:
        """`groups`: the place of each pair's prompt among those of `cache`."""
        input_ids, mask = self.pad([[*pair.document, *pair.suffix] for pair in pairs])
        _, prefix_mask = self.pad([pair.prefix for pair in pairs], "left")
        layers: list[Any] = []
        for keys, values in cache:
            rows = torch.tensor(groups, device=keys.device)
            layers.append(SharedPrefixLayer(keys, values, rows, width=prefix_mask.shape[1]))
        output = self.model(
            input_ids=input_ids,
            attention_mask=torch.cat([prefix_mask, mask], dim=1),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        return output.logits.squeeze(-1).cpu()

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        input_ids = pad_sequence(tensors, True, self.pad_token_id, side)
        mask = pad_sequence([torch.ones_like(row) for row in tensors], True, 0, side)
        more = padded_length(input_ids.shape[1]) - input_ids.shape[1]
        ends = (0, more) if side == "right" else (more, 0)
        input_ids, mask = pad(input_ids, ends, value=self.pad_token_id), pad(mask, ends)
        return input_ids.to(self.device), mask.to(self.device)


class SharedPrefixLayer(DynamicLayer):
    """Keys and values of the queries' prompts for the rows of one batch; never stored per row, never grown."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, width: int):
        super().__init__()
        # Prompts are padded on the left: the last `width` columns hold all of the rows' prompts.
        self.keys, self.values = keys[:, :, keys.shape[2] - width :], values[:, :, values.shape[2] - width :]
        self.rows = rows
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        keys, values = (past[self.rows] for past in (self.keys, self.values) if past is not None)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class EndToEnd:
    """All sequences in one row, which attention takes apart; the last token of each is read out."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int):
        self.model, self.pad_token_id = model, pad_token_id

    @staticmethod
    def tokens(count: int, longest: int, longest_past: int, total: int) -> int:
        return total

    def whole(self, pairs: Sequence[EncodedPair]) -> torch.Tensor:
        return self.logits([pair.input_ids for pair in pairs], [Prefix() for _ in pairs])

    def prefixes(self, prefixes: Sequence[Sequence[int]]) -> list[Prefix]:
        computed = [Prefix(len(prefix), {}) for prefix in prefixes]
        self.run(prefixes, Spans([Prefix() for _ in prefixes], computed))
        return computed

    def documents(self, pairs: Sequence[EncodedPair], cache: list[Prefix], groups: list[int]) -> torch.Tensor:
        return self.logits([[*pair.document, *pair.suffix] for pair in pairs], [cache[group] for group in groups])

    def logits(self, sequences: Sequence[Sequence[int]], prefixes: list[Prefix]) -> torch.Tensor:
        spans = Spans(prefixes)
        hidden = self.run(sequences, spans)
        return self.model.head(hidden[torch.tensor(spans.starts[1:]) - 1]).diff(dim=-1).squeeze(-1)  # type: ignore[operator]

    def run(self, sequences: Sequence[Sequence[int]], spans: Spans) -> torch.Tensor:
        """Hidden states `(tokens, hidden_size)`, with some padding at the end."""
        ids = [token for sequence in sequences for token in sequence]
        positions: list[int] = []
        for sequence, prefix in zip(sequences, spans.prefixes, strict=True):
            spans.add(len(sequence))
            positions += range(prefix.length, prefix.length + len(sequence))
        padding = padded_length(len(ids)) - len(ids)
        output = self.model.model(
            input_ids=torch.tensor([ids + [self.pad_token_id] * padding]),
            position_ids=torch.tensor([positions + [0] * padding]),
            use_cache=False,
            spans=spans,
        )
        return output.last_hidden_state[0]
