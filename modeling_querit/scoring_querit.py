"""Encoded pairs -> scores in the caller's order: batches by token budget, shared prefixes, back-off of memory."""

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from .prompting_querit import EncodedPair

logger = logging.get_logger(__name__)

# Padded tokens of a forward pass. On a CPU the batch whose activations stay in its cache is fastest, so where a token
# makes more of them (the width inside a feed-forward layer, or inside one expert), fewer tokens go together. On two
# cores, in bfloat16 and on mixed lengths, slices score as many pairs per second at 512 and at 1,024 tokens: of the 4B
# (9,728 wide) 8.6 and 6.9, of the 0.6B (3,072) 19.7 and 15.1, of the A0.4B (512) 12.1 and 13.1; Nano (1,536) 86 and 85.
BATCH_TOKENS_CPU, BATCH_TOKENS_CPU_WIDE, BATCH_TOKENS_GPU = 1024, 512, 16384
WIDE = 2048
# Computing the prompt once is worth its bookkeeping from this share of the tokens on.
LEAST_SHARED = 0.1
# Largest difference of a logit between two ways (batch, order, padding side, shared prefix) to score the same pair.
# Measured with random weights and logits of order 1, in 2 and 12 layers: 7e-6, 2e-2, 5e-2. In bfloat16 a mixture of
# experts may go beyond it (seen: 0.9 at 12 layers): rounding may choose another expert where two are nearly equal.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class NonFiniteScoreError(ValueError):
    """A score came out as nan or inf. `index` is the place of the pair among those given."""

    def __init__(self, index: int, value: float, dtype: torch.dtype):
        self.index, self.value, self.dtype = index, value, dtype
        super().__init__(f"Pair {index} scored {value} in {dtype}: load the model in float32, or check its weights.")

    def __reduce__(self):
        return type(self), (self.index, self.value, self.dtype)


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


