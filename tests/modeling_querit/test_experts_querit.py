"""Packed experts against the same experts as transformers runs them, and what becomes of their weights."""

import copy
import pickle
import platform
import resource
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from modeling_querit import experts_querit
from modeling_querit.experts_querit import IMPLEMENTATIONS, WEIGHTS, PackedExperts, pack_experts
from modeling_querit.modeling_querit import QueritForSequenceClassification
from tests.models_for_tests import tiny_config, tiny_model

EXPERTS, HIDDEN = 8, 48
IDS = torch.arange(4, 28).view(2, 12)


def experts_of(model) -> torch.nn.Module:
    return model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("experts")))


def deepseek_experts(dtype=torch.float32) -> torch.nn.Module:
    experts = experts_of(tiny_model("deepseek_v3", dtype))
    experts.config._experts_implementation = "eager"
    return experts


def qwen3_experts(dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    experts = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=20, num_experts=EXPERTS))
    experts.config._experts_implementation = "eager"
    for parameter in experts.parameters():
        parameter.data = (torch.randn_like(parameter) * parameter.shape[-1] ** -0.5).to(dtype)
    return experts


def routed(tokens: int, dtype=torch.float32, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), index, weights


def bits(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().clone().view(torch.int16 if parameter.dtype.itemsize == 2 else torch.int32)


def weights_of(experts) -> dict[str, torch.Tensor]:
    return {name: bits(parameter) for name, parameter in experts.named_parameters()}


def assert_unpacked(experts, kind: type, weights: dict[str, torch.Tensor]) -> None:
    assert type(experts) is kind and not hasattr(experts, "packed")
    assert list(dict(experts.named_parameters())) == list(WEIGHTS)
    for name, parameter in experts.named_parameters():
        assert type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu"
        assert not parameter.is_inference()
        assert torch.equal(bits(parameter), weights[name])


@pytest.fixture
def rows_multiplied(monkeypatch) -> list[int]:
    """How many rows each product with packed weights had."""
    rows: list[int] = []
    linear = experts_querit._linear
    monkeypatch.setattr(
        experts_querit, "_linear", lambda input, packed: rows.append(len(input)) or linear(input, packed)
    )
    return rows


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [deepseek_experts, qwen3_experts])
def test_outputs_are_those_of_transformers(make, dtype, mode, rows_multiplied):
    experts = make(dtype)
    eager = copy.deepcopy(experts)
    pack_experts(experts)
    cases = [routed(tokens, dtype) for tokens in (0, 1, 2, 9, 150)]
    cases.append(routed(40, dtype, top_k=EXPERTS))
    hidden, index, weights = routed(40, dtype)
    cases.append((hidden, torch.full_like(index, 3), weights))  # all tokens to one expert
    cases.append((hidden, index.where(index < 5, EXPERTS), weights))  # some to none
    cases.append((hidden, torch.full_like(index, EXPERTS), weights))  # all to none
    cases.append((hidden, index, weights.to(dtype)))
    cases.append((hidden.t().contiguous().t(), index.int(), weights))
    for hidden, index, weights in cases:
        rows_multiplied.clear()
        with mode():
            output = experts(hidden, index, weights)
            expected = eager(hidden, index.long(), weights)
        assert isinstance(experts, PackedExperts)
        assert output.dtype == dtype and output.shape == hidden.shape
        # Outputs are of size 1; a product may be rounded otherwise, and a sum with it, each to 8 bits or 24.
        tolerance = 2**-6 if dtype == torch.bfloat16 else 2**-20
        assert torch.allclose(output, expected, atol=tolerance, rtol=tolerance)
        # Two products for each expert that has tokens, and none for the others.
        assert rows_multiplied == [count for count in index[index < EXPERTS].bincount().tolist() if count for _ in "12"]


def test_a_model_of_both_packed_scores_as_before():
    model = tiny_model("deepseek_v3")
    with torch.no_grad():
        expected = model(IDS).logits
        pack_experts(model)
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    assert isinstance(experts_of(model), PackedExperts)


