import json
import math
import shutil
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods.slerp import slerp as mergekit_slerp
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, pipeline
from trl import TrlParser

from hub_card.provenance import merges_of
from modeling_querit.modeling_querit import QueritForSequenceClassification
from recipes.merge import (
    LINEAR_COSINE,
    METHODS,
    MergeArguments,
    Step,
    check_merged,
    cosine,
    main,
    merge_at_once,
    merge_in_steps,
    open_checkpoint,
    steps_and_weights,
)
from tests.models_for_tests import KINDS, SCRATCH, save_folder, tiny_model

QUERY, DOCUMENTS = "who oils the chain", ["A bicycle needs oil on the chain.", "Prices in 2024", "It rained."]
VALUES = st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3)


def moved_by(model: QueritForSequenceClassification, distance: float, seed: int) -> QueritForSequenceClassification:
    """The model after a training: every tensor that is saved moved, but for the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "embed" not in name:
                tensor += distance * torch.randn(tensor.shape, generator=generator)
    return model


@cache
def checkpoints(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Path]:
    """The second is near the first, the third far from both. For reading only."""
    folders = []
    for i, distance in enumerate((0, 1e-3, 0.8)):
        model = moved_by(moved_by(tiny_model(kind), 0.05, seed=0), distance, seed=i)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        folders.append(save_folder(SCRATCH / "merge" / f"{kind}-{dtype}" / str(i), kind, model))
    return tuple(folders)  # type: ignore[return-value]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged(tmp_path: Path, models, **changes) -> dict[str, torch.Tensor]:
    main(MergeArguments(models=[str(model) for model in models], output_dir=str(tmp_path / "out"), **changes))
    return weights_of(tmp_path / "out")


def copied(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def rewrite(folder: Path, change) -> Path:
    tensors = weights_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_json(folder: Path, name: str, **changes) -> Path:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return folder


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> tuple[np.ndarray, bool]:
    """In float64, from the formula; and whether it was linear."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    cos = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b, True
    angle = np.arccos(cos)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle), False


def one_slerp(a, b, t: float) -> torch.Tensor:
    return merge_in_steps([torch.tensor(a), torch.tensor(b)], [Step("b", t)], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_slerp_of_three_is_the_formula_tensor_by_tensor_and_the_result_ranks(kind, tmp_path):
    models = checkpoints(kind)
    result = merged(tmp_path, models)
    inputs = [weights_of(model) for model in models]
    assert list(result) == list(inputs[0])
    linear = [[], []]
    for name, tensor in result.items():
        if all(torch.equal(inputs[0][name], other[name]) for other in inputs[1:]):
            assert "embed" in name and torch.equal(tensor, inputs[0][name])  # frozen: bit for bit
            continue
        expected = inputs[0][name].numpy()
        for step, t in enumerate((1 / 2, 1 / 3)):
            expected, was_linear = slerp(expected, inputs[step + 1][name].numpy(), t)
            linear[step] += [name] * was_linear
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=2e-6, err_msg=name)
    moved = {name for name in result if not any(torch.equal(result[name], other[name]) for other in inputs)}
    head = "classifier" if kind == "bert" else "head"
    assert {f"{head}.weight", f"{head}.bias"} < moved
    if kind == "deepseek_v3":
        layer = "model.layers.1.mlp"
        assert {f"{layer}.gate.weight", f"{layer}.gate.e_score_correction_bias"} < moved
        assert {f"{layer}.experts.{i}.{p}_proj.weight" for i in range(8) for p in ("gate", "up", "down")} < moved

    report = json.loads((tmp_path / "out/merge.json").read_text(encoding="utf-8"))
    assert report["method"] == "slerp" and report["t"] == [1 / 2, 1 / 3] and report["dtype"] == "float32"
    assert [entry["model"] for entry in report["models"]] == [str(model) for model in models]
    assert report["weights"] == pytest.approx([1 / 3] * 3)
    assert report["parameters"] == sum(tensor.numel() for tensor in result.values())
    assert linear[0] and len(linear[1]) < len(linear[0]) < report["tensors"] == len(result)
    # The shares are of the tensors that differ, not of the frozen ones.
    same = [name for name in result if "embed" in name]
    frozen = sum(result[name].numel() for name in same)
    for step, names in zip(report["steps"], linear, strict=True):
        counted = sum(result[name].numel() for name in names)
        assert (step["linear_tensors"], step["linear_parameters"]) == (len(names), counted)
        assert (step["identical_tensors"], step["identical_parameters"]) == (len(same), frozen)
        share = len(names) / (len(result) - len(same))
        assert step["linear_share_of_differing_tensors"] == pytest.approx(share)
        of_parameters = counted / (report["parameters"] - frozen)
        assert step["linear_share_of_differing_parameters"] == pytest.approx(of_parameters)

    QueritForSequenceClassification.from_pretrained(tmp_path / "out")
    scores = {}
    for folder in (models[0], tmp_path / "out"):
        ranker = pipeline("text-ranking", model=str(folder), trust_remote_code=True, device="cpu")
        found = ranker({"query": QUERY, "documents": DOCUMENTS})
        scores[folder] = [row["score"] for row in found]
        assert len(found) == len(DOCUMENTS) and sorted(scores[folder], reverse=True) == scores[folder]
    assert all(math.isfinite(score) for score in scores[tmp_path / "out"])
    assert scores[tmp_path / "out"] != scores[models[0]]


