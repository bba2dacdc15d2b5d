"""Packed linear layers against `F.linear`: the same products, never of a stale weight, in half the memory, anywhere."""

import copy
import io
import math
import pickle
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from modeling_querit import linear_querit, pipeline_querit
from modeling_querit.linear_querit import AVAILABLE, PackedLinear, give_back, mapped_ranges, pack_linear_layers
from modeling_querit.modeling_querit import QueritForSequenceClassification, RelevanceHead
from modeling_querit.pipeline_querit import TextRankingPipeline
from modeling_querit.scoring_querit import TOLERANCE
from tests.models_for_tests import KINDS, tiny_model, tokenizer_of
from tests.tokenizers_for_tests import CORPUS

SMAPS = Path("/proc/self/smaps")
needs_onednn = pytest.mark.skipif(not AVAILABLE, reason="This PyTorch has no oneDNN.")
needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="Only /proc/self/smaps tells what is mapped from a file.")
HAS_BFLOAT16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN does not multiply bfloat16 on this CPU.")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
# A file of 12 MiB, or 6: one that is to be seen among what else is in memory.
LARGE = {"hidden_size": 64, "intermediate_size": 8192}
QUERY, DOCUMENTS = "Where does the river rise?", [CORPUS[8], CORPUS[12], "oil", CORPUS[14] * 5]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def packed_layer(
    inputs: int = 40, outputs: int = 24, dtype: torch.dtype = torch.float32, bias: bool = True, **changes
) -> PackedLinear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    for name, value in changes.items():
        setattr(layer, name, nn.Parameter(value))
    pack_linear_layers(layer)
    assert isinstance(layer, PackedLinear)
    assert layer.packed is not None
    return layer


def packed_zeros(inputs: int, outputs: int, dtype: torch.dtype) -> torch.Tensor | None:
    with torch.inference_mode(False):
        return packed_layer(inputs, outputs, dtype, weight=torch.zeros(outputs, inputs, dtype=dtype)).packed


def copy_is_used(layer: nn.Module, input: torch.Tensor) -> bool:
    """Whether the product is that of the packed copy: with one of zeros in its place, nothing but the bias is left."""
    kept = getattr(layer, "packed", None)
    if kept is None:
        return False
    layer.packed = packed_zeros(layer.in_features, layer.out_features, kept.dtype)
    try:
        product = layer(input)
    finally:
        layer.packed = kept
    return torch.equal(product, (torch.zeros(1) if layer.bias is None else layer.bias).to(product).expand_as(product))


def check_product(layer: PackedLinear, input: torch.Tensor) -> None:
    """To 1e-5 of its terms' size that of `F.linear` in float64, and in bfloat16 to one unit of the last place.

    (`F.linear` in bfloat16 rounds twice where the input has three dimensions.)
    """
    product = layer(input)
    assert copy_is_used(layer, input)
    assert product.dtype == input.dtype
    assert product.is_contiguous()
    exact = [None if x is None else x.double() for x in (input, layer.weight, layer.bias)]
    expected, size = F.linear(*exact), F.linear(*(x if x is None else x.abs() for x in exact))
    assert product.shape == expected.shape
    allowed = 1e-5 * size
    if input.dtype == torch.bfloat16:
        allowed += torch.where(expected == 0, 0, torch.exp2(expected.abs().log2().floor() - 7))
    assert ((product - expected).abs() <= allowed).all()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def logits_of(model: QueritForSequenceClassification) -> torch.Tensor:
    ids = torch.arange(2 * 30).view(2, 30) % model.config.vocab_size
    with torch.inference_mode():
        return model(ids).logits


# ---------------------------------------------------------------- products


def test_pytorch_has_both_operators_wherever_it_has_onednn():
    """If it fails with a new PyTorch: the private operators changed, and ranking on a CPU is slower, not wrong."""
    assert torch.backends.mkldnn.is_available() == AVAILABLE


@needs_onednn
@both_dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 32, 257, 1024])
def test_products_are_those_of_the_ordinary_layer(rows, bias, dtype, no_grad):
    layer = packed_layer(123, 77, dtype, bias)
    check_product(layer, torch.randn(rows, 123).to(dtype))
    check_product(layer, torch.randn(2, rows, 123).to(dtype))


