"""Attention in bfloat16 on a CPU against the plain formula in float64, and in the pipeline against PyTorch's own."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline

from modeling_querit.attention_querit import BLOCK, Prefix, Spans, bfloat16_cpu_attention
from modeling_querit.scoring_querit import TOLERANCE
from tests.models_for_tests import KINDS, save_folder, tiny_model

# A weight and a sum of values are rounded to 8 bits, and so are scores: of 8, by up to 1/32, and so are their weights.
ROUNDING, MEAN_ROUNDING = 0.1, 0.005


def formula(query, key, value, mask, scaling) -> torch.Tensor:
    """softmax(q k' x scaling) v (Vaswani et al. 2017, equation 1), each head with its group's key and value."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(group, 1), value.double()
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 3), key_heads=st.integers(1, 3), group=st.integers(1, 3), queries=st.integers(1, 3 * BLOCK),
    past=st.integers(0, 40), sizes=st.sampled_from([(8, 8), (16, 12), (32, 32)]), causal=st.booleans(),
    padded=st.integers(0, 20), left=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_it_is_the_formula(batch, key_heads, group, queries, past, sizes, causal, padded, left, seed):
    torch.manual_seed(seed)
    keys = past + queries
    query = torch.randn(batch, queries, key_heads * group, sizes[0]).bfloat16().transpose(1, 2)
    key = torch.randn(batch, keys, key_heads, sizes[0]).bfloat16().transpose(1, 2)
    value = torch.randn(batch, keys, key_heads, sizes[1]).bfloat16().transpose(1, 2)
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if causal:
        mask = mask.tril(past)
    padding = torch.zeros(keys, dtype=torch.bool)
    padding[: min(padded, keys)] = True
    mask[0] &= ~(padding if left else padding.flip(0))
    module = SimpleNamespace(is_causal=causal)
    output, weights = bfloat16_cpu_attention(module, query, key, value, mask, scaling=0.3)
    assert weights is None and output.dtype == torch.bfloat16
    assert output.isfinite().all()  # also of rows that are padding and see nothing
    sees = mask.any(-1)[:, 0, :, None, None]
    expected = formula(query, key, value, mask, 0.3)
    difference = torch.where(sees, output - expected, 0).abs()
    assert difference.max() < ROUNDING
    assert difference.mean() < MEAN_ROUNDING


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 70, 192])  # 192: no key is padding
def test_without_a_mask_all_or_the_causal_ones_attend(causal, queries):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, queries, 16).bfloat16() for _ in range(3))
    module = SimpleNamespace(is_causal=causal)
    mask = torch.ones(2, 1, queries, queries, dtype=torch.bool)
    output, _ = bfloat16_cpu_attention(module, query, key, value, None)
    expected = formula(query, key, value, mask.tril() if causal else mask, 16**-0.5)
    assert (output - expected).abs().max() < ROUNDING


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 2 * BLOCK + 5), min_size=1, max_size=5), past=st.sampled_from([0, 1, 31, 32, 50]),
    rest=st.integers(0, 40), key_heads=st.integers(1, 2), group=st.integers(1, 3), broken=st.booleans(),
)  # fmt: skip
def test_sequences_end_to_end_see_their_prefix_and_themselves(lengths, past, rest, key_heads, group, broken):
    """Two layers: the prefix of the second is another one. A sequence that is not finite leaves the others alone."""
    torch.manual_seed(0)
    tokens, sizes = sum(lengths) + rest, (16, 12)
    for layer in (0, 1):
        query = torch.randn(1, tokens, key_heads * group, sizes[0]).bfloat16().transpose(1, 2)
        key, value = (torch.randn(1, tokens, key_heads, size).bfloat16().transpose(1, 2) for size in sizes)
        before = [torch.randn(key_heads, past, size).bfloat16() for size in sizes]
        prefix = Prefix(past, {layer: tuple(before), 1 - layer: (before[0] * 0, before[1] * 0)} if past else {})
        spans = Spans([prefix if number % 2 else Prefix() for number, _ in enumerate(lengths)])
        for length in lengths:
            spans.add(length)
        if broken:
            key[:, :, spans.starts[-2] :] = value[:, :, spans.starts[-2] :] = math.nan
        module = SimpleNamespace(layer_idx=layer)
        output, _ = bfloat16_cpu_attention(module, query, key, value, None, scaling=0.3, spans=spans)
        assert output.shape == (1, tokens, key_heads * group, sizes[1])
        for number, (start, length) in enumerate(zip(spans.starts, lengths, strict=False)):
            found, part = output[:, start : start + length], slice(start, start + length)
            if broken and number == len(lengths) - 1:
                assert found.isnan().all()
                continue
            seen = [before[0], key[0, :, part]], [before[1], value[0, :, part]]
            keys, values = (torch.cat(each if number % 2 else each[1:], 1)[None] for each in seen)
            mask = torch.ones(1, 1, length, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - length)
            difference = (found - formula(query[:, :, part], keys, values, mask, 0.3)).abs()
            assert difference.max() < ROUNDING
            assert difference.mean() < MEAN_ROUNDING
        assert (output[:, sum(lengths) :] == 0).all()  # what is padding stays finite