@given(VALUES, VALUES, st.floats(0, 1))
def test_slerp_of_any_two_vectors(a, b, t):
    result = one_slerp(a, b, t)
    if not np.any(a) or not np.any(b):
        return
    expected, linear = slerp(np.array(a), np.array(b), t)
    x, y = np.array(a, np.float64), np.array(b, np.float64)
    cos = abs(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    if min(np.linalg.norm(x), np.linalg.norm(y)) > 1e-3 and abs(cos - LINEAR_COSINE) > 1e-5:
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-3 * max(np.abs(expected).max(), 1))
        step = Step("b", t)
        merge_in_steps([torch.tensor(a), torch.tensor(b)], [step], torch.float32)
        assert step.linear_tensors == (linear and a != b) and step.identical_tensors == (a == b)


@given(VALUES, VALUES)
def test_slerp_starts_at_the_first_ends_at_the_second_and_is_symmetric_half_way(a, b):
    assert torch.equal(one_slerp(a, b, 0.0), torch.tensor(a)) and torch.equal(one_slerp(a, b, 1.0), torch.tensor(b))
    torch.testing.assert_close(one_slerp(a, b, 0.5), one_slerp(b, a, 0.5), rtol=1e-5, atol=1e-6)


@given(VALUES, st.integers(2, 5), st.sampled_from(METHODS))
def test_a_tensor_merged_with_itself_stays_bit_for_bit(a, count, method):
    tensors = [torch.tensor(a)] * count
    ratios, weights = steps_and_weights(MergeArguments(["x"] * count, "out", method=method))
    steps = [Step("x", t) for t in ratios]
    result = merge_in_steps(tensors, steps, torch.float32) if steps else None
    if result is None:
        result = merge_at_once(tensors, method, weights, torch.float32)
    assert torch.equal(result, tensors[0])


def test_where_all_that_differs_is_nearly_parallel_slerp_is_linear_and_its_report_says_so(tmp_path, capsys):
    a, b, _ = checkpoints("bert")
    near = rewrite(copied(b, tmp_path / "near"), lambda t: t.update({n: x * 1.01 for n, x in weights_of(a).items()}))
    spherical = merged(tmp_path / "slerp", [a, near])
    torch.testing.assert_close(spherical, merged(tmp_path / "linear", [a, near], method="linear"))
    (step,) = json.loads((tmp_path / "slerp/out/merge.json").read_text(encoding="utf-8"))["steps"]
    assert step["linear_share_of_differing_tensors"] == step["linear_share_of_differing_parameters"] == 1
    assert "tensors that differ (100.0%; 100.0% of their parameters)" in capsys.readouterr().out
    merged(tmp_path / "itself", [a, a])
    (step,) = json.loads((tmp_path / "itself/out/merge.json").read_text(encoding="utf-8"))["steps"]
    assert step["linear_tensors"] == step["linear_share_of_differing_tensors"] == 0