@needs_onednn
@both_dtypes
def test_a_vector_no_rows_and_four_dimensions_are_taken(dtype, no_grad):
    layer = packed_layer(dtype=dtype)
    for shape in ((40,), (0, 40), (3, 0, 40), (2, 3, 4, 40)):
        check_product(layer, torch.randn(shape).to(dtype))


@needs_onednn
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 40), inputs=st.integers(1, 70), outputs=st.integers(1, 70), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16] if HAS_BFLOAT16 else [torch.float32]),
    order=st.sampled_from(["plain", "transposed", "every second", "repeated", "from the second on"]),
    weight_is_transposed=st.booleans(), three=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_size_and_order_in_memory(
    rows, inputs, outputs, bias, dtype, order, weight_is_transposed, three, seed
):  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        weight = torch.randn(inputs, outputs).t() if weight_is_transposed else torch.randn(outputs, inputs)
        layer = packed_layer(inputs, outputs, dtype, bias, weight=weight.to(dtype))
        assert layer.weight.stride() == weight.stride()  # the weight itself is left as it was
        torch.manual_seed(seed + 10)
        input = {
            "plain": lambda: torch.randn(rows, inputs),
            "transposed": lambda: torch.randn(inputs, rows).t(),
            "every second": lambda: torch.randn(rows, 2 * inputs)[:, ::2],
            "repeated": lambda: torch.randn(1, inputs).expand(rows, inputs),
            "from the second on": lambda: torch.randn(rows * inputs + 1)[1:].view(rows, inputs),
        }[order]()
        input = input.to(dtype)
        check_product(layer, input.unsqueeze(1).expand(rows, 2, inputs) if three else input)


@needs_onednn
@both_dtypes
def test_a_bias_changed_or_assigned_counts_at_once(dtype, no_grad):
    layer, input = packed_layer(dtype=dtype), torch.randn(5, 40).to(dtype)
    layer.bias.add_(3)
    check_product(layer, input)
    layer.bias = nn.Parameter(torch.randn(24).to(dtype))
    check_product(layer, input)
    layer.bias = None
    check_product(layer, input)


@needs_onednn
@both_dtypes
def test_a_bias_that_is_not_contiguous_is_added_as_it_is(dtype, no_grad):
    for bias in (torch.randn(48).to(dtype)[::2], torch.ones(1, dtype=dtype).expand(24)):
        layer = packed_layer(dtype=dtype, bias=True)
        layer.bias = nn.Parameter(bias)
        input = torch.randn(5, 40).to(dtype)
        assert torch.allclose(layer(input), F.linear(input, layer.weight, layer.bias), atol=0.02)


@needs_onednn
@both_dtypes
def test_under_inference_mode_the_copy_is_used(dtype):
    layer, input = packed_layer(dtype=dtype), torch.randn(5, 40).to(dtype)
    with torch.inference_mode():
        check_product(layer, input)


# ---------------------------------------------------------------- where the layer is the ordinary one


@needs_onednn
@both_dtypes
def test_with_gradients_the_ordinary_layer_is_used_and_they_reach_all(dtype):
    layer = packed_layer(dtype=dtype)
    input = torch.randn(3, 5, 40).to(dtype).requires_grad_()
    assert not copy_is_used(layer, input)
    layer(input).square().sum().backward()
    plain, same = nn.Linear(40, 24, dtype=dtype), input.detach().clone().requires_grad_()
    plain.load_state_dict(layer.state_dict())
    plain(same).square().sum().backward()
    for found, expected in ((input, same), (layer.weight, plain.weight), (layer.bias, plain.bias)):
        assert expected.grad.abs().sum() > 0
        assert torch.equal(found.grad, expected.grad)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_ordinary_layer_is_used(dtype, no_grad):
    layer, input = packed_layer(), torch.randn(5, 40).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        product = layer(input)
        assert not copy_is_used(layer, input)
        assert product.dtype == torch.bfloat16
        assert torch.equal(product, F.linear(input, layer.weight, layer.bias))
        with torch.autocast("cpu", enabled=False):
            check_product(layer, input.float())