def test_plain_weights_are_freed_one_by_one_and_still_counted(monkeypatch):
    model = tiny_model("deepseek_v3", num_hidden_layers=3)
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "has_bias")]
    assert len(experts) == 2
    experts[0].down_proj.requires_grad = False
    count, shapes = model.num_parameters(), [(name, p.shape, p.dtype) for name, p in model.named_parameters()]
    plain = [weakref.ref(getattr(module, name)) for module in experts for name in WEIGHTS]
    alive = []  # before each matrix is packed
    reorder = experts_querit.ONEDNN._reorder_linear_weight

    def watched(matrix, rows):
        alive.append(sum(weight() is not None for weight in plain))
        return reorder(matrix, rows)

    monkeypatch.setattr(experts_querit, "ONEDNN", SimpleNamespace(_reorder_linear_weight=watched))
    pack_experts(model)
    assert alive == [left for left in (4, 3, 2, 1) for _ in range(EXPERTS)]
    assert not any(weight() is not None for weight in plain)
    assert all(parameter.is_meta for module in experts for parameter in module.parameters())
    assert model.num_parameters() == count
    assert [(name, p.shape, p.dtype) for name, p in model.named_parameters()] == shapes
    for _ in range(2):
        assert [parameter.requires_grad for parameter in experts[0].parameters()] == [True, False]
        experts[0].float()
    assert type(experts[0]) is type(deepseek_experts())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads memory as Linux tells it, and needs malloc_trim")
def test_weights_are_held_once_before_and_after():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=512, num_experts=64)
    layers = torch.nn.ModuleList([Qwen3MoeExperts(config) for _ in range(3)])
    for parameter in layers.parameters():
        parameter.data.normal_()

    def held() -> int:
        with open("/proc/self/statm") as sizes:
            return int(sizes.read().split()[1]) * resource.getpagesize()

    before, size = held(), sum(parameter.nbytes for parameter in layers.parameters())
    pack_experts(layers)
    assert all(isinstance(experts, PackedExperts) for experts in layers)
    in_use = [torch.ones(20_000) for _ in range(50)]  # so that the heap does not end where packed weights do
    assert held() - before < size / 4
    layers.cpu()
    assert held() - before < size / 4
    del in_use


def compiled(experts, *inputs):
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(experts, backend="eager")(*inputs)


def with_autocast(experts, *inputs):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return experts(*inputs)


def with_another_dtype(experts, hidden, index, weights):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
        experts(hidden.double(), index, weights)
    with torch.no_grad():
        return experts(hidden, index, weights)


def on_another_device(experts, hidden, index, weights):
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        experts(hidden.to("meta"), index, weights)
    with torch.no_grad():
        return experts(hidden, index, weights)


def as_asked_for_later(experts, *inputs):
    experts.config._experts_implementation = "batched_mm"
    with torch.no_grad():
        return experts(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "use",
    [lambda experts, *inputs: experts(*inputs), compiled, with_autocast, with_another_dtype, on_another_device,
     as_asked_for_later],
    ids=["gradients", "compiled", "autocast", "another dtype", "another device", "asked for"],
)  # fmt: skip
def test_any_other_use_finds_the_weights_as_they_were(use, dtype):
    experts = deepseek_experts(dtype)
    experts.gate_up_proj.data[0, 0, :4] = torch.tensor([-0.0, 1e-40, torch.inf, torch.nan])
    kind, weights, plain = type(experts), weights_of(experts), copy.deepcopy(experts)
    inputs = routed(9, dtype)
    pack_experts(experts)
    assert isinstance(experts, PackedExperts)
    output = use(experts, *inputs)
    assert_unpacked(experts, kind, weights)
    assert torch.equal(output.nan_to_num(), use(plain, *inputs).nan_to_num())