def test_the_threshold_is_mergekits():
    assert mergekit_slerp.__defaults__[0] == LINEAR_COSINE


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_what_each_model_weighs(t):
    models = [str(i) for i in range(len(t) + 1)]
    _, weights = steps_and_weights(MergeArguments(models, "out", t=t))
    # The weights of linear steps, told by merging one-hot vectors.
    expected = np.eye(len(models))[0]
    for step, ratio in enumerate(t, 1):
        expected = (1 - ratio) * expected + ratio * np.eye(len(models))[step]
    assert weights == pytest.approx(expected.tolist()) and sum(weights) == pytest.approx(1)
    assert steps_and_weights(MergeArguments(models, "out"))[1] == pytest.approx([1 / len(models)] * len(models))


def test_the_order_of_three_matters_and_the_given_t_is_taken(tmp_path):
    a, b, c = checkpoints("qwen3")
    one = merged(tmp_path / "1", [a, b, c])
    other = merged(tmp_path / "2", [c, b, a])
    assert all((one[name] - other[name]).abs().max() > 1e-4 for name in one if name.startswith("head"))
    ended = merged(tmp_path / "3", [a, b, c], t=[0.25, 0.0])
    step = weights_of(a)["head.weight"], weights_of(b)["head.weight"]
    np.testing.assert_allclose(ended["head.weight"], slerp(*(w.numpy() for w in step), 0.25)[0], atol=1e-6)


def test_float64_arithmetic_is_exact_to_the_files_rounding(tmp_path):
    models = checkpoints("qwen3")[::2]
    result, (first, second) = merged(tmp_path, models, dtype="float64"), map(weights_of, models)
    for name in result:
        if "embed" not in name:
            expected, _ = slerp(first[name].double().numpy(), second[name].double().numpy(), 0.5)
            assert result[name].dtype == torch.float32
            np.testing.assert_allclose(result[name].numpy(), expected, rtol=2**-24 * 1.001, atol=0)


