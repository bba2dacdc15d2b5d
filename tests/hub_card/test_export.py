"""Exports to vLLM's kind of folder, read back by transformers' own classes; and what no export takes."""

import json
import re
import shutil
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from hub_card.export import export
from hub_card.probes import PROBES
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from querit import cli
from tests.models_for_tests import (
    CAUSAL_KINDS,
    MAX_LENGTH,
    SCRATCH,
    folder_of,
    save_folder,
    tiny_config,
    tiny_model,
    tokenizer_of,
)

CLASSES = {"qwen3": "Qwen3ForSequenceClassification", "deepseek_v3": "DeepseekV3ForSequenceClassification"}
QUERY = "when does the train leave"
DOCUMENTS = [
    "The train to Cologne leaves at 7:45 from platform 12.",
    "Oil.",
    "Der Zug fährt um 7:45 Uhr ab; er hält unterwegs in Düsseldorf und kommt gegen neun Uhr an.",
    "今天的天气很好，我们去公园散步吧。",
    "Prices: $1,299.00 (was $1,450)\n\n\tcall +49 30 123456 😀",
]


@cache
def source_of(kind: str) -> Path:
    model = tiny_model(kind)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.25, -0.4]))  # large enough to be seen
    return save_folder(SCRATCH / "exports" / f"{kind}-source", kind, model)