@pytest.mark.parametrize("packed_in", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("referred_to", [False, True])
def test_it_trains_also_with_an_optimizer_that_was_made_before(packed_in, referred_to):
    experts, (hidden, index, weights) = deepseek_experts(), routed(9)
    plain = copy.deepcopy(experts)
    with packed_in():
        pack_experts(experts)
        experts.requires_grad_()
    reference = weakref.ref(experts.down_proj) if referred_to else None  # PyTorch cannot change such a one in place
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (experts, plain)]
    for module in (experts, plain):
        module(hidden, index, weights).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(experts.gate_up_proj, plain.gate_up_proj)
    assert experts.gate_up_proj.grad.abs().sum() > 0
    if referred_to:
        assert reference() is not experts.down_proj and torch.equal(experts.down_proj.grad, plain.down_proj.grad)
    else:
        assert torch.equal(experts.down_proj, plain.down_proj)


def test_state_dict_holds_the_weights_and_takes_others():
    model, other = tiny_model("deepseek_v3"), tiny_model("deepseek_v3", seed=1)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    pack_experts(model)
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    assert not any(weight.requires_grad for weight in state.values())
    kept = experts_of(model).state_dict(keep_vars=True)
    assert all(isinstance(kept[name], torch.nn.Parameter) and kept[name].requires_grad for name in WEIGHTS)
    assert isinstance(experts_of(model), PackedExperts)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    assert_unpacked(experts_of(model), type(experts_of(other)), weights_of(experts_of(other)))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same(dtype, tmp_path):
    model = tiny_model("deepseek_v3", dtype)
    with torch.no_grad():
        expected = model(IDS).logits
    pack_experts(model)
    model.save_pretrained(tmp_path)
    assert isinstance(experts_of(model), PackedExperts)
    loaded = QueritForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)
        pack_experts(loaded)
        assert isinstance(experts_of(loaded), PackedExperts)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.cpu(), lambda model: model.to(torch.bfloat16), lambda model: model.double(),
        lambda model: model.to("meta"), lambda model: model.share_memory(),
    ],
    ids=["cpu", "bfloat16", "double", "meta", "shared"],
)  # fmt: skip
def test_what_moves_or_converts_a_model_moves_and_converts_its_experts(move):
    model, expected = tiny_model("deepseek_v3"), move(tiny_model("deepseek_v3"))
    pack_experts(model)
    assert isinstance(experts_of(model), PackedExperts)
    assert move(model) is model
    assert type(experts_of(model)) is type(experts_of(expected))
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert (ours.dtype, ours.device, ours.is_shared()) == (theirs.dtype, theirs.device, theirs.is_shared())
        assert ours.is_meta or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, *(lambda x, p=protocol: pickle.loads(pickle.dumps(x, p)) for protocol in (0, 2, 5))],  # noqa: S301
    ids=["copy", "pickle 0", "pickle 2", "pickle 5"],
)
def test_a_copy_is_unpacked_and_the_original_stays_packed(copied):
    model = tiny_model("deepseek_v3")
    experts = experts_of(model)
    kind, weights = type(experts), weights_of(experts)
    with torch.no_grad():
        expected = model(IDS).logits
        pack_experts(model)
        packed = model(IDS).logits
        other = copied(model)
        assert_unpacked(experts_of(other), kind, weights)
        assert torch.equal(other(IDS).logits, expected)
        assert isinstance(experts, PackedExperts) and experts is experts_of(model)
        assert all(parameter.is_meta for parameter in experts.parameters())
        assert torch.equal(model(IDS).logits, packed)


def test_a_class_is_made_once():
    first, second = deepseek_experts(), deepseek_experts()
    kind = type(first)
    for experts in (first, second, first):  # packed twice, it is as packed once
        pack_experts(experts)
    assert type(first) is type(second) and type(first).__name__ == f"Packed{kind.__name__}"
    assert isinstance(first, kind)
    with torch.no_grad():
        assert torch.equal(first(*routed(9)), second(*routed(9)))


