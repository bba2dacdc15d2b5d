"""The model: its numbers against plain transformers with a head by hand, checkpoints whole or refused, training."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    DeepseekV3Model,
    DynamicCache,
    MPNetConfig,
    PreTrainedModel,
    Qwen3Model,
    RobertaConfig,
)

from modeling_querit.modeling_querit import REMOTE_CODE, QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from modeling_querit.scoring_querit import score_pairs
from recipes.lib.backbones import from_backbone
from tests.models_for_tests import (
    CAUSAL_KINDS,
    KINDS,
    folder_of,
    save_folder,
    tiny_config,
    tiny_model,
    tokenizer_of,
)

BACKBONES = {"qwen3": Qwen3Model, "deepseek_v3": DeepseekV3Model, "bert": BertModel}
LENGTHS = (11, 5, 17)
LOADERS = [
    lambda folder: QueritForSequenceClassification.from_pretrained(folder),
    lambda folder: AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True),
    lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True),
]


def rows(kind: str, lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, len(tokenizer_of(kind)) - 6, (length,), generator=generator) for length in lengths]


def padded(tensors: list[torch.Tensor], side: str, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch filled up with token 3, and its mask; `width` columns of padding more."""
    ids = pad_sequence(tensors, True, 3, side)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], True, 0, side)
    size = (width, 0) if side == "left" else (0, width)
    return torch.nn.functional.pad(ids, size, value=3), torch.nn.functional.pad(mask, size)


def by_hand(kind: str, row: torch.Tensor, pooling: str = "last", folder: Path | None = None) -> tuple[float, float]:
    """Logit and score of one row: the folder's plain backbone, then the head and the softmax spelled out."""
    folder = folder or folder_of(kind)
    with torch.no_grad():
        hidden = BACKBONES[kind].from_pretrained(folder).eval()(row[None]).last_hidden_state[0].double()
    weights = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
    if kind == "bert":
        pooled = torch.tanh(weights["bert.pooler.dense.weight"] @ hidden[0] + weights["bert.pooler.dense.bias"])
        logit = (weights["classifier.weight"] @ pooled + weights["classifier.bias"]).item()
        probability = 1 / (1 + math.exp(-logit))
        return logit, probability - (1 - probability)
    read = {"last": hidden[-1], "cls": hidden[0]}[pooling]
    z = weights["head.weight"] @ read + weights["head.bias"]
    p = torch.softmax(z, 0)
    return (z[1] - z[0]).item(), (p[1] - p[0]).item()


def read_out(model: QueritForSequenceClassification, pooling: str) -> QueritForSequenceClassification:
    model.pooling = pooling
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_scores_are_those_of_the_plain_backbone_and_a_head_by_hand(kind):
    model, tensors = QueritForSequenceClassification.from_pretrained(folder_of(kind)), rows(kind)
    assert model.is_causal == (kind != "bert")
    assert model.pooling == ("cls" if kind == "bert" else "last")
    assert getattr(model.config, "classifier_pooling", None) == (None if kind == "bert" else "last")
    ids, mask = padded(tensors, "right")
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    assert output.logits.shape == output.score.shape == (len(tensors), 1)
    assert output.loss is None
    for row, logit, score in zip(tensors, output.logits, output.score, strict=True):
        expected, expected_score = by_hand(kind, row)
        assert logit.item() == pytest.approx(expected, abs=1e-5)
        assert score.item() == pytest.approx(expected_score, abs=1e-5)
    assert output.logits.std() > 0.05  # else this file would compare one constant with another
    assert torch.equal(output["score"], output.score)  # as mteb's wrapper reads it


