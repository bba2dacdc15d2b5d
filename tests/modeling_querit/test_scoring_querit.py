"""The engine: the same score for a pair however it is batched, budgets kept, memory running out, bad scores named."""

import itertools
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_querit import scoring_querit
from modeling_querit.prompting_querit import EncodedPair, PromptEncoder
from modeling_querit.scoring_querit import (
    TOLERANCE,
    NonFiniteScoreError,
    can_share_prefix,
    default_batch_tokens,
    fastest_cpu_dtype,
    padded_length,
    score_pairs,
    split_by_prefix,
)
from tests.modeling_querit.bar_for_tests import RecordingBar
from tests.models_for_tests import CAUSAL_KINDS, KINDS, MAX_LENGTH, tiny_model, tokenizer_of
from tests.tokenizers_for_tests import CORPUS

QUERIES = ["rain?", "Where does the train to Köln stop on its way, and when does it leave?", "図書館"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
model_of = cache(tiny_model)


@cache
def pairs_of(kind: str) -> list[EncodedPair]:
    """Three queries with documents from one word to more than fits, not in order of length."""
    encoder = PromptEncoder(tokenizer_of(kind), MAX_LENGTH)
    documents = [CORPUS[8], "oil", " ".join(CORPUS), CORPUS[14], CORPUS[12] * 3, CORPUS[15]]
    return [pair for query in QUERIES for pair in encoder.encode(query, documents)]


@cache
def alone(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The reference: each pair by itself, unpadded, straight through the model."""
    with torch.no_grad():
        return torch.cat([model_of(kind, dtype)(**inputs_of(kind, pair)).logits[0] for pair in pairs_of(kind)])


def inputs_of(kind: str, pair: EncodedPair) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor([pair.input_ids])}
    return {**inputs, "token_type_ids": torch.tensor([pair.token_type_ids])} if kind == "bert" else inputs


def pair(prefix: int, document: int, seed: int = 0) -> EncodedPair:
    """A pair of so many tokens; prefixes of one length and seed are equal."""
    head = torch.randint(5, 900, (prefix,), generator=torch.Generator().manual_seed(prefix * 100 + seed))
    body = torch.randint(5, 900, (document,), generator=torch.Generator().manual_seed(document + 7919 * (seed + 1)))
    return EncodedPair(tuple(head.tolist()), tuple(body.tolist()), (1005,), False, None)


class Spy:
    """Sees the backbone's passes: rows, padded width (cached tokens too). Memory ends above `limit` padded tokens."""

    def __init__(self, model, limit: int | None = None):
        self.model, self.limit, self.passes, self.failed = model, limit, [], []

    def __enter__(self):
        self.hook = self.model.model.register_forward_pre_hook(self.see, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def see(self, module, args, kwargs):
        rows, width = kwargs.get("attention_mask", kwargs["input_ids"]).shape
        if self.limit is not None and rows * width > self.limit:
            self.failed.append((rows, width))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.passes.append((rows, width, kwargs["input_ids"].shape[1] < width))


# ---------------------------------------------------------------- the same score, whatever stands beside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "shared_prefix"),
    [(kind, shared) for kind in KINDS for shared in (None, False, True) if kind in CAUSAL_KINDS or not shared],
)
@pytest.mark.parametrize("batch_tokens", [1, 700, 4000, 16384])
@pytest.mark.parametrize("order", ["given", "shuffled"])
def test_a_pair_scores_the_same_in_any_company(kind, dtype, shared_prefix, batch_tokens, order):
    pairs, expected = pairs_of(kind), alone(kind, dtype)
    at = list(range(len(pairs)))
    if order == "shuffled":
        at = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(2)).tolist()
    with Spy(model_of(kind, dtype)) as spy:
        logits = score_pairs(model_of(kind, dtype), [pairs[i] for i in at], 0, batch_tokens, shared_prefix)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(pairs),)
    assert (logits - expected[at]).abs().max() <= TOLERANCE[dtype]
    if shared_prefix is not None or batch_tokens < 1000:  # in larger batches, several queries' pairs go together
        assert any(shared for *_, shared in spy.passes) == (kind in CAUSAL_KINDS and shared_prefix is not False)
    assert expected.std() > 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_scores_as_alone(kind, dtype, side):
    tensors = [torch.tensor(pair.input_ids) for pair in pairs_of(kind)]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, True, 3, side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], True, 0, side)
    with torch.no_grad():
        types = [inputs_of(kind, pair).get("token_type_ids") for pair in pairs_of(kind)]
        options = {}
        if kind == "bert":
            options["token_type_ids"] = torch.nn.utils.rnn.pad_sequence([row[0] for row in types], True, 0, side)
        logits = model_of(kind, dtype)(ids, mask, **options).logits.squeeze(-1)
    assert (logits - alone(kind, dtype)).abs().max() <= TOLERANCE[dtype]