def with_attribute(name, value):
    experts = deepseek_experts()
    setattr(experts, name, value)
    return experts


def with_weights(**changes):
    experts = deepseek_experts()
    for name, change in changes.items():
        weight = change(getattr(experts, name).detach())
        experts._parameters[name] = torch.nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return experts


class Quantised(torch.Tensor):
    """A tensor that passes for one of 32 bits, as torchao's do."""


def with_a_subclass():
    experts = deepseek_experts()
    experts._parameters["down_proj"] = torch.nn.Parameter(experts.down_proj.detach().as_subclass(Quantised))
    return experts


def with_an_implementation(name):
    experts = deepseek_experts()
    experts.config._experts_implementation = name
    return experts


LEFT_ALONE = {
    "biases": lambda: with_attribute("has_bias", True),
    "transposed": lambda: with_attribute("is_transposed", True),
    "interleaved": lambda: with_attribute("is_concatenated", False),
    "no gate": lambda: with_attribute("has_gate", False),
    "a norm": lambda: with_attribute("has_post_expert_norm", True),
    "a wrapped forward": lambda: with_attribute("forward", print),
    "one more parameter": lambda: with_attribute("scale", torch.nn.Parameter(torch.ones(EXPERTS))),
    "8 bits": lambda: with_weights(gate_up_proj=torch.Tensor.byte, down_proj=torch.Tensor.byte),
    "float16": lambda: with_weights(gate_up_proj=torch.Tensor.half, down_proj=torch.Tensor.half),
    "two dtypes": lambda: with_weights(down_proj=torch.Tensor.bfloat16),
    "another device": lambda: with_weights(gate_up_proj=lambda w: w.to("meta"), down_proj=lambda w: w.to("meta")),
    "two dimensions": lambda: with_weights(gate_up_proj=lambda w: w.flatten(1), down_proj=lambda w: w.flatten(1)),
    "other shapes": lambda: with_weights(down_proj=lambda w: w.mT.contiguous()),
    "a tensor's subclass": with_a_subclass,
    "an implementation asked for": lambda: with_an_implementation("batched_mm"),
    "another class": lambda: GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=16, num_local_experts=EXPERTS)
    ),
    "no experts": lambda: tiny_model("qwen3"),
}


@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_anything_else_is_left_alone(make, monkeypatch):
    monkeypatch.setattr(PackedExperts, "pack", lambda experts: pytest.fail("packed"))
    model = make()
    before = [(type(module), dict(module._parameters)) for module in model.modules()]
    pack_experts(model)
    assert [type(module) for module in model.modules()] == [kind for kind, _ in before]
    for module, (_, parameters) in zip(model.modules(), before, strict=True):
        assert all(module._parameters[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_transformers_sets_by_itself_is_replaced(implementation):
    experts = with_an_implementation(implementation)
    pack_experts(experts)
    assert isinstance(experts, PackedExperts)
    assert tiny_config("deepseek_v3")._experts_implementation in IMPLEMENTATIONS


def test_without_the_operations_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(experts_querit, "AVAILABLE", False)
    experts = deepseek_experts()
    kind, weights = type(experts), weights_of(experts)
    pack_experts(experts)
    assert_unpacked(experts, kind, weights)


@pytest.mark.parametrize("refused", [0, EXPERTS + 1])
def test_weights_that_cannot_be_packed_stay(refused, monkeypatch):
    experts = deepseek_experts()
    kind, weights, calls = type(experts), weights_of(experts), iter(range(2 * EXPERTS))
    reorder = experts_querit.ONEDNN._reorder_linear_weight

    def refuses_one(matrix, rows):
        if next(calls) == refused:
            raise RuntimeError("this CPU cannot")
        return reorder(matrix, rows)

    monkeypatch.setattr(experts_querit, "ONEDNN", SimpleNamespace(_reorder_linear_weight=refuses_one))
    pack_experts(experts)
    assert_unpacked(experts, kind, weights)