@needs_onednn
@both_dtypes
def test_compiled_it_is_the_ordinary_layer_without_a_break(dtype, no_grad):
    layer, input = packed_layer(dtype=dtype), torch.randn(5, 40).to(dtype)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    try:
        product = torch.compile(layer, backend=backend, fullgraph=True)(input)
    finally:
        torch._dynamo.reset()
    assert torch.equal(product, F.linear(input, layer.weight, layer.bias))
    assert len(graphs) == 1
    assert "linear" in graphs[0]
    assert "mkldnn" not in graphs[0]


@needs_onednn
def test_exported_it_holds_no_packed_copy(no_grad):
    input = torch.randn(5, 40)
    layer = packed_layer()
    program = torch.export.export(layer, (input,))
    assert "mkldnn" not in str(program)
    assert torch.equal(program.module()(input), F.linear(input, layer.weight, layer.bias))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_an_input_of_another_dtype_is_refused_as_ever(dtype, no_grad):
    layer, input = packed_layer(), torch.ones(5, 40, dtype=dtype)
    with pytest.raises(RuntimeError) as ordinary:
        F.linear(input, layer.weight, layer.bias)
    with pytest.raises(RuntimeError, match=re.escape(str(ordinary.value))):
        layer(input)


# ---------------------------------------------------------------- a weight that changes


def in_place(layer):
    layer.weight.add_(1)


def one_row_in_place(layer):
    layer.weight[3] = 1


def by_the_initialisation(layer):
    nn.init.normal_(layer.weight)


def assigned(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def assigned_by_data(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def by_a_state_dict(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def by_an_assigned_state_dict(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def under_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.add_(1)


def converted_there_and_back(layer):
    dtype = layer.weight.dtype
    layer.double()
    layer.weight.add_(1)
    layer.to(dtype)


def in_shared_memory(layer):
    layer.share_memory()
    layer.weight.data.add_(1)  # as another process would


def trained(layer, **options):
    """AdamW changes every number by its learning rate, about."""
    optimizer = torch.optim.AdamW(layer.train().parameters(), lr=1.0, **options)
    with torch.enable_grad():
        layer(torch.ones(1, layer.in_features, dtype=layer.weight.dtype)).sum().backward()
    optimizer.step()
    layer.eval()


def trained_one_by_one(layer):
    trained(layer, foreach=False)


def trained_together(layer):
    trained(layer, foreach=True)


def trained_by_the_fused_optimizer(layer):
    trained(layer, fused=True)  # Trainer's default


def assigned_under_inference_mode(layer):
    with torch.inference_mode():
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))


CHANGES = [
    in_place, one_row_in_place, by_the_initialisation, assigned, assigned_by_data, by_a_state_dict,
    by_an_assigned_state_dict, under_inference_mode, converted_there_and_back, in_shared_memory, trained_one_by_one,
    trained_together, trained_by_the_fused_optimizer, assigned_under_inference_mode,
]  # fmt: skip


@needs_onednn
@both_dtypes
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_counts_in_the_next_call(change, dtype, no_grad):
    layer, input = packed_layer(dtype=dtype), torch.randn(5, 40).to(dtype)
    before = layer(input)
    assert copy_is_used(layer, input)
    change(layer)
    product = layer(input)
    assert torch.equal(product, F.linear(input, layer.weight, layer.bias))
    assert not torch.allclose(product, before, atol=0.1)
    assert not copy_is_used(layer, input)


@needs_onednn
@both_dtypes
def test_a_weight_that_gets_the_memory_of_one_that_is_gone_is_told_from_it(dtype, no_grad):
    """As after two assignments, where the allocator happens to; so there are many."""
    input, size = torch.randn(5, 40).to(dtype), (24, 40)
    for _ in range(30):
        layer, held = packed_layer(dtype=dtype, weight=torch.randn(size).to(dtype)), []
        layer.weight = None
        for _ in range(30):
            layer.weight = nn.Parameter(torch.empty(size, dtype=dtype))
            layer.weight.data.copy_(torch.randn(size))  # before its first use
            held.append(layer.weight)
            assert torch.equal(layer(input), F.linear(input, layer.weight, layer.bias))


@needs_onednn
@both_dtypes
@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.double(), lambda layer: layer.half(), lambda layer: layer.to("meta"),
        lambda layer: layer.to_empty(device="cpu"), lambda layer: layer.share_memory(),
        lambda layer: nn.Sequential(layer).double(),
    ],
)  # fmt: skip
def test_moved_or_converted_a_layer_drops_its_useless_copy(convert, dtype):
    layer = packed_layer(dtype=dtype)
    convert(layer)
    assert layer.packed is None