def test_the_keys_of_prefixes_are_kept():
    key, value = (torch.randn(1, 2, 12, size).bfloat16() for size in (16, 8))
    computed = [Prefix(5), Prefix(3)]
    spans = Spans([Prefix(), Prefix()], computed)
    spans.add(5)
    spans.add(3)
    bfloat16_cpu_attention(SimpleNamespace(layer_idx=4), torch.randn_like(key), key, value, None, spans=spans)
    for prefix, part in zip(computed, (slice(0, 5), slice(5, 8)), strict=True):
        kept_key, kept_value = prefix.layers[4]
        assert torch.equal(kept_key, key[0, :, part])
        assert torch.equal(kept_value, value[0, :, part])


def test_in_float32_it_is_pytorchs_own():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 70, 16) for _ in range(3))
    module = SimpleNamespace(is_causal=True)
    output, _ = bfloat16_cpu_attention(module, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(output, expected.transpose(1, 2))


def test_on_a_cpu_experts_are_taken_one_by_one_unless_asked_otherwise(tmp_path):
    folder = save_folder(tmp_path / "moe", "deepseek_v3", tiny_model("deepseek_v3"))
    for asked, expected in ((None, "eager"), ("batched_mm", "batched_mm")):
        options = {"model_kwargs": {"experts_implementation": asked}} if asked else {}
        ranker = pipeline("text-ranking", model=str(folder), trust_remote_code=True, **options)
        assert ranker.model.config._experts_implementation == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_takes_it_for_bfloat16_and_scores_as_before(kind, tmp_path):
    model = tiny_model(kind)
    folder = save_folder(tmp_path / kind, kind, model)
    documents = ["The Moon pulls on the water.", "Salt lowers its freezing point. " * 20, "tide", "a b c " * 60]

    def scored(dtype, **options):
        ranker = pipeline("text-ranking", model=str(folder), trust_remote_code=True, dtype=dtype, **options)
        results = sorted(ranker("Why does the sea rise?", documents), key=lambda result: result["index"])
        logits = torch.tensor([2 * math.atanh(result["score"]) for result in results])
        return ranker.model.config._attn_implementation, logits

    name, logits = scored(torch.bfloat16)
    assert name == bfloat16_cpu_attention.__name__
    kept, eager = scored(torch.bfloat16, model_kwargs={"attn_implementation": "eager"})
    assert kept == "eager"
    assert scored(torch.float32)[0] == "sdpa"
    exact = scored(torch.float32)[1]
    assert (logits - exact).abs().max() <= TOLERANCE[torch.bfloat16]
    assert (logits - eager).abs().max() <= TOLERANCE[torch.bfloat16]