def test_tolerances_are_a_promise_worth_something():
    assert TOLERANCE[torch.float32] < TOLERANCE[torch.float16] < TOLERANCE[torch.bfloat16]
    assert TOLERANCE[torch.bfloat16] < alone("qwen3", torch.float32).std() / 4


def test_a_single_pair_and_none_at_all():
    assert score_pairs(model_of("qwen3"), []).shape == (0,)
    [logit] = score_pairs(model_of("qwen3"), pairs_of("qwen3")[:1])
    assert logit.item() == pytest.approx(alone("qwen3", torch.float32)[0].item(), abs=1e-5)


# ---------------------------------------------------------------- batches


lengths = st.tuples(st.sampled_from([0, 1, 9, 25]), st.integers(1, 30), st.integers(0, 2))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(lengths, max_size=14), st.integers(1, 300), st.sampled_from([None, False, True]))
def test_every_pair_once_in_order_and_within_the_budget(sizes, budget, shared_prefix):
    model, pairs = model_of("qwen3"), [pair(*size) for size in sizes]
    with Spy(model) as spy:
        logits = score_pairs(model, pairs, 0, budget, shared_prefix)
    with torch.no_grad():
        expected = [model(torch.tensor([p.input_ids])).logits.item() for p in pairs]
    assert logits.tolist() == pytest.approx(expected, abs=1e-4)
    for rows, width, _ in spy.passes:
        assert rows * width <= budget or rows == 1
    pairs = list(dict.fromkeys(pairs))  # equal ones are computed once
    if shared_prefix is False:
        assert sum(rows for rows, *_ in spy.passes) == len(pairs)
        assert not any(shared for *_, shared in spy.passes)
    else:  # those that share, and in passes of their own: the others and the prefixes
        together, others = split_by_prefix(pairs, shared_prefix, budget)
        assert sorted([*others, *(row for rows in together for row in rows)]) == list(range(len(pairs)))
        assert sum(rows for rows, _, shared in spy.passes if shared) == sum(map(len, together))
        assert sum(rows for rows, _, shared in spy.passes if not shared) == len(together) + len(others)


def test_the_longest_come_first_and_batches_are_filled():
    pairs = [pair(0, size) for size in (4, 59, 9, 29, 14, 24, 19, 5)]
    with Spy(model_of("qwen3")) as spy:
        score_pairs(model_of("qwen3"), pairs, batch_tokens=60)
    assert [(rows, width) for rows, width, _ in spy.passes] == [(1, 60), (2, 30), (3, 20), (2, 6)]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40_000))
def test_lengths_are_few_and_little_longer(tokens):
    assert tokens <= padded_length(tokens) <= tokens * 17 / 16
    assert padded_length(padded_length(tokens)) == padded_length(tokens)
    octave = range(2 ** (tokens.bit_length() - 1), 2 ** tokens.bit_length())
    assert len(set(map(padded_length, octave[:: max(1, len(octave) // 1024)]))) <= 17


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_many_lengths_are_computed_in_few_shapes(shared_prefix):
    """What was compiled for a shape stays in memory."""
    pairs = [pair(20, size) for size in range(60, 250)]
    with Spy(model_of("qwen3")) as spy:
        score_pairs(model_of("qwen3"), pairs, batch_tokens=600, shared_prefix=shared_prefix)
    assert len({width for _, width, _ in spy.passes}) < 45


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"hidden_size": 384, "intermediate_size": 1536}, 1024),
        ({"hidden_size": 2560, "intermediate_size": 9728}, 256),
        ({"hidden_size": 1024}, 256),
    ],
)
def test_a_batch_on_a_cpu_is_small_where_a_token_makes_much(sizes, expected):
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(**sizes))
    assert default_batch_tokens(model) == expected
    model.device = torch.device("cuda")
    assert default_batch_tokens(model) == 16384


def test_queries_share_batches_with_and_without_a_shared_prefix():
    pairs = [pair(prefix, document, seed) for prefix, seed in ((20, 0), (18, 1), (20, 2)) for document in (5, 6)]
    for shared_prefix, expected in (
        (False, [(6, 27, False)]),
        (True, [(1, 20, False), (2, 27, True), (1, 18, False), (2, 25, True), (1, 20, False), (2, 27, True)]),
    ):
        with Spy(model_of("qwen3")) as spy:
            score_pairs(model_of("qwen3"), pairs, shared_prefix=shared_prefix)
        assert spy.passes == expected