@needs_onednn
def test_converted_to_the_other_dtype_a_layer_drops_its_copy_and_multiplies_in_that_dtype(no_grad):
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32))[: 1 + HAS_BFLOAT16]:
        layer, input = packed_layer(dtype=dtype).to(other), torch.randn(5, 40).to(other)
        assert layer.packed is None
        assert torch.equal(layer(input), F.linear(input, layer.weight, layer.bias))


@needs_onednn
@both_dtypes
def test_what_changes_no_weight_keeps_the_copy(dtype, no_grad):
    layer, input = packed_layer(dtype=dtype), torch.randn(5, 40).to(dtype)
    layer.to("cpu").to(dtype).eval().requires_grad_(False).state_dict()
    check_product(layer, input)
    moved = nn.Sequential(layer).to("cpu", dtype)
    check_product(moved[0], input)


@needs_onednn
@both_dtypes
def test_packed_again_a_layer_has_the_weight_of_now(dtype, no_grad):
    layer, input = packed_layer(dtype=dtype), torch.randn(5, 40).to(dtype)
    before = layer(input)
    layer.weight.data.add_(1)
    pack_linear_layers(layer)
    check_product(layer, input)
    assert not torch.allclose(layer(input), before, atol=0.1)
    layer.weight.add_(1)  # a change that is seen: the copy is out of use until it is made anew
    assert not copy_is_used(layer, input)
    pack_linear_layers(nn.Sequential(layer))
    check_product(layer, input)


# ---------------------------------------------------------------- models


@needs_onednn
@both_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_no_weight_and_no_key(kind, dtype):
    model, plain = tiny_model(kind, dtype), tiny_model(kind, dtype)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    pack_linear_layers(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert any(type(module) is PackedLinear for module in model.modules())


@needs_onednn
@both_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_is_saved_and_loaded_as_any(kind, dtype, tmp_path):
    model = tiny_model(kind, dtype)
    model.save_pretrained(tmp_path / "plain")
    expected = logits_of(model)
    pack_linear_layers(model)
    logits_of(model)
    model.save_pretrained(tmp_path / "packed")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "packed")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    configs = [(tmp_path / name / "config.json").read_text() for name in ("plain", "packed")]
    assert configs[0] == configs[1]
    loaded = QueritForSequenceClassification.from_pretrained(tmp_path / "packed", dtype=dtype).eval()
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert torch.equal(logits_of(loaded), expected)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - written here


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@needs_onednn
@both_dtypes
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole])
def test_copies_and_pickles_of_a_packed_model_score_the_same(duplicate, dtype):
    model = tiny_model("qwen3", dtype)
    plain = logits_of(model)
    pack_linear_layers(model)
    packed = logits_of(model)
    other = duplicate(model)
    assert all(layer.packed is None for layer in other.modules() if isinstance(layer, PackedLinear))
    assert torch.equal(logits_of(other), plain)
    pack_linear_layers(other)
    assert all(layer.packed is not None for layer in other.modules() if isinstance(layer, PackedLinear))
    assert torch.equal(logits_of(other), packed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(model), packed)  # and still by its own copies
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        assert copy_is_used(layer, torch.ones(1, layer.in_features, dtype=dtype))