@pytest.mark.parametrize("weights", [[], [1.0, 2.0, 5.0]])
def test_linear_is_the_weighted_mean(weights, tmp_path):
    models = checkpoints("deepseek_v3")
    result = merged(tmp_path, models, method="linear", weights=weights)
    inputs = [weights_of(model) for model in models]
    for name, tensor in result.items():
        mean = np.average([other[name].double().numpy() for other in inputs], axis=0, weights=weights or None)
        np.testing.assert_allclose(tensor.numpy(), mean, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_tensors_that_are_the_first_models_only_stay_its(method, tmp_path):
    models = checkpoints("qwen3")[::2]
    result = merged(tmp_path, models, method=method, first_only=["embed_tokens", ".mlp."])
    first, second = map(weights_of, models)
    for name, tensor in result.items():
        kept = "embed_tokens" in name or ".mlp." in name
        assert torch.equal(tensor, first[name]) == (kept or torch.equal(first[name], second[name])), name
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["first_only"] == ["embed_tokens", ".mlp."]
    opened = [open_checkpoint(str(model), model) for model in models]
    with pytest.raises(ValueError, match="was not merged: it is still that of"):
        check_merged(open_checkpoint("the merge", tmp_path / "out"), opened, [0.5, 0.5])


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_the_means_on_the_sphere_are_half_way_between_two_directions(method, tmp_path):
    a, _, c = checkpoints("bert")
    result, first, second = merged(tmp_path, [a, c], method=method), weights_of(a), weights_of(c)
    for name, tensor in result.items():
        if torch.equal(first[name], second[name]):
            assert torch.equal(tensor, first[name])
            continue
        x, y = first[name].double().numpy(), second[name].double().numpy()
        lengths = np.linalg.norm(x), np.linalg.norm(y)
        middle, _ = slerp(x / lengths[0], y / lengths[1], 0.5)
        expected = middle / np.linalg.norm(middle) * sum(lengths) / 2
        np.testing.assert_allclose(tensor.numpy(), expected, atol=2e-5, err_msg=name)


def test_karcher_takes_weights():
    x, y = np.array([3.0, 0.0, 1.0]), np.array([0.0, 2.0, 0.5])
    result = merge_at_once([torch.tensor(x), torch.tensor(y)], "karcher", [0.25, 0.75], torch.float64)
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    expected = slerp(x / lengths[0], y / lengths[1], 0.75)[0] * (0.25 * lengths[0] + 0.75 * lengths[1])
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_merged_with_itself_comes_back_bit_for_bit(method, kind, tmp_path):
    (model, *_) = checkpoints(kind, torch.bfloat16)
    result, expected = merged(tmp_path, [model] * 3, method=method), weights_of(model)
    assert result.keys() == expected.keys()
    assert all(tensor.dtype == expected[name].dtype for name, tensor in result.items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.items())
    assert (tmp_path / "out/config.json").read_bytes() == (model / "config.json").read_bytes()


def test_sixteen_bits_are_rounded_once_and_shards_are_read_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.merge.SHARD_BYTES", 50_000)
    models = checkpoints("qwen3", torch.bfloat16)
    sharded = []
    for i, model in enumerate(models):
        loaded = QueritForSequenceClassification.from_pretrained(model)
        sharded.append(save_folder(tmp_path / str(i), "qwen3", loaded, max_shard_size="50KB"))
        assert len(list(sharded[-1].glob("*.safetensors"))) > 2
    result, inputs = merged(tmp_path, sharded), [weights_of(model) for model in models]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    QueritForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, tensor in result.items():
        expected = inputs[0][name].float().numpy()
        if "embed" not in name:
            for other, t in zip(inputs[1:], (1 / 2, 1 / 3), strict=True):
                expected, _ = slerp(expected, other[name].float().numpy(), t)
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_allclose(tensor.float(), torch.tensor(expected).bfloat16().float(), rtol=2**-7, atol=1e-6)
        # Half a step of bfloat16 at most, and a little for float32.
        np.testing.assert_allclose(tensor.float(), expected, rtol=2**-8 * 1.01, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_difference_that_sixteen_bits_cannot_halve_is_no_fault(method, tmp_path):
    first = checkpoints("bert", torch.bfloat16)[0]

    def nudge(tensors):
        for tensor in tensors.values():
            tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(torch.inf, dtype=torch.bfloat16))

    result = merged(tmp_path, [first, rewrite(copied(first, tmp_path / "nudged"), nudge)], method=method)
    torch.testing.assert_close(result, weights_of(first), rtol=2**-6, atol=1e-6)


def test_cosine_of_tensors_larger_than_a_piece():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 1_000_000)).astype(np.float32)
    b += a
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    expected = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    assert cosine(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, abs=1e-12)
    assert cosine(torch.zeros(3), torch.ones(3)) == 0


def test_a_released_model_merges_with_one_in_training_precision(tmp_path):
    (released, *_), (_, _, adapted) = checkpoints("bert", torch.bfloat16), checkpoints("bert")
    result = merged(tmp_path, [released, adapted])
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    model = QueritForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.relevance_head.weight.dtype == torch.float32


def test_only_what_belongs_to_the_model_is_copied_from_the_first(tmp_path):
    (a, b, _) = checkpoints("qwen3")
    first = copied(a, tmp_path / "first")
    (first / "checkpoint-5").mkdir()
    (first / "2_Dense").mkdir()
    left = ["training_args.bin", "optimizer.pt", "trainer_state.json", "modules.json", "README.md"]
    left += ["sentence_bert_config.json", "checkpoint-5/model.safetensors", "2_Dense/model.safetensors"]
    for name in left:
        (first / name).write_text("{}", encoding="utf-8")
    merged(tmp_path, [first, b])
    kept = {p.name for p in a.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "pipeline_querit.py"} < kept
    assert {p.name for p in (tmp_path / "out").iterdir()} == kept | {"merge.json"}
    for name in kept - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (a / name).read_bytes()


