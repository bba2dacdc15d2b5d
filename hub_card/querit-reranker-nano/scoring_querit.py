"""Encoded pairs -> scores in the caller's order: batches by token budget, shared prefixes, back-off of memory."""

import copy
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from .prompting_querit import EncodedPair

logger = logging.get_logger(__name__)

# Tokens of a forward pass. On a CPU the batch whose activations stay in its cache is fastest, so where a token makes
# more of them (the width inside a feed-forward layer), fewer tokens go together. On two cores, in bfloat16, the 0.6B
# and the 4B (3,072 and 9,728 wide) are up to 20% and 8% faster at 256 tokens than at 512, Nano (1,536) 5% at 1,024.
BATCH_TOKENS_CPU, BATCH_TOKENS_CPU_WIDE, BATCH_TOKENS_GPU = 1024, 256, 16384
WIDE = 2048
# Computing the prompt once pays where it saves this share of the tokens, and the documents fill this share of a batch.
LEAST_SHARED, LEAST_FILLED = 0.1, 0.25
# Largest difference of a logit between two ways (batch, order, padding side, shared prefix) to score the same pair.
# In bfloat16 a mixture of experts may go beyond it: rounding may choose another expert where two are nearly equal.
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
        batch_tokens: most tokens of a forward pass, padding among them; if None 1,024 on CPUs (256 for wide models),
            16,384 elsewhere. Halved when memory runs out.
        shared_prefix: compute the prompt of a query once for all its documents (causal backbones with full attention).
            None uses it where it saves a tenth of the tokens or more.
        progress: show a bar on a terminal, after three seconds.

    The same pair gets the same logit to `TOLERANCE[model.dtype]`, whatever stands beside it. Raises
    `NonFiniteScoreError` naming the pair, MemoryError when a single pair does not fit.
    """
    batch_tokens = default_batch_tokens(model) if batch_tokens is None else batch_tokens
    able = can_share_prefix(model)
    if shared_prefix and not able:
        raise ValueError(
            "shared_prefix needs a causal backbone with full attention, read at its last token; give None."
        )
    numbers: dict[EncodedPair, int] = {}
    places = [numbers.setdefault(pair._replace(truncated=False, span=None), len(numbers)) for pair in pairs]
    unique = list(numbers)
    together: list[list[int]] = []
    alone = list(range(len(unique)))
    if able and shared_prefix is not False:
        together, alone = split_by_prefix(unique, shared_prefix, batch_tokens)
    logits = torch.empty(len(unique), dtype=torch.float32)
    engine = _Engine(model, unique, pad_token_id or 0, batch_tokens)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(unique), desc="Scoring", unit="pair", delay=3, disable=None if progress else True)
    try:
        with torch.inference_mode(), bar:
            for batch, values in chain(engine.whole(alone), *map(engine.shared, together)):
                logits[batch] = values
                bar.update(len(batch))
    finally:
        model.train(was_training)
    logits = logits[torch.tensor(places, dtype=torch.long)]
    if not torch.isfinite(logits).all():
        index = int((~torch.isfinite(logits)).nonzero()[0])
        raise NonFiniteScoreError(index, logits[index].item(), model.dtype)
    return logits


def default_batch_tokens(model: PreTrainedModel) -> int:
    if model.device.type != "cpu":
        return BATCH_TOKENS_GPU
    width = getattr(model.config, "intermediate_size", 4 * model.config.hidden_size)
    return BATCH_TOKENS_CPU_WIDE if width > WIDE else BATCH_TOKENS_CPU


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether prefixes can be computed by themselves: they never look at the document, nor the read-out at them."""
    slides = getattr(model.config, "sliding_window", None)
    layers = getattr(model.config, "layer_types", None) or ["sliding_attention" if slides else "full_attention"]
    return bool(model.is_causal) and model.pooling == "last" and set(layers) == {"full_attention"}