@needs_onednn
def test_other_layers_are_left_alone():
    class OwnLinear(nn.Linear):
        pass

    layers = {
        RelevanceHead: RelevanceHead(8, 2), OwnLinear: OwnLinear(8, 2), nn.Embedding: nn.Embedding(8, 8),
        nn.Bilinear: nn.Bilinear(8, 8, 2), nn.Conv1d: nn.Conv1d(8, 2, 1),
    }  # fmt: skip
    model = nn.Sequential(*layers.values(), nn.Linear(8, 2))
    states = [dict(layer.__dict__) for layer in layers.values()]
    pack_linear_layers(model)
    assert [type(layer) for layer in model] == [*layers, PackedLinear]
    assert [layer.__dict__ for layer in layers.values()] == states


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float16}, {"dtype": torch.float64}, {"device": "meta"}],
    ids=lambda options: str(*options.values()),
)
def test_weights_of_other_dtypes_and_elsewhere_are_left_alone(options):
    layer = nn.Linear(8, 2, **options)
    state = dict(layer.__dict__)
    pack_linear_layers(layer)
    assert type(layer) is nn.Linear
    assert layer.__dict__ == state


def test_without_onednn_nothing_changes(monkeypatch):
    monkeypatch.setattr(linear_querit, "AVAILABLE", False)
    monkeypatch.setattr(linear_querit, "ONEDNN", SimpleNamespace())
    model = tiny_model("qwen3")
    types, expected = [type(module) for module in model.modules()], logits_of(model)
    pack_linear_layers(model)
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(logits_of(model), expected)


def test_a_dtype_that_onednn_does_not_take_on_this_cpu_is_multiplied_as_ever(monkeypatch):
    def refuse(*_):
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or ...")

    monkeypatch.setattr(linear_querit, "AVAILABLE", True)
    monkeypatch.setattr(linear_querit, "ONEDNN", SimpleNamespace(_reorder_linear_weight=refuse))
    monkeypatch.setattr(linear_querit, "give_back", lambda *_: pytest.fail("without a copy its memory is needed"))
    model = tiny_model("qwen3", torch.bfloat16)
    expected = logits_of(model)
    pack_linear_layers(model)
    assert torch.equal(logits_of(model), expected)
    assert all(layer.packed is None for layer in model.modules() if isinstance(layer, PackedLinear))
    model.double()


# ---------------------------------------------------------------- weights mapped from a file


def is_covered(tensor: torch.Tensor) -> bool:
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return any(first <= start and end <= last for first, last in mapped_ranges())


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping in which the tensor lies."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            start, end = (int(address, 16) for address in name.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and name == "Rss:":
            return int(values[0]) * 1024
    raise AssertionError("no mapping holds the tensor")


@cache
def large_model(dtype: torch.dtype) -> QueritForSequenceClassification:
    return tiny_model("qwen3", dtype, **LARGE)


@pytest.fixture
def mapped_model(dtype, tmp_path):
    large_model(dtype).save_pretrained(tmp_path)
    return QueritForSequenceClassification.from_pretrained(tmp_path, dtype=dtype).eval()


@needs_onednn
@needs_smaps
@both_dtypes
def test_the_pages_of_packed_weights_are_given_back_and_read_again(dtype, mapped_model):
    expected = large_model(dtype).state_dict()
    weights = [layer.weight for name, layer in linear_layers(mapped_model.model).items()]
    assert all(is_covered(weight) for weight in weights)
    total = sum(weight.nbytes for weight in weights)
    before = logits_of(mapped_model)  # reads them all
    held = resident(weights[0])
    assert held >= 0.9 * total
    pack_linear_layers(mapped_model)
    assert resident(weights[0]) <= held - 0.75 * total
    assert (logits_of(mapped_model) - before).abs().max() <= TOLERANCE[dtype]
    assert resident(weights[0]) <= held - 0.75 * total  # products need the copies alone
    for name, value in mapped_model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert resident(weights[0]) >= 0.9 * total  # so it was the file that was read again