def score_pairs(
    model: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    pad_token_id: int | None = None,
    batch_tokens: int | None = None,
    shared_prefix: bool | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Log-odds of relevance, float32 of shape `(len(pairs),)` on the CPU; the score is tanh(logit / 2).

    Args:
        model: a `QueritForSequenceClassification`.
        pad_token_id: any id of the vocabulary does; 0 if None.
        batch_tokens: most padded tokens of a forward pass; if None 1,024 on CPUs (512 for wide models), 16,384
            elsewhere. Halved when memory runs out.
        shared_prefix: compute the prompt of a query once for all its documents (causal backbones with full attention).
            None uses it where it saves a tenth of the tokens or more.
        progress: show a bar on a terminal, after three seconds.

    The same pair gets the same logit to `TOLERANCE[model.dtype]`, whatever stands beside it. Raises
    `NonFiniteScoreError` naming the pair, MemoryError when a single pair does not fit.
    """
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(model)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, not {batch_tokens}.")
    able = can_share_prefix(model)
    if shared_prefix and not able:
        raise ValueError(
            "shared_prefix needs a causal backbone with full attention, read out at its last token; leave it at None."
        )
    unique, places = unique_pairs(pairs)
    together: list[list[int]] = []
    alone = list(range(len(unique)))
    if able and shared_prefix is not False:
        together, alone = split_by_prefix(unique, shared_prefix)
    logits = torch.empty(len(unique), dtype=torch.float32)
    engine = _Engine(model, unique, pad_token_id or 0, batch_tokens)
    was_training = model.training
    model.eval()
    hide = None if progress else True  # None: where there is no terminal
    try:
        with torch.inference_mode(), tqdm(total=len(unique), desc="Scoring", unit="pair", delay=3, disable=hide) as bar:
            for batch, values in chain(engine.plain(alone), engine.shared(together)):
                logits[batch] = values
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return in_places(logits, places, model.dtype)


def default_batch_tokens(model: PreTrainedModel) -> int:
    if model.device.type != "cpu":
        return BATCH_TOKENS_GPU
    config = model.config
    width = getattr(config, "moe_intermediate_size", None) or getattr(
        config, "intermediate_size", 4 * config.hidden_size
    )
    return BATCH_TOKENS_CPU_WIDE if width > WIDE else BATCH_TOKENS_CPU


def padded_length(tokens: int) -> int:
    """The next of 16 lengths per octave, 3% longer on average.

    Each shape that was ever computed stays in memory, on a CPU as code compiled for it, on a GPU as blocks of the
    allocator: with a length for every number of tokens, memory would grow with the number of documents.
    """
    step = 1 << max(0, tokens.bit_length() - 5)
    return -(-tokens // step) * step


def unique_pairs(pairs: Sequence[EncodedPair]) -> tuple[list[EncodedPair], list[int]]:
    """The different pairs, and the place of each of `pairs` among them.

    Equal pairs are computed once: at another place of a batch, rounding could part their scores.
    """
    numbers: dict[EncodedPair, int] = {}
    places = [numbers.setdefault(pair._replace(truncated=False, span=None), len(numbers)) for pair in pairs]
    return list(numbers), places


def in_places(logits: torch.Tensor, places: list[int], dtype: torch.dtype) -> torch.Tensor:
    """`(unique pairs,)` -> `(pairs,)`. Raises `NonFiniteScoreError` for the first that is not finite."""
    logits = logits[torch.tensor(places, dtype=torch.long)]
    if not torch.isfinite(logits).all():
        index = int((~torch.isfinite(logits)).nonzero()[0])
        raise NonFiniteScoreError(index, logits[index].item(), dtype)
    return logits


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether prefixes can be computed by themselves: they never look at the document, nor the read-out at them."""
    layers = getattr(model.config, "layer_types", None) or []
    slides = not layers and getattr(model.config, "sliding_window", None)
    full = not slides and all(kind == "full_attention" for kind in layers)
    return bool(model.is_causal) and model.pooling == "last" and full


def split_by_prefix(pairs: Sequence[EncodedPair], force: bool | None) -> tuple[list[list[int]], list[int]]:
    """Indices of the pairs that share a prefix worth computing once, group by group, and of those that do not."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.prefix, []).append(index)
    together, alone = [], []
    for prefix, rows in groups.items():
        saved = (len(rows) - 1) * len(prefix)
        pays = saved >= LEAST_SHARED * sum(pairs[row].num_tokens for row in rows)
        if prefix and (force or (len(rows) > 1 and pays)):
            together.append(rows)
        else:
            alone += rows
    return together, alone


class _Engine:
    """Runs batches and keeps the token budget that memory allows."""

    def __init__(self, model: PreTrainedModel, pairs: Sequence[EncodedPair], pad_token_id: int, batch_tokens: int):
        self.model, self.pairs, self.pad_token_id, self.budget = model, pairs, pad_token_id, batch_tokens
        self.device = model.device

    def plain(self, rows: list[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Whole pairs, longest first: neighbours are of a length, and memory fails at the start if it does."""
        rows = sorted(rows, key=lambda row: -self.pairs[row].num_tokens)
        while rows:
            width = padded_length(self.pairs[rows[0]].num_tokens)
            batch = rows[: max(1, self.budget // width)]
            values = self.attempt(len(batch) * width, self.forward, batch)
            if values is not None:
                rows = rows[len(batch) :]
                yield batch, values

    def shared(self, groups: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Prompts of several queries at a time, then their documents, which attend to the prompts' keys and values."""
        groups = sorted(groups, key=lambda rows: -len(self.pairs[rows[0]].prefix))
        while groups:
            width = padded_length(len(self.pairs[groups[0][0]].prefix))
            chunk = groups[: max(1, self.budget // width)]
            cache = self.attempt(len(chunk) * width, self.forward_prefixes, [rows[0] for rows in chunk])
            if cache is None:
                continue
            groups = groups[len(chunk) :]
            group_of = {row: group for group, rows in enumerate(chunk) for row in rows}
            rows = sorted(group_of, key=lambda row: -self.pairs[row].num_tokens)
            while rows:
                batch: list[int] = []
                document = prefix = tokens = 0
                for row in rows:
                    pair = self.pairs[row]
                    document = max(document, padded_length(len(pair.document) + len(pair.suffix)))
                    prefix = max(prefix, padded_length(len(pair.prefix)))
                    if batch and (prefix + document) * (len(batch) + 1) > self.budget:
                        break
                    batch.append(row)
                    tokens = (prefix + document) * len(batch)
                values = self.attempt(tokens, self.forward_documents, batch, cache, [group_of[row] for row in batch])
                if values is not None:
                    rows = rows[len(batch) :]
                    yield batch, values

    def attempt(self, tokens: int, forward, batch: list[int], *args):
        """The result of a forward pass of so many padded tokens, or None if memory ran out.

        The budget is half of them then, and the caller tries again.
        """
        try:
            return forward(batch, *args)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                longest = self.pairs[batch[0]].num_tokens
                raise MemoryError(
                    f"A single pair of {longest} tokens does not fit into memory. Lower max_length, or use "
                    'long_documents="max_passage".'
                ) from error
        self.budget = max(1, tokens // 2)
        logger.warning(f"Out of memory; going on with batch_tokens={self.budget}.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        input_ids = pad_sequence(tensors, True, self.pad_token_id, side)
        mask = pad_sequence([torch.ones_like(row) for row in tensors], True, 0, side)
        more = padded_length(input_ids.shape[1]) - input_ids.shape[1]
        ends = (0, more) if side == "right" else (more, 0)
        input_ids, mask = pad(input_ids, ends, value=self.pad_token_id), pad(mask, ends)
        return input_ids.to(self.device), mask.to(self.device)

    def forward(self, batch: list[int]) -> torch.Tensor:
        input_ids, mask = self.pad([self.pairs[row].input_ids for row in batch])
        output = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return output.logits.squeeze(-1).cpu()

    def forward_prefixes(self, firsts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer."""
        input_ids, mask = self.pad([self.pairs[row].prefix for row in firsts], "left")
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.model.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]

    def forward_documents(
        self, batch: list[int], cache: list[tuple[torch.Tensor, torch.Tensor]], groups: list[int]
    ) -> torch.Tensor:
        pairs = [self.pairs[row] for row in batch]
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


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text or "allocate memory" in text
    )


@lru_cache
def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it clearly faster than float32, measured once (some 20 ms), else float32."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        best = float("inf")
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
        return best

    return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else torch.float32