def test_a_prefix_is_shared_where_it_saves_a_tenth_of_the_tokens_and_fills_a_batch():
    # 2 pairs of 10 + 89 + 1 tokens: sharing saves 10 of 200; with 10 + 39 + 1, 10 of 100.
    few, enough = [pair(10, 89), pair(10, 88)], [pair(10, 39, 0), pair(10, 39, 0)]
    assert split_by_prefix(few, None, 100) == ([], [0, 1])
    assert split_by_prefix(enough, None, 100) == ([[0, 1]], [])
    assert split_by_prefix(enough, None, 16384) == ([], [0, 1])  # with other queries' they fill it better
    assert split_by_prefix(few, True, 100) == ([[0, 1]], [])
    lonely, bare = pair(30, 5), pair(0, 5)
    assert split_by_prefix([lonely, bare, bare], None, 10) == ([], [0, 1, 2])
    assert split_by_prefix([lonely, bare], True, 10) == ([[0]], [1])
    mixed = [pair(10, 39), lonely, pair(10, 39), pair(12, 3), pair(12, 4)]
    assert split_by_prefix(mixed, None, 10) == ([[0, 2], [3, 4]], [1])


def test_sharing_saves_the_computation():
    pairs = [pair(50, document) for document in range(5, 25)]
    computed = {}
    for shared_prefix in (False, None):
        seen: list[torch.Size] = []
        hook = (
            model_of("qwen3")
            .get_input_embeddings()
            .register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.shape))
        )
        score_pairs(model_of("qwen3"), pairs, shared_prefix=shared_prefix)
        hook.remove()
        computed[shared_prefix] = sum(shape[0] * shape[1] for shape in seen)
    assert computed[None] < computed[False] / 2


def test_what_cannot_share_a_prefix_says_so():
    assert [can_share_prefix(model_of(kind)) for kind in KINDS] == [True, True, False]
    with pytest.raises(ValueError, match="shared_prefix needs a causal backbone"):
        score_pairs(model_of("bert"), pairs_of("bert"), shared_prefix=True)
    # The mean and the first token stand on the prefix as well.
    for pooling in ("cls",):
        model = tiny_model("qwen3", classifier_pooling=pooling)
        assert not can_share_prefix(model)
        pairs = pairs_of("qwen3")[:4]
        torch.testing.assert_close(
            score_pairs(model, pairs), score_pairs(model, pairs, shared_prefix=False), rtol=0, atol=1e-5
        )
    sliding = tiny_model("qwen3")
    sliding.config.layer_types = ["full_attention", "sliding_attention"]
    assert not can_share_prefix(sliding)


def test_equal_pairs_score_equal_to_the_last_bit():
    pairs = [pair(10, size, seed) for seed in (0, 1) for size in (7, 40, 7, 21, 40)]
    pairs[2] = pairs[2]._replace(truncated=True, span=(0, 3))
    for shared_prefix in (False, None):
        with Spy(model_of("qwen3")) as spy:
            logits = score_pairs(model_of("qwen3"), pairs, batch_tokens=60, shared_prefix=shared_prefix)
        assert logits[0] == logits[2]
        assert logits[1] == logits[4]
        assert logits[5] == logits[7]
        assert len(set(logits.tolist())) == 6
        assert sum(rows for rows, _, shared in spy.passes if shared or shared_prefix is False) == 6


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("limit", [90, 200, 500])
def test_out_of_memory_halves_the_budget_and_goes_on(limit, shared_prefix, caplog):
    model = model_of("qwen3")
    pairs = [pair(20, document, seed) for seed in range(4) for document in range(3, 60, 7)]
    expected = score_pairs(model, pairs)
    scoring_querit.logger.propagate, propagate = True, scoring_querit.logger.propagate
    with Spy(model, limit) as spy:
        logits = score_pairs(model, pairs, batch_tokens=4000, shared_prefix=shared_prefix)
    scoring_querit.logger.propagate = propagate
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    sizes = [rows * width for rows, width in spy.failed]
    assert sizes
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert len(sizes) <= 8  # it halves, it does not creep
    budgets = [int(text.rsplit("=", 1)[1].rstrip(".")) for text in caplog.messages if "Out of memory" in text]
    assert len(budgets) == len(sizes)
    for size, budget in zip(sizes, budgets, strict=True):
        assert budget == size // 2
    # What memory allows is used: the budget is not lost to one failure.
    assert max(rows * width for rows, width, _ in spy.passes) > limit / 4