@needs_onednn
@needs_smaps
@both_dtypes
def test_a_mapped_weight_that_was_changed_is_not_given_back(dtype, mapped_model, no_grad):
    layer = mapped_model.model.layers[0].mlp.up_proj
    other = mapped_model.model.layers[1].mlp.down_proj
    assert is_covered(layer.weight)
    layer.weight[100:3000].add_(1)
    expected = {name: value.clone() for name, value in mapped_model.state_dict().items()}
    assert not torch.equal(layer.weight, large_model(dtype).model.layers[0].mlp.up_proj.weight)
    assert not is_covered(layer.weight)
    assert not is_covered(other.weight)  # it lies in the same mapping, of which no more is told
    pack_linear_layers(mapped_model)
    for name, value in mapped_model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for packed in (layer, other):
        check_product(packed, torch.randn(5, packed.in_features).to(dtype))


@needs_onednn
@both_dtypes
def test_weights_that_no_file_holds_are_never_given_back(dtype, monkeypatch):
    """Memory of the process's own would read as zeros."""
    monkeypatch.setattr(linear_querit.ctypes, "CDLL", lambda _: pytest.fail("no page may be given back"))
    layer = packed_layer(512, 1024, dtype)
    torch.manual_seed(0)
    assert torch.equal(layer.weight, nn.Linear(512, 1024, dtype=dtype).weight)