def split_by_prefix(
    pairs: Sequence[EncodedPair], force: bool | None, batch_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Indices of the pairs that share a prefix worth computing once, group by group, and of those that do not."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.prefix, []).append(index)
    together, alone = [], []
    for prefix, rows in groups.items():
        tokens, saved = sum(pairs[row].num_tokens for row in rows), (len(rows) - 1) * len(prefix)
        pays = saved >= LEAST_SHARED * tokens and tokens - saved >= LEAST_FILLED * batch_tokens
        if prefix and (force or (len(rows) > 1 and pays)):
            together.append(rows)
        else:
            alone += rows
    return together, alone


def padded_length(tokens: int) -> int:
    """The next of 16 lengths per octave, 3% longer on average.

    Each shape that was ever computed stays in memory, on a CPU as code compiled for it, on a GPU as blocks of the
    allocator: with a length for every number of tokens, memory would grow with the number of documents.
    """
    step = 1 << max(0, tokens.bit_length() - 5)
    return -(-tokens // step) * step


class _Engine:
    """Runs batches and keeps the token budget that memory allows."""

    def __init__(self, model: PreTrainedModel, pairs: Sequence[EncodedPair], pad_token_id: int, batch_tokens: int):
        self.model, self.pairs, self.pad_token_id, self.budget = model, pairs, pad_token_id, batch_tokens

    def whole(self, rows: list[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        def forward(pairs: list[EncodedPair]) -> torch.Tensor:
            ids, mask = self.pad([pair.input_ids for pair in pairs])
            options = {}
            if any(pair.document_type for pair in pairs):  # segments, of backbones that know them
                options["token_type_ids"] = mask * self.pad([pair.token_type_ids for pair in pairs])[0]
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits

        return self.batches(rows, 0, forward)

    def shared(self, rows: list[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Pairs with the same prefix: it is computed once, and the rest of each attends to its keys and values."""
        prefix = self.pairs[rows[0]].prefix
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([prefix], device=self.model.device)
        self.attempt(len(prefix), rows[:1], self.model.model, input_ids=ids, past_key_values=cache, use_cache=True)

        def after_prefix(pairs: list[EncodedPair]) -> torch.Tensor:
            ids, mask = self.pad([[*pair.document, *pair.suffix] for pair in pairs])
            past = copy.deepcopy(cache)  # each pass adds to the one that it is given
            past.batch_repeat_interleave(len(pairs))
            mask = torch.cat([mask.new_ones(len(pairs), len(prefix)), mask], 1)
            return self.model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True).logits

        yield from self.batches(rows, len(prefix), after_prefix)

    def batches(self, rows: list[int], past: int, forward: Callable) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Longest first: neighbours are of a length, and memory fails at the start if it does."""
        rows = sorted(rows, key=lambda row: -self.pairs[row].num_tokens)
        while rows:
            width = padded_length(self.pairs[rows[0]].num_tokens - past) + past
            batch = rows[: max(1, self.budget // width)]
            logits = self.attempt(width * len(batch), batch, forward, [self.pairs[row] for row in batch])
            if logits is not None:
                rows = rows[len(batch) :]
                yield batch, logits.squeeze(-1).cpu()

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(tensors, True, self.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in tensors], True)
        more = (0, padded_length(ids.shape[1]) - ids.shape[1])
        return pad(ids, more, value=self.pad_token_id).to(self.model.device), pad(mask, more).to(self.model.device)

    def attempt(self, tokens: int, batch: list[int], forward: Callable, *args, **kwargs):
        """The result of a forward pass of so many tokens for the rows of `batch`, or None if memory ran out.

        The budget is half of them then, and the caller tries again.
        """
        try:
            return forward(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or re.search("(out of|allocate) memory", str(error), re.IGNORECASE)):
                raise
            if len(batch) == 1:
                longest = self.pairs[batch[0]].num_tokens
                raise MemoryError(
                    f"A single pair of {longest} tokens does not fit into memory. Lower max_length, or use "
                    'long_documents="max_passage".'
                ) from error
        self.budget = max(1, tokens // 2)
        logger.warning(f"Out of memory; going on with batch_tokens={self.budget}.")
        torch.cuda.empty_cache()  # nothing elsewhere


@lru_cache
def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it clearly faster than float32, measured once (0.3 s), else float32."""
    dtypes, best = (torch.bfloat16, torch.float32), dict.fromkeys((torch.bfloat16, torch.float32), float("inf"))
    layers = {dtype: nn.Linear(768, 768, dtype=dtype) for dtype in dtypes}
    with torch.inference_mode():
        for dtype in dtypes * 8:  # in turns, so that whatever else runs here slows both; the first one warms up
            rows = torch.ones(256, 768, dtype=dtype)
            start = time.perf_counter()
            layers[dtype](rows)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return torch.bfloat16 if best[torch.bfloat16] < 0.8 * best[torch.float32] else torch.float32