def test_a_pair_that_does_not_fit_names_the_fix():
    model, pairs = model_of("qwen3"), [pair(10, 80), pair(10, 20), pair(10, 30)]
    for shared_prefix in (False, True):
        with Spy(model, 50), pytest.raises(MemoryError, match=r"single pair of 91 tokens.*Lower max_length") as error:
            score_pairs(model, pairs, shared_prefix=shared_prefix)
        assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
)
def test_every_backends_words_for_it_are_known(error, monkeypatch):
    model, pairs = model_of("qwen3"), [pair(0, 10), pair(0, 12)]
    expected, forward = score_pairs(model, pairs), model.forward

    def fails_once(*args, **kwargs):
        monkeypatch.setattr(model, "forward", forward)
        raise error

    monkeypatch.setattr(model, "forward", fails_once)
    torch.testing.assert_close(score_pairs(model, pairs), expected, rtol=0, atol=1e-5)


def test_other_errors_are_not_taken_for_it(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(model_of("qwen3"), "forward", fails)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        score_pairs(model_of("qwen3"), [pair(0, 10), pair(0, 12)])


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shared_prefix", [False, True])
def test_a_score_that_is_not_finite_names_its_pair(value, shared_prefix):
    model = tiny_model("qwen3")
    pairs = [pair(10, size) for size in (5, 30, 12, 40)]
    hurt = pairs[2]._replace(document=(*pairs[2].document[:-1], 950))  # a token of its own, with a broken embedding
    model.get_input_embeddings().weight.data[950] = float("nan")
    with pytest.raises(
        NonFiniteScoreError, match=r"Pair 2 scored nan in torch.float32: load the model in float32"
    ) as e:
        score_pairs(model, [*pairs[:2], hurt, pairs[3]], shared_prefix=shared_prefix)
    assert e.value.index == 2
    assert isinstance(e.value, ValueError)
    model = tiny_model("qwen3")
    model.head.bias.data[1] = value
    with pytest.raises(NonFiniteScoreError, match="Pair 0") as error:
        score_pairs(model, pairs, shared_prefix=shared_prefix)
    assert error.value.dtype == torch.float32


def test_the_progress_bar_moves_while_the_work_goes_on(monkeypatch):
    bar = RecordingBar()
    events, options = bar.events, bar.options
    monkeypatch.setattr(scoring_querit, "tqdm", bar)
    model = model_of("qwen3")
    hook = model.model.register_forward_hook(lambda *_: events.append("pass"))
    score_pairs(model, [pair(0, 9), pair(0, 8), pair(0, 7)], batch_tokens=20)
    hook.remove()
    assert events == ["pass", 2, "pass", 1, "closed"]
    assert options["total"] == 3
    assert options["delay"] > 0
    assert options["disable"] is None  # nor does a pipe


def test_no_logits_over_the_vocabulary_and_no_gradients_and_the_mode_is_kept():
    model = tiny_model("deepseek_v3").train()
    shapes, modes = set(), set()

    def see(module, args, output):
        modes.add((module.training, torch.is_inference_mode_enabled()))
        shapes.update(tensor.shape[-1] for tensor in (output if isinstance(output, tuple) else (output,)) if
                      isinstance(tensor, torch.Tensor) and tensor.dim())  # fmt: skip

    hooks = [module.register_forward_hook(see) for module in model.modules()]
    score_pairs(model, pairs_of("deepseek_v3"))
    for hook in hooks:
        hook.remove()
    assert model.config.vocab_size not in shapes
    assert 48 in shapes
    assert modes == {(False, True)}
    assert model.training


def test_the_mode_is_kept_when_scoring_fails():
    model = tiny_model("qwen3").train()
    with Spy(model, 1), pytest.raises(MemoryError):
        score_pairs(model, pairs_of("qwen3"))
    assert model.training


def test_the_fastest_dtype_is_measured_once():
    assert fastest_cpu_dtype() in (torch.float32, torch.bfloat16)
    assert fastest_cpu_dtype() is fastest_cpu_dtype()
    assert fastest_cpu_dtype.cache_info().misses == 1


@pytest.mark.parametrize(("times", "expected"), [((2.0, 1.0), torch.bfloat16), ((1.0, 1.0), torch.float32)])
def test_bfloat16_must_be_clearly_faster(times, expected, monkeypatch):
    """A clock that the multiplication itself moves on: seconds by dtype, in place of the real ones."""
    slow, now = dict(zip((torch.float32, torch.bfloat16), times, strict=True)), [0.0]
    multiply = torch.nn.Linear.forward

    def forward(layer, rows):
        now[0] += slow[rows.dtype]
        return multiply(layer, rows)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    monkeypatch.setattr(scoring_querit.time, "perf_counter", lambda: now[0])
    assert fastest_cpu_dtype.__wrapped__() is expected
