"""Encoded pairs -> scores in the caller's order: batches by token budget, shared prefixes, back-off of memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .layouts_querit import can_share_prefix, layout_of
from .linear_querit import pack_linear_layers
from .prompting_querit import EncodedPair

logger = logging.get_logger(__name__)

# Tokens of a forward pass. On a CPU the batch whose activations stay in its cache is fastest, so where a token makes
# more of them (the width inside a feed-forward layer), fewer tokens go together; and each of many experts should get
# enough. On two cores, in bfloat16: the 0.6B and the 4B (3,072 and 9,728 wide) are up to 20% and 3 to 8% faster at 256
# tokens than at 512, Nano (1,536) 5% at 1,024 than at 512, and the A0.4B up to 9% at 2,048 than at 1,024.
BATCH_TOKENS_CPU, BATCH_TOKENS_CPU_WIDE, BATCH_TOKENS_CPU_EXPERTS, BATCH_TOKENS_GPU = 1024, 256, 2048, 16384
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
        batch_tokens: most tokens of a forward pass, padding among them; if None 1,024 on CPUs (256 for wide models,
            2,048 for mixtures of experts), 16,384 elsewhere. Halved when memory runs out.
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
    if getattr(config, "moe_intermediate_size", None):
        return BATCH_TOKENS_CPU_EXPERTS
    width = getattr(config, "intermediate_size", 4 * config.hidden_size)
    return BATCH_TOKENS_CPU_WIDE if width > WIDE else BATCH_TOKENS_CPU


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
        self.pairs, self.budget, self.device = pairs, batch_tokens, model.device
        self.layout = layout_of(model, pad_token_id)

    def plain(self, rows: list[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Whole pairs, longest first: neighbours are of a length, and memory fails at the start if it does."""
        rows = sorted(rows, key=lambda row: -self.pairs[row].num_tokens)
        while rows:
            batch, tokens = self.batch(rows, lambda pair: pair.num_tokens)
            values = self.attempt(tokens, self.layout.whole, batch, [self.pairs[row] for row in batch])
            if values is not None:
                rows = rows[len(batch) :]
                yield batch, values

    def shared(self, groups: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Prompts of several queries at a time, then their documents, which attend to the prompts' keys and values."""
        groups = sorted(groups, key=lambda rows: -len(self.pairs[rows[0]].prefix))
        while groups:
            firsts, tokens = self.batch([rows[0] for rows in groups], lambda pair: len(pair.prefix))
            cache = self.attempt(tokens, self.layout.prefixes, firsts, [self.pairs[row].prefix for row in firsts])
            if cache is None:
                continue
            chunk, groups = groups[: len(firsts)], groups[len(firsts) :]
            group_of = {row: group for group, rows in enumerate(chunk) for row in rows}
            rows = sorted(group_of, key=lambda row: -self.pairs[row].num_tokens)
            while rows:
                batch, tokens = self.batch(
                    rows, lambda pair: len(pair.document) + len(pair.suffix), lambda pair: len(pair.prefix)
                )
                pairs, places = [self.pairs[row] for row in batch], [group_of[row] for row in batch]
                values = self.attempt(tokens, self.layout.documents, batch, pairs, cache, places)
                if values is not None:
                    rows = rows[len(batch) :]
                    yield batch, values

    def batch(
        self, rows: list[int], length: Callable[[EncodedPair], int], past: Callable[[EncodedPair], int] = lambda pair: 0
    ) -> tuple[list[int], int]:
        """As many of the first rows as the budget allows, one at least, and the tokens that they count."""
        batch: list[int] = []
        longest = longest_past = total = tokens = 0
        for row in rows:
            pair = self.pairs[row]
            longest, longest_past = max(longest, length(pair)), max(longest_past, past(pair))
            total += length(pair)
            more = self.layout.tokens(len(batch) + 1, longest, longest_past, total)
            if batch and more > self.budget:
                break
            batch.append(row)
            tokens = more
        return batch, tokens

    def attempt(self, tokens: int, forward: Callable, batch: list[int], *args):
        """The result of a forward pass of so many tokens for the rows of `batch`, or None if memory ran out.

        The budget is half of them then, and the caller tries again.
        """
        try:
            return forward(*args)
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


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text or "allocate memory" in text
    )


@lru_cache
def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it clearly faster than float32, measured once (0.2 s), else float32."""
    best: dict[torch.dtype, float] = {}
    layers = {dtype: nn.Linear(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    for layer in layers.values():
        pack_linear_layers(layer)
    with torch.inference_mode():
        for _ in range(8):  # in turns, so that whatever else runs here slows both; the first one warms up
            for dtype, layer in layers.items():
                rows = torch.ones(256, 1024, dtype=dtype)
                start = time.perf_counter()
                layer(rows)
                best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - start)
    return torch.bfloat16 if best[torch.bfloat16] < 0.8 * best[torch.float32] else torch.float32