def aware(models: list[Path], out: Path) -> Path:
    """What `mergekit-yaml` makes of them: it takes the names from transformers' architecture."""
    definition = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [{"model": str(model), "parameters": {"weight": 1}} for model in models],
    }
    run_merge(MergeConfiguration.model_validate(definition), str(out), MergeOptions(quiet=True, write_model_card=False))
    return out


def test_the_experts_that_mergekits_planner_loses_in_silence_are_missed(tmp_path):
    models = checkpoints("deepseek_v3")[:2]
    out = aware(list(models), tmp_path / "aware")
    assert not any(".experts." in name for name in weights_of(out))
    opened = [open_checkpoint(str(model), model) for model in models]
    with pytest.raises(ValueError, match="lost 26 tensors, 24 tensors of routed experts"):
        check_merged(open_checkpoint("the merge", out), opened, [0.5, 0.5])


def broken_merges():
    layer = "model.layers.1.mlp"

    def drop(part):
        return lambda tensors, first: [tensors.pop(name) for name in list(tensors) if part in name]

    def stale(name):
        return lambda tensors, first: tensors.update({name: first[name]})

    def nan(tensors, first):
        tensors["model.norm.weight"][3] = torch.nan

    def thaw(tensors, first):
        tensors["model.embed_tokens.weight"] += 1e-3

    return [
        (drop(".experts.3."), "lost 3 tensors, 3 tensors of routed experts"),
        (drop("head."), "lost 2 tensors, head.bias, head.weight"),
        (stale("head.weight"), "head.weight was not merged: it is still that of"),
        (stale(f"{layer}.gate.weight"), "gate.weight was not merged"),
        (stale(f"{layer}.experts.5.up_proj.weight"), "experts.5.up_proj.weight was not merged"),
        (nan, "model.norm.weight holds NaN or infinity, in the merge alone"),
        (thaw, "model.embed_tokens.weight is the same in all models, but not in the merge"),
        (lambda tensors, first: tensors.update({"head.bias": torch.zeros(3)}), "head.bias, which no model has in that"),
        (lambda tensors, first: tensors.update({"head.bias": torch.zeros(2).half()}), "head.bias in torch.float16"),
    ]


@pytest.fixture(scope="module")
def whole_merge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    merged(folder, checkpoints("deepseek_v3")[::2])
    return folder / "out"


@pytest.mark.parametrize(("damage", "message"), broken_merges())
def test_a_merge_that_lost_or_left_something_is_refused(damage, message, whole_merge, tmp_path):
    models = [open_checkpoint(str(model), model) for model in checkpoints("deepseek_v3")[::2]]
    check_merged(open_checkpoint("the merge", whole_merge), models, [0.5, 0.5])
    first = weights_of(models[0].folder)
    out = rewrite(copied(whole_merge, tmp_path / "out"), lambda tensors: damage(tensors, first))
    with pytest.raises(ValueError, match=message):
        check_merged(open_checkpoint("the merge", out), models, [0.5, 0.5])


def test_a_tensor_of_the_first_model_alone_that_is_not_finite_is_named(whole_merge, tmp_path):
    name = "model.norm.weight"

    def spoil(tensors):
        tensors[name][3] = torch.nan

    paths = [
        rewrite(copied(model, tmp_path / f"m{n}"), spoil) for n, model in enumerate(checkpoints("deepseek_v3")[::2])
    ]
    out = rewrite(copied(whole_merge, tmp_path / "out"), spoil)
    models = [open_checkpoint(f"model {n}", path) for n, path in enumerate(paths)]
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity, in model 0\."):
        check_merged(open_checkpoint("the merge", out), models, [0.5, 0.5], [name])