@needs_smaps
def test_only_a_private_mapping_of_a_file_without_changes_counts(tmp_path):
    file, numbers = tmp_path / "a file: with spaces - and more", 2**20
    expected = torch.arange(numbers, dtype=torch.float32)
    expected.numpy().tofile(file)
    private, shared = (torch.from_file(str(file), shared=shared, size=numbers) for shared in (False, True))
    own = torch.ones(numbers)
    assert [is_covered(tensor) for tensor in (private, shared, own)] == [True, False, False]
    assert private.sum() == shared.sum()
    held = resident(private)
    give_back(private[numbers // 2 :], mapped_ranges())
    assert resident(private) <= 0.6 * held
    assert torch.equal(private, expected)
    private[5] = -1
    assert [is_covered(tensor) for tensor in (private, shared, own)] == [False, False, False]
    for tensor in (private, shared, own):
        give_back(tensor, mapped_ranges())
    assert private[5] == -1
    assert torch.equal(own, torch.ones(numbers))


@needs_smaps
def test_only_whole_pages_of_the_weight_itself_are_given_back(tmp_path, monkeypatch):
    file, page = tmp_path / "numbers", linear_querit.mmap.PAGESIZE
    torch.arange(4 * page).numpy().tofile(file)
    tensor = torch.from_file(str(file), size=4 * page, dtype=torch.int64)
    start, calls = tensor.data_ptr(), []
    assert start % page == 0

    def madvise(address, length, advice):
        assert advice == linear_querit.mmap.MADV_DONTNEED
        calls.append((address.value - start, length.value))

    monkeypatch.setattr(linear_querit.ctypes, "CDLL", lambda _: SimpleNamespace(madvise=madvise))
    for first, last, expected in (
        (0, 3 * page, [(0, 3 * page)]),
        (8, 3 * page + 8, [(page, 2 * page)]),
        (page - 8, 2 * page + 8, [(page, page)]),
        (8, 2 * page - 8, []),
        (page, page + 8, []),
        (page, page, []),
    ):
        calls.clear()
        give_back(tensor[first // 8 : last // 8], mapped_ranges())
        assert calls == expected, (first, last)
    calls.clear()
    for first, last in ((start, start + 4 * page), (start + page, start + 8 * page)):
        give_back(tensor[page // 16 : page], [(first, last)])  # from within the first page to the end of the eighth
    assert calls == []


def test_what_the_system_tells_of_mappings_is_read_right(monkeypatch):
    def mapping(start, flags, inode, name, anonymous=0, swap=0):
        values = {"Size": 64, "Rss": 64, "Anonymous": anonymous, "AnonHugePages": 9, "Swap": swap, "SwapPss": 9}
        header = f"{start:08x}-{start + 0x10000:08x} {flags} 00000000 fe:01 {inode}    {name}\n"
        return header + "".join(f"{key}:{value:>12} kB\n" for key, value in values.items()) + "VmFlags: rd mr mw\n"

    smaps = "".join(
        [
            mapping(0x100000, "rw-p", 12, "/models/a"),
            mapping(0x200000, "rw-p", 12, "/models/a changed", anonymous=4),
            mapping(0x300000, "rw-p", 12, "/models/a changed and swapped", swap=4),
            mapping(0x400000, "rw-p", 12, "/models/a changed, half swapped", anonymous=4, swap=4),
            mapping(0x500000, "rw-s", 12, "/models/a shared"),
            mapping(0x600000, "rw-p", 0, ""),
            mapping(0x700000, "rw-p", 0, "[heap]", anonymous=64),
            mapping(0x800000, "r--p", 13, "/models/b with: spaces (deleted)"),
        ]
    )
    monkeypatch.setattr(linear_querit, "open", lambda *_, **__: io.StringIO(smaps), raising=False)
    assert mapped_ranges() == [(0x100000, 0x110000), (0x800000, 0x810000)]

    def fail(*_, **__):
        raise FileNotFoundError("/proc/self/smaps")

    monkeypatch.setattr(linear_querit, "open", fail, raising=False)
    assert mapped_ranges() == []


# ---------------------------------------------------------------- the pipeline


def ranked(ranker: TextRankingPipeline) -> torch.Tensor:
    results = sorted(ranker(QUERY, DOCUMENTS), key=lambda result: result["index"])
    return torch.tensor([2 * math.atanh(result["score"]) for result in results])


@needs_onednn
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in KINDS),
        # Not the mixture of experts: where two are nearly equal, rounding may choose another.
        *(pytest.param(kind, torch.bfloat16, marks=needs_bfloat16) for kind in ("qwen3", "bert")),
    ],
)
def test_the_pipeline_packs_every_layer_and_scores_as_before(kind, dtype, monkeypatch):
    ranker = TextRankingPipeline(model=tiny_model(kind, dtype), tokenizer=tokenizer_of(kind), dtype=dtype, device="cpu")
    layers = linear_layers(ranker.model.model)
    assert layers
    assert {name for name, layer in layers.items() if getattr(layer, "packed", None) is None} == set()
    assert {type(layer) for layer in layers.values()} == {PackedLinear}
    assert {layer.packed.dtype for layer in layers.values()} == {dtype}
    assert type(ranker.model.head) is RelevanceHead
    packed = ranked(ranker)
    monkeypatch.setattr(pipeline_querit, "pack_linear_layers", lambda _: None)
    plain = TextRankingPipeline(model=tiny_model(kind, dtype), tokenizer=tokenizer_of(kind), dtype=dtype, device="cpu")
    assert not any(isinstance(layer, PackedLinear) for layer in plain.model.modules())
    expected = ranked(plain)
    assert (packed - expected).abs().max() <= TOLERANCE[dtype]
    assert expected.unique().numel() == len(DOCUMENTS)
    for layer in layers.values():  # and it is by the copies that it scores
        layer.packed = packed_zeros(layer.in_features, layer.out_features, dtype)
    assert not torch.allclose(ranked(ranker), expected, atol=TOLERANCE[dtype])


def test_with_several_devices_no_layer_is_packed():
    """Each process would hold its own copies; now all hold one memory."""
    with TextRankingPipeline(
        model=tiny_model("qwen3"), tokenizer=tokenizer_of("qwen3"), devices=["cpu", "cpu"]
    ) as ranker:
        assert {type(layer) for layer in linear_layers(ranker.model.model).values()} == {nn.Linear}


@needs_onednn
def test_a_packed_model_given_to_several_devices_scores_the_same_there():
    alone = TextRankingPipeline(model=tiny_model("qwen3"), tokenizer=tokenizer_of("qwen3"), device="cpu")
    expected = ranked(alone)
    with TextRankingPipeline(model=alone.model, tokenizer=alone.tokenizer, devices=["cpu"]) as ranker:
        assert (ranked(ranker) - expected).abs().max() <= TOLERANCE[torch.float32]
    assert (ranked(alone) - expected).abs().max() <= TOLERANCE[torch.float32]