READ_OUTS = [(kind, pooling) for kind in CAUSAL_KINDS for pooling in ("last", "cls")] + [("bert", "cls")]


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize(("kind", "pooling"), READ_OUTS)
def test_every_read_out_with_every_padding(kind, pooling, side):
    model, tensors = read_out(tiny_model(kind), pooling), rows(kind)
    expected = [by_hand(kind, row, pooling)[0] for row in tensors]
    with torch.no_grad():
        if side == "none":
            logits = torch.cat([model(input_ids=row[None]).logits for row in tensors])
        else:
            ids, mask = padded(tensors, side, width=3)
            logits = model(input_ids=ids, attention_mask=mask).logits
            assert torch.equal(model(input_ids=ids, attention_mask=mask.bool()).logits, logits)
    assert logits.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_read_out_stands_in_the_config(tmp_path):
    folder = save_folder(tmp_path, "qwen3", tiny_model("qwen3", classifier_pooling="cls"))
    model = QueritForSequenceClassification.from_pretrained(folder)
    row = rows("qwen3")[0]
    with torch.no_grad():
        found = model(input_ids=row[None]).logits.item()
    assert found == pytest.approx(by_hand("qwen3", row, "cls", folder)[0], abs=1e-5)
    with pytest.raises(ValueError, match="'first'; it must be one of last, cls"):
        tiny_model("qwen3", classifier_pooling="first")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_and_scores_are_float32_whatever_the_weights(kind, dtype):
    model, [row, *_] = tiny_model(kind, dtype), rows(kind)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        output = model(input_ids=row[None])
        exact = tiny_model(kind, dtype).float()(input_ids=row[None])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            assert model(input_ids=row[None]).logits.dtype == torch.float32
    assert output.logits.dtype == output.score.dtype == torch.float32
    if kind != "deepseek_v3" or dtype != torch.bfloat16:  # there, rounding may choose another expert
        assert output.logits.item() == pytest.approx(exact.logits.item(), abs=0.1)
    # The head itself must not round: near-equal scores would tie.
    hidden = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    head = model.relevance_head
    expected = hidden.double() @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(head(hidden).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("labels", [[1.0, 0.0, 0.3], [[1], [0], [1]]])
@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_loss_is_the_cross_entropy_of_the_two_classes(labels, kind):
    model, tensors, labels = tiny_model(kind), rows(kind), torch.tensor(labels)
    ids, mask = padded(tensors, "right")
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    nats = []
    for row, label in zip(tensors, labels.flatten().tolist(), strict=True):
        logit, _ = by_hand(kind, row)
        total = math.log(1 + math.exp(logit))
        nats.append(label * (total - logit) + (1 - label) * total)
    assert output.loss.item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    as_tuple = model(input_ids=ids, attention_mask=mask, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_the_mask_of_mtebs_wrapper(kind):
    from mteb.models.model_implementations.querit_models import QueritWrapper

    model, tensors = tiny_model(kind), rows(kind)
    ids, _ = padded(tensors, "left", width=4)
    blocks = [[0] * (ids.shape[1] - len(row)) + [1] * (len(row) - 1) + [2] for row in tensors]
    wide = torch.stack([QueritWrapper.compute_mask_content_cls(block) for block in blocks])
    assert wide.shape == (len(tensors), 1, ids.shape[1], ids.shape[1])
    assert wide.dtype == torch.bool
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=wide).logits
    expected = [by_hand(kind, row)[0] for row in tensors]
    assert logits.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_cached_prefix_and_the_rest_score_as_the_whole(kind, masked):
    model, [row, *_] = tiny_model(kind), rows(kind)
    with torch.no_grad():
        whole = model(input_ids=row[None]).logits
        first = model(input_ids=row[None, :6], past_key_values=DynamicCache(config=model.config), use_cache=True)
        assert first.past_key_values.get_seq_length() == 6
        mask = torch.ones(1, len(row), dtype=torch.long) if masked else None
        rest = model(input_ids=row[None, 6:], past_key_values=first.past_key_values, attention_mask=mask)
    torch.testing.assert_close(rest.logits, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_position_ids_and_embeddings_pass_through(kind):
    model, [row, *_] = tiny_model(kind), rows(kind)
    far = torch.arange(len(row))[None] * 7
    with torch.no_grad():
        plain = model(input_ids=row[None]).logits
        moved = model(input_ids=row[None], position_ids=far).logits
        backbone = model.model(input_ids=row[None], position_ids=far)
        embedded = model(inputs_embeds=model.get_input_embeddings()(row)[None]).logits
        extra = model(input_ids=row[None], output_hidden_states=True)
    assert not torch.allclose(moved, plain, atol=1e-4)
    if kind == "bert":
        expected = model.classifier(backbone.pooler_output)
    else:
        expected = model.head(backbone.last_hidden_state[:, -1]).diff(dim=-1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedded, plain, rtol=0, atol=1e-5)
    assert len(extra.hidden_states) == 3


@pytest.mark.parametrize("config_class", [MPNetConfig, RobertaConfig])
def test_backbones_that_number_their_positions_themselves_do_so_under_a_mask(config_class):
    config = config_class(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, pad_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = QueritForSequenceClassification(config).eval()
    ids = torch.tensor([[0, 9, 17, 33, 2]])
    padded = torch.cat([ids, torch.ones(1, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        hidden = AutoModel.from_config(config)  # any backbone of the class: its own numbering
        hidden.load_state_dict(model.model.state_dict(), strict=False)
        expected = model.head(hidden.eval()(ids).last_hidden_state[:, 0]).diff(dim=-1)
        for given, mask in ((ids, None), (ids, torch.ones_like(ids)), (padded, (padded != 1).long())):
            torch.testing.assert_close(model(given, mask).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bert_folder_is_a_plain_one_to_every_engine(dtype, tmp_path):
    from sentence_transformers import CrossEncoder

    folder = save_folder(tmp_path, "bert", tiny_model("bert", dtype))
    tokenizer, texts = tokenizer_of("bert"), ["A bicycle needs oil.", "", "图书馆每天早上九点开门"]
    pairs = PromptEncoder(tokenizer, 512).encode("When does rain fall?", texts)
    encoded = tokenizer(["When does rain fall?"] * 3, texts, padding=True, return_tensors="pt")
    assert [pair.token_type_ids for pair in pairs] == [
        row[real.bool()].tolist()
        for row, real in zip(encoded["token_type_ids"], encoded["attention_mask"], strict=True)
    ]
    plain, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert type(plain) is BertForSequenceClassification and plain.config.num_labels == 1
    assert not any(info.values())
    engine = CrossEncoder(str(folder), device="cpu", local_files_only=True, activation_fn=torch.nn.Identity())
    assert type(engine.model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        expected = plain.float()(**encoded).logits.squeeze(-1)
        ours = score_pairs(QueritForSequenceClassification.from_pretrained(folder, dtype=torch.float32), pairs)
        untyped = plain(**{**encoded, "token_type_ids": torch.zeros_like(encoded["token_type_ids"])}).logits
    assert (untyped.squeeze(-1) - expected).abs().max() > 1e-3  # the segments matter
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    found = engine.predict([("When does rain fall?", text) for text in texts], convert_to_tensor=True).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_a_plain_bert_cross_encoder_is_taken_as_it_is(tmp_path):
    """Saved by transformers alone, loaded by Querit's class, trained on from it with its classifier kept."""
    plain = BertForSequenceClassification(tiny_config("bert", num_labels=1)).eval()
    plain.save_pretrained(tmp_path)
    row = rows("bert")[0][None]
    with torch.no_grad():
        expected = plain(row).logits
        for load in (QueritForSequenceClassification.from_pretrained, from_backbone):
            torch.testing.assert_close(load(tmp_path).eval()(row).logits, expected, rtol=0, atol=1e-6)
    BertForSequenceClassification(tiny_config("bert", num_labels=3)).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match=r"classifier\.bias, classifier\.weight missing or of another shape"):
        QueritForSequenceClassification.from_pretrained(tmp_path / "three")
    assert from_backbone(tmp_path / "three").classifier.out_features == 1


def broken_folder(kind: str, folder: Path, change) -> Path:
    shutil.copytree(folder_of(kind), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("load", LOADERS, ids=["class", "AutoModelForSequenceClassification", "AutoModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(kind, load, tmp_path):
    backbone_key = {
        "qwen3": "model.layers.1.mlp.down_proj.weight",
        "deepseek_v3": "model.layers.1.mlp.experts.down_proj",  # one tensor in memory, one per expert on disk
        "bert": "bert.encoder.layer.1.output.dense.weight",
    }[kind]

    def without(*beginnings):
        def change(weights):
            gone = [key for key in weights if key.startswith(beginnings)]
            assert gone
            for key in gone:
                del weights[key]

        return change

    head = "classifier" if kind == "bert" else "head"
    changes = {
        f"{head}.weight": without(f"{head}.weight"),
        f"{head}.bias, {head}.weight": without(f"{head}."),
        f"{head}.bias": lambda weights: weights.update({f"{head}.bias": torch.zeros(3)}),
        f"{head}.weight missing or of another shape": lambda weights: weights.update(
            {f"{head}.weight": torch.zeros(len(weights[f"{head}.weight"]), 47)}
        ),
        backbone_key: without(backbone_key.replace("experts.down_proj", "experts.")),
    }
    for number, (named, change) in enumerate(changes.items()):
        folder = broken_folder(kind, tmp_path / str(number), change)
        with pytest.raises(ValueError, match="is no Querit reranker") as error:
            load(folder)
        assert named in str(error.value)
        assert "recipes.train" in str(error.value)


def test_one_missing_expert_is_refused(tmp_path):
    key = "model.layers.1.mlp.experts.5.down_proj.weight"
    folder = broken_folder("deepseek_v3", tmp_path / "x", lambda weights: weights.pop(key))
    with pytest.raises(Exception, match=r"experts\.(5\.)?down_proj|experts"):
        QueritForSequenceClassification.from_pretrained(folder)


def test_a_backbone_alone_is_refused_and_a_language_model_head_is_no_matter(tmp_path):
    tiny_model("qwen3").model.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"head\.bias, head\.weight missing"):
        QueritForSequenceClassification.from_pretrained(tmp_path / "backbone")

    size = (len(tokenizer_of("qwen3")), 48)
    folder = broken_folder(
        "qwen3", tmp_path / "lm", lambda weights: weights.update({"lm_head.weight": torch.ones(size)})
    )
    model, info = QueritForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert not any("lm_head" in name for name, _ in model.named_modules())
    row = rows("qwen3")[0][None]
    with torch.no_grad():
        assert torch.equal(model(row).logits, tiny_model("qwen3")(row).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(kind)
        model.train()
        for module in model.modules():  # dropout would differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        ids, mask = padded(rows(kind), "left")
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([1.0, 0.0, 0.5])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_and_eager_agree(kind, side):
    ids, mask = padded(rows(kind), side)
    logits = {}
    for name in ("sdpa", "eager"):
        model = QueritForSequenceClassification.from_pretrained(folder_of(kind), attn_implementation=name)
        assert model.config._attn_implementation == model.model.config._attn_implementation == name
        with torch.no_grad():
            logits[name] = model(ids, mask).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=0, atol=1e-5)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(model(ids, mask).logits, logits["sdpa"])


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("kind", KINDS)
def test_device_map(kind, device_map):
    model = AutoModel.from_pretrained(folder_of(kind), trust_remote_code=True, device_map=device_map)
    row = rows(kind)[0][None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(row.to(model.device)).logits.cpu(), tiny_model(kind)(row).logits, rtol=0, atol=1e-4
        )
    # What accelerate must not cut in two
    assert set(model._no_split_modules) >= {
        {"qwen3": "Qwen3DecoderLayer", "deepseek_v3": "DeepseekV3DecoderLayer", "bert": "BertLayer"}[kind]
    }


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_of_loading(kind, tmp_path):
    assert QueritForSequenceClassification.from_pretrained(folder_of(kind)).dtype == torch.float32
    half = QueritForSequenceClassification.from_pretrained(folder_of(kind), dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    folder = save_folder(tmp_path, kind, tiny_model(kind, torch.bfloat16))
    for load in LOADERS:
        assert load(folder).dtype == torch.bfloat16  # as stored
    assert AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("load", LOADERS, ids=["class", "AutoModelForSequenceClassification", "AutoModel"])
@pytest.mark.parametrize("shard", [None, "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again_every_tensor_is_equal(kind, dtype, shard, load, tmp_path):
    model = tiny_model(kind, dtype)
    save_folder(tmp_path, kind, model, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
    expected, loaded = model.state_dict(), load(tmp_path).eval()
    assert expected.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    row = rows(kind)[0][None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(row).logits, model(row).logits, rtol=0, atol=1e-6)


def test_experts_are_split_on_disk_and_fused_in_memory():
    on_disk = load_file(folder_of("deepseek_v3") / "model.safetensors")
    experts = [key for key in on_disk if ".mlp.experts." in key]
    assert len(experts) == 8 * 3
    assert all(key.startswith("model.layers.1.") for key in experts)
    fused = tiny_model("deepseek_v3").state_dict()["model.layers.1.mlp.experts.down_proj"]
    for number in range(8):
        key = f"model.layers.1.mlp.experts.{number}.down_proj.weight"
        assert torch.equal(on_disk[key], fused[number])


def test_experts_implementations_agree_and_are_for_experts_only():
    ids, mask = padded(rows("deepseek_v3"), "left")
    logits = {}
    for name in ("eager", "grouped_mm"):
        folder = folder_of("deepseek_v3")
        model = QueritForSequenceClassification.from_pretrained(folder, experts_implementation=name)
        assert model.config._experts_implementation == model.model.config._experts_implementation == name
        with torch.no_grad():
            logits[name] = model(ids, mask).logits
    torch.testing.assert_close(logits["eager"], logits["grouped_mm"], rtol=0, atol=1e-5)
    model.set_experts_implementation("eager")
    assert model.model.config._experts_implementation == "eager"
    for kind in ("qwen3", "bert"):
        with pytest.raises(ValueError, match="experts implementation"):
            QueritForSequenceClassification.from_pretrained(folder_of(kind), experts_implementation="grouped_mm")


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_is_the_backbones_own_with_what_a_hub_folder_needs(kind):
    config = json.loads((folder_of(kind) / "config.json").read_text())
    assert config["model_type"] == kind
    plain = "BertForSequenceClassification" if kind == "bert" else "QueritForSequenceClassification"
    assert config["architectures"] == [plain]
    name = "modeling_querit.QueritForSequenceClassification"
    assert config["auto_map"] == {"AutoModel": name, "AutoModelForSequenceClassification": name}
    assert config["custom_pipelines"] == {
        "text-ranking": {
            "impl": "pipeline_querit.TextRankingPipeline",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "text",
        }
    }
    assert config.get("classifier_pooling") == (None if kind == "bert" else "last")
    assert AutoConfig.from_pretrained(folder_of(kind)).num_labels == 1
    source = Path(sys.modules[QueritForSequenceClassification.__module__].__file__).parent
    for file in REMOTE_CODE:
        assert (folder_of(kind) / file).read_bytes() == (source / file).read_bytes()
    keys = load_file(folder_of(kind) / "model.safetensors").keys()
    if kind == "bert":
        assert keys == BertForSequenceClassification(tiny_config("bert", num_labels=1)).state_dict().keys()
    else:
        assert all(key.startswith(("model.", "head.")) for key in keys)


@pytest.mark.parametrize("kind", KINDS)
def test_remote_code_does_not_take_plain_backbones_over(kind):
    remote = AutoModel.from_pretrained(folder_of(kind), trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules.")
    assert type(AutoModel.from_pretrained(folder_of(kind))) is BACKBONES[kind]
    assert type(AutoModel.from_config(tiny_config(kind))) is BACKBONES[kind]
    again = AutoModelForSequenceClassification.from_pretrained(folder_of(kind), trust_remote_code=True)
    assert type(again.model) is BACKBONES[kind]


def test_an_unknown_backbone_is_named():
    from transformers import PreTrainedConfig

    class OwnConfig(PreTrainedConfig):
        model_type = "own"

    with pytest.raises(ValueError, match="OwnConfig"):
        QueritForSequenceClassification(OwnConfig())
    # And transformers' own models are as before: a class that it asks for its experts keeps the answer.
    assert "_can_set_experts_implementation_cached_value" not in vars(PreTrainedModel)


@pytest.mark.parametrize("kind", KINDS)
def test_trls_reward_trainer_takes_a_step(kind, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model, tokenizer = tiny_model(kind), tokenizer_of(kind)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pairs = rows(kind, (9, 12, 7, 15))
    data = Dataset.from_dict(
        {"chosen_ids": [row.tolist() for row in pairs], "rejected_ids": [row.tolist()[::-1] for row in pairs]}
    )
    config = RewardConfig(
        tmp_path, per_device_train_batch_size=4, max_steps=1, learning_rate=1e-2, bf16=False, use_cpu=True,
        gradient_checkpointing=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    result = trainer.train()
    assert math.isfinite(result.training_loss)
    assert result.training_loss > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert {
        "classifier.weight" if kind == "bert" else "head.weight",
        f"{model.base_model_prefix}.{next(iter(model.model.state_dict()))}",
    } <= moved
    trainer.save_model(str(tmp_path / "saved"))
    assert QueritForSequenceClassification.from_pretrained(tmp_path / "saved").dtype == torch.float32


def test_importing_the_package_needs_torch_and_transformers_only():
    script = """
import sys
import modeling_querit.pipeline_querit
wanted = {"trl", "datasets", "sentence_transformers", "gradio", "mteb", "pandas", "sklearn", "peft"}
wanted |= {"recipes", "hub_card", "space_app", "typer", "onnxruntime"}
print(sorted(wanted & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", KINDS)
def test_from_backbone_keeps_every_weight_and_adds_a_head(kind, tmp_path):
    plain = BACKBONES[kind](tiny_config(kind))
    plain.save_pretrained(tmp_path)
    model = from_backbone(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == model.relevance_head.weight.dtype == torch.bfloat16
    assert model.relevance_head.weight.abs().sum() > 0
    expected = plain.state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    buffers = dict(plain.named_buffers())
    for name, tensor in model.model.named_buffers():  # RoPE's frequencies, not rounded
        assert torch.equal(tensor, buffers[name]), name
    if kind != "bert":
        assert from_backbone(tmp_path, pooling="cls").pooling == "cls"

    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if "down_proj" in key or "output.dense" in key)
    weights = {name: w for name, w in weights.items() if "pooler" not in name}  # a new one will do
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    fresh = from_backbone(tmp_path)
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    save_file({name: w for name, w in weights.items() if name != key}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"is no whole {BACKBONES[kind].__name__}: .*(down_proj|output.dense)"):
        from_backbone(tmp_path)