def other_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    first, second = list(rules["model"]["vocab"].items())[50:52]
    rules["model"]["vocab"].update({first[0]: second[1], second[0]: first[1]})
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")


def other_padding(folder):
    edit_json(folder, "tokenizer_config.json", pad_token="<|im_start|>")


def other_template(folder):
    with open(folder / "chat_template.jinja", "a", encoding="utf-8") as file:
        file.write("!")


def other_shape(folder):
    shutil.rmtree(folder)
    save_folder(folder, "deepseek_v3", tiny_model("deepseek_v3", n_routed_experts=4))


def other_architecture(folder):
    shutil.rmtree(folder)
    save_folder(folder, "bert")


def without(part):
    return lambda folder: rewrite(folder, lambda t: [t.pop(name) for name in list(t) if part in name])


def pickled(folder):
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def stray_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}', encoding="utf-8")


def index_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {name: "../model.safetensors" for name in load_file(folder.parent / "model.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def infinite(folder):
    rewrite(folder, lambda tensors: tensors["head.weight"].fill_(torch.inf))


REFUSED = [
    (other_tokenizer, "differ in tokenizer.model"),
    (lambda folder: (folder / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
    (other_padding, "tokenizer's special tokens"),
    (other_template, "differ in chat template"),
    (other_shape, r"differ in config.n_routed_experts \(8 against 4\)"),
    (other_architecture, "deepseek_v3 against bert"),
    (lambda folder: edit_json(folder, "config.json", classifier_pooling="cls"), r"config.classifier_pooling \(last"),
    (without("head.weight"), "head.weight missing"),
    (without(".experts.2.gate_proj"), "is no whole checkpoint"),
    (without(".experts.2."), "experts.down_proj, model.layers.1.mlp.experts.gate_up_proj missing"),
    (pickled, "weights only as pickles"),
    (stray_index, "delete the one that is stale"),
    (index_elsewhere, "which lies in another folder"),
    (infinite, "head.weight holds NaN or infinity, in .*odd"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_left_behind(change, message, tmp_path):
    first = checkpoints("deepseek_v3")[0]
    odd = copied(checkpoints("deepseek_v3")[2], tmp_path / "odd")
    change(odd)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merged(tmp_path, [first, odd])
    assert sorted(tmp_path.rglob("*")) == before


def test_code_that_the_config_names_must_be_there(tmp_path):
    first, second, _ = checkpoints("bert")
    bare = copied(first, tmp_path / "bare")
    (bare / "pipeline_querit.py").unlink()
    with pytest.raises(ValueError, match=r"the code pipeline_querit.TextRankingPipeline, but its file is not"):
        merged(tmp_path, [bare, second])
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_what_training_changes_in_the_files_does_not_stop_a_merge(tmp_path):
    first, second, _ = checkpoints("qwen3")
    odd = copied(second, tmp_path / "odd")
    edit_json(odd, "config.json", use_cache=False, eos_token_id=3, bos_token_id=1, transformers_version="5.17.0")
    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer(["a", "b c"], truncation=True, max_length=8, padding=True)
    tokenizer.save_pretrained(odd)
    assert json.loads((odd / "tokenizer.json").read_text(encoding="utf-8"))["truncation"]
    merged(tmp_path, [first, odd])


def test_an_output_that_is_there_is_left_as_it_is(tmp_path, capsys):
    a, b, c = checkpoints("bert")
    merged(tmp_path, [a, b])
    stamps = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    merged(tmp_path, [a, b])
    assert "is there already; delete it to make it again" in capsys.readouterr().out
    for changes, told in (({"models": [b, a]}, "models"), ({"models": [a, c]}, "models"), ({"t": [0.2]}, "t, weights")):
        with pytest.raises(FileExistsError, match=rf"made with other settings \({told}\)"):
            merged(tmp_path, **{"models": [a, b], **changes})
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()} == stamps
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="nothing tells how it was made"):
        main(MergeArguments(models=[str(a), str(b)], output_dir=str(tmp_path / "notes")))


def test_the_record_keeps_the_merges_before_it_each_once(tmp_path):
    a, b, c = checkpoints("bert")
    merged(tmp_path / "first", [a, b])
    merged(tmp_path / "second", [tmp_path / "first/out", c], method="linear")
    merged(tmp_path / "third", [tmp_path / "first/out", tmp_path / "second/out"], method="linear", weights=[3.0, 1.0])
    first, second, third = merges_of(tmp_path / "third/out")
    assert [first] == merges_of(tmp_path / "first/out") and [first, second] == merges_of(tmp_path / "second/out")
    assert (first["method"], second["method"], third["weights"]) == ("slerp", "linear", [0.75, 0.25])
    assert "earlier" not in json.loads((tmp_path / "first/out/merge.json").read_text())


def test_a_merge_that_kept_tensors_of_the_first_is_not_one_of_all_tensors(tmp_path):
    models = checkpoints("bert")[:2]
    merged(tmp_path, models, first_only=["embed"])
    with pytest.raises(FileExistsError, match=r"made with other settings \(first_only\)"):
        merged(tmp_path, models)
    merged(tmp_path, models, first_only=["embed"])
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    del record["first_only"]
    (tmp_path / "out" / "merge.json").write_text(json.dumps(record))  # as an older record of all tensors
    merged(tmp_path, models)


def test_what_a_killed_merge_left_is_cleared_away(tmp_path):
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "out.writing" / "model-1.safetensors").write_text("half", encoding="utf-8")
    merged(tmp_path, checkpoints("bert")[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "model-1.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["a"]}, "two or more"),
        ({"method": "ties"}, "must be one of slerp, linear"),
        ({"dtype": "bfloat16"}, "float32 or float64"),
        ({"t": [0.5]}, "must be 2 numbers"),
        ({"t": [0.5, 1.5]}, r"in \[0, 1\]"),
        ({"t": [0.5, math.nan]}, r"in \[0, 1\]"),
        ({"weights": [1.0, 1.0, 1.0]}, "slerp takes t"),
        ({"method": "linear", "t": [0.5, 0.5]}, "linear takes weights"),
        ({"method": "linear", "weights": [1.0, 2.0]}, "must be 3 numbers above 0"),
        ({"method": "karcher", "weights": [1.0, 0.0, 2.0]}, "must be 3 numbers above 0"),
        ({"first_only": [""]}, "an empty name"),
        ({"revisions": {"d": "main"}}, "names d, which is not among"),
        ({"models": ["no/such/folder", "b"]}, "no/such/folder is no folder"),
    ],
)
def test_arguments_that_make_no_merge_are_refused(changes, message, tmp_path):
    values = {"models": ["a", "b", "c"], "output_dir": str(tmp_path / "out"), **changes}
    with pytest.raises(ValueError, match=message):
        main(MergeArguments(**values))
    assert not list(tmp_path.iterdir())


def test_the_yaml_and_the_revision_of_a_model_from_the_hub(tmp_path, monkeypatch):
    a, b, c = checkpoints("bert")
    commits = {"1" * 40: b, "2" * 40: c}
    for commit, folder in commits.items():  # a cache as huggingface_hub keeps it
        copied(folder, tmp_path / "cache/models--someone--adapted/snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = tmp_path / "merge.yaml"
    config.write_text(
        f"models: ['{a}', someone/adapted]\noutput_dir: {tmp_path}/out\nmethod: linear\nweights: [3, 1]\n"
        f"revisions: {{someone/adapted: '{'2' * 40}'}}\n",
        encoding="utf-8",
    )
    (args,) = TrlParser(MergeArguments).parse_args_and_config(["--config", str(config)])
    main(args)
    expected = 0.75 * weights_of(a)["classifier.weight"] + 0.25 * weights_of(c)["classifier.weight"]
    torch.testing.assert_close(weights_of(tmp_path / "out")["classifier.weight"], expected)
    report = json.loads((tmp_path / "out/merge.json").read_text(encoding="utf-8"))
    assert report["models"][1]["revision"] == "2" * 40