@cache
def exported(kind: str) -> Path:
    return export(source_of(kind), SCRATCH / "exports" / kind, "vllm")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def prompts(folder):
    """Token ids as vLLM makes them: messages of two roles, rendered by the template file, then tokenised."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "query", "content": QUERY}, {"role": "document", "content": document}],
            chat_template=template,
            tokenize=False,
        )
        for document in DOCUMENTS
    ]
    return tokenizer, texts


def by_place(ranking, key):
    return [row[key] for row in sorted(ranking, key=lambda row: row["index"])]


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_own_class_has_the_models_log_odds_less_the_bias(kind, side):
    folder = exported(kind)
    config = read_json(folder / "config.json")
    assert config["architectures"] == [CLASSES[kind]] and config["num_labels"] == 1
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs).__name__ == CLASSES[kind]
    tokenizer, texts = prompts(folder)
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    ours = QueritForSequenceClassification.from_pretrained(source_of(kind), dtype=torch.float32)
    bias = (ours.head.bias[1] - ours.head.bias[0]).item()
    with torch.no_grad():
        logits = theirs(**batch).logits[:, 0]
        hidden = ours.model(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0, -1]
        two = hidden @ ours.head.weight.T + ours.head.bias  # the head as it is defined, not as it is computed
        expected = ours(**batch).logits[:, 0]
    assert (logits[0] + bias).item() == pytest.approx((two[1] - two[0]).item(), abs=1e-4)
    assert (logits + bias).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert config["score_bias"] == pytest.approx(bias, abs=1e-6)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_what_the_export_says_it_keeps(kind):
    folder = exported(kind)
    ranking = pipeline("text-ranking", model=str(source_of(kind)), trust_remote_code=True, dtype=torch.float32)(
        QUERY, DOCUMENTS
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer, texts = prompts(folder)
    with torch.no_grad():
        logits = torch.cat([theirs(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
    assert logits.argsort(descending=True).tolist() == [row["index"] for row in ranking]  # the order, without the bias
    with_bias = torch.sigmoid(logits + theirs.config.score_bias)
    assert with_bias.tolist() == pytest.approx(by_place(ranking, "probability"), abs=1e-5)
    assert (2 * with_bias - 1).tolist() == pytest.approx(by_place(ranking, "score"), abs=2e-5)
    assert (torch.sigmoid(logits) - with_bias).min() > 0.01  # without it, all probabilities are too high
    assert read_json(folder / "export.json")["keeps"]["order"] == "the same"


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_the_head_as_vllm_reads_it(kind):
    # vLLM: logits = linear(hidden.float(), score.weight, score.bias), both in float32, then a sigmoid.
    weights = load_file(exported(kind) / "model.safetensors")
    assert weights["score.weight"].dtype == weights["score.bias"].dtype == torch.float32
    ours = QueritForSequenceClassification.from_pretrained(source_of(kind), dtype=torch.float32)
    tokenizer, texts = prompts(exported(kind))
    with torch.no_grad():
        batch = tokenizer(texts[:1], return_tensors="pt")
        hidden = ours.model(**batch).last_hidden_state[:, -1].float()
        found = torch.nn.functional.linear(hidden, weights["score.weight"], weights["score.bias"])
        expected = ours(**batch)
    assert torch.sigmoid(found).item() == pytest.approx(torch.sigmoid(expected.logits).item(), abs=1e-6)
    assert 2 * torch.sigmoid(found).item() - 1 == pytest.approx(expected.score.item(), abs=1e-6)
    # A router without these is to vLLM one by softmax that has no bias; in transformers it is by sigmoid, with one.
    config = json.loads((exported(kind) / "config.json").read_text(encoding="utf-8"))
    router = (config.get("topk_method"), config.get("scoring_func"))
    assert router == (("noaux_tc", "sigmoid") if kind == "deepseek_v3" else (None, None))
    # Seen with vLLM's kernels for CPUs, which tests/integrations runs.
    assert ("-rotary_embedding" in (exported(kind) / "README.md").read_text("utf-8")) == (kind == "deepseek_v3")
    source = load_file(source_of(kind) / "model.safetensors")
    assert weights.keys() ^ source.keys() == {"score.weight", "score.bias", "head.weight", "head.bias"}
    assert all(torch.equal(weights[key], source[key]) for key in weights.keys() & source.keys())


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_the_template_gives_the_prompt_of_the_pipeline(kind):
    tokenizer, texts = prompts(exported(kind))
    pairs = PromptEncoder(tokenizer_of(kind), MAX_LENGTH).encode(QUERY, DOCUMENTS)
    # As vLLM does it: special tokens asked for.
    assert [tokenizer(text, add_special_tokens=True)["input_ids"] for text in texts] == [p.input_ids for p in pairs]
    assert all(text.endswith("[CLS]") for text in texts)


def test_the_folder_names_no_code_of_ours_and_no_path():
    folder = exported("qwen3")
    config = read_json(folder / "config.json")
    assert not {"auto_map", "custom_pipelines", "classifier_pooling"} & config.keys()
    assert config["pad_token_id"] == tokenizer_of("qwen3").pad_token_id
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".md", ".safetensors"}
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert str(SCRATCH) not in path.read_text(encoding="utf-8"), path


def test_the_record_holds_probes_with_the_models_probabilities():
    record = read_json(exported("qwen3") / "export.json")
    ranker = pipeline("text-ranking", model=str(source_of("qwen3")), trust_remote_code=True, dtype=torch.float32)
    found = {(probe["query"], probe["document"]): probe["probability"] for probe in record["probes"]}
    assert len(found) == sum(map(len, PROBES.values()))
    for query, documents in PROBES.items():
        expected = by_place(ranker(query, documents), "probability")
        assert [found[query, document] for document in documents] == pytest.approx(expected, abs=1e-5)
    assert record["checked"]["largest_difference_of_a_logit"] < 1e-4


def test_the_readmes_code_gives_the_models_probability(monkeypatch, capsys):
    folder = exported("qwen3")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code, found)  # noqa: S102 - the code that the card shows
    ranker = pipeline("text-ranking", model=str(source_of("qwen3")), trust_remote_code=True, dtype=torch.float32)
    (expected,) = ranker("Why does the sea rise?", ["The Moon pulls on it."])
    assert found["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    assert "--chat-template chat_template.jinja" in readme and f"--max-model-len {MAX_LENGTH}" in readme


@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", torch.bfloat16), ("deepseek_v3", torch.float32)])
def test_shards_stay_as_they_are_but_for_the_head(tmp_path, kind, dtype):
    model = tiny_model(kind, dtype, seed=1)
    source = save_folder(tmp_path / "source", kind, model, max_shard_size="60KB")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    folder = export(source, tmp_path / "out", "vllm")
    index = read_json(folder / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 2
    tensors = {}
    for name in sorted(set(index["weight_map"].values())):
        for key, value in load_file(folder / name).items():
            assert index["weight_map"][key] == name
            tensors[key] = value
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    # bfloat16 rows, their difference kept whole: rounded again, near-equal documents would tie.
    weight = model.head.weight.detach().float()
    assert torch.equal(tensors["score.weight"][0], weight[1] - weight[0])
    assert {value.dtype for key, value in tensors.items() if key.startswith("model.layers.0")} == {dtype}
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_language_models_head_is_left_out(tmp_path):
    source = shutil.copytree(folder_of("qwen3"), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    found = load_file(export(source, tmp_path / "out", "vllm") / "model.safetensors")
    assert "lm_head.weight" not in found and "score.weight" in found


# ---------------------------------------------------------------- errors: nothing is left behind


def add_bos(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    bos = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    tokenizer["post_processor"] = json.loads(bos.__getstate__())
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def edit_config(**changes):
    def edit(folder):
        config = {**read_json(folder / "config.json"), **changes}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return edit


def drop_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder):
    path = folder / "model.safetensors"
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    path.write_bytes(path.read_bytes()[: header + 100])


def train_row(folder):
    """As sentence-transformers saves what it trained: a row of its own, beside a head that it does not know."""
    width = read_json(folder / "config.json")["hidden_size"]
    row = {"linear.weight": torch.ones(1, width), "linear.bias": torch.ones(1)}
    (folder / "2_Dense").mkdir()
    save_file(row, folder / "2_Dense" / "model.safetensors")


ERRORS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "another architecture": (edit_config(architectures=["Qwen3ForCausalLM"]), "no Querit reranker.*querit convert"),
    "another read-out": (edit_config(classifier_pooling="cls"), 'classifier_pooling "last"'),
    "no head": (drop_head, "head.weight missing"),
    "two heads": (train_row, "querit build"),
    "truncated weights": (cut_weights, "truncated or no safetensors"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "template"),
    "a tokenizer that adds a BOS": (add_bos, "adds? tokens"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_faulty_source_is_told_and_leaves_nothing(tmp_path, case):
    break_it, message = ERRORS[case]
    source = shutil.copytree(folder_of("qwen3"), tmp_path / "source")
    break_it(source)
    result = CliRunner().invoke(cli.app, ["export", str(source), str(tmp_path / "out"), "--to", "vllm"])
    assert result.exit_code == 1, result.output
    assert re.search(message, " ".join(result.output.split())), result.output
    assert not result.exception or isinstance(result.exception, SystemExit)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_backbone_or_a_bidirectional_model_is_told(tmp_path):
    backbone = tmp_path / "backbone"
    tiny_config("qwen3", architectures=["Qwen3Model"]).save_pretrained(backbone)
    with pytest.raises(ValueError, match="no Querit reranker"):
        export(backbone, tmp_path / "out", "vllm")
    with pytest.raises(ValueError, match=r"is a bert.*--to onnx"):
        export(folder_of("bert"), tmp_path / "out", "vllm")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export(tmp_path / "nowhere", tmp_path / "out", "vllm")
    with pytest.raises(ValueError, match="vllm or onnx"):
        export(folder_of("qwen3"), tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]


def test_an_output_in_use_and_the_source_itself_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for to in ("vllm", "onnx"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            export(folder_of("qwen3"), tmp_path / "out", to)
    with pytest.raises(ValueError, match="is the source"):
        export(folder_of("qwen3"), folder_of("qwen3"), "vllm")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="the folder that you are in"):
        export(folder_of("qwen3"), ".", "vllm")


def test_scores_that_differ_are_refused(tmp_path):
    # Biases that swallow the logits' last digits: there, one row less the other is not what the two give.
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([1e6, 1e6 + 1]))
    source = save_folder(tmp_path / "source", "qwen3", model)
    with pytest.raises(ValueError, match="scores otherwise than the model"):
        export(source, tmp_path / "out", "vllm")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command(tmp_path):
    out = tmp_path / "deep" / "out"
    result = CliRunner().invoke(cli.app, ["export", str(folder_of("qwen3")), str(out), "--to", "vllm"])
    assert result.exit_code == 0, result.output
    assert (out / "README.md").exists() and [path.name for path in out.parent.iterdir()] == ["out"]
    assert CliRunner().invoke(cli.app, ["export", str(out), str(tmp_path / "x"), "--to", "gguf"]).exit_code == 2
    text = " ".join(CliRunner().invoke(cli.app, ["export", "--help"]).output.split())
    assert "the order alone is kept" in text and "keeps order, score and probability" in text
