"""From a checkpoint to the folder that is uploaded: what is in it, byte for byte the same, whole or not at all."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

import querit
from hub_card import build as module
from hub_card.build import build
from hub_card.card import render
from hub_card.provenance import MERGE_RECORD, RELIABILITY, merges_of
from hub_card.verify import check_kinds
from modeling_querit.modeling_querit import REMOTE_CODE, QueritForSequenceClassification
from querit import cli
from recipes.merge import MergeArguments
from recipes.merge import main as merge
from tests.hub_card.folders_for_tests import BUILT, LENGTH, NANO, ROOT, SYSTEM, built, by_index
from tests.loopback_hub import LoopbackHub
from tests.models_for_tests import CAUSAL_KINDS, KINDS, folder_of, save_folder, tiny_model, tokenizer_of

QUERIT = Path(sys.executable).with_name("querit")
QUERY, DOCUMENTS = "rain", ["Rain fell all night.", "The train stops twice.", "oil", "图书馆每天早上九点开门。"]
CARD = "---\nlicense: apache-2.0\n---\n\n# A tiny model\n"
FILES = {
    "README.md", "LICENSE", "SHA256SUMS", "probes.json", "config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "handler.py", *REMOTE_CODE,
}  # fmt: skip
FOR_CAUSAL = {
    "chat_template.jinja", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
}  # fmt: skip


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scores(folder: Path) -> list[float]:
    ranker = pipeline("text-ranking", model=str(folder), dtype=torch.float32, trust_remote_code=True, device="cpu")
    return by_index(ranker(QUERY, DOCUMENTS))


@pytest.mark.parametrize("kind", BUILT)
def test_the_files_and_their_sums(kind):
    folder = built(kind)
    own = {name for name in (MERGE_RECORD, RELIABILITY) if (NANO / name).exists()}
    more = {"qwen3": FOR_CAUSAL, "deepseek_v3": FOR_CAUSAL, "nano": own}
    expected = FILES | more.get(kind, set())
    there = set(files_in(folder))
    results = {path for path in there if path.startswith(".eval_results/")}
    assert there - results == expected
    assert bool(results) == (kind != "bert")  # a plain card has none
    sums = (folder / "SHA256SUMS").read_text()
    assert {line[66:] for line in sums.splitlines()} == there - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    content = b"".join(files_in(folder).values())
    for place in (tempfile.gettempdir(), str(Path.home()), str(ROOT)):  # no path of the machine it was built on
        assert f"{place}/".encode() not in content


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_the_checkpoints_in_16_bits(kind):
    expected = load_file(folder_of(kind) / "model.safetensors")
    found = load_file(built(kind) / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        kept = "e_score_correction_bias" in key  # rounding it would choose other experts
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), key
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
    assert AutoTokenizer.from_pretrained(built(kind)).model_max_length == LENGTH


def test_the_released_nano_is_a_checkpoint_too():
    expected, found = (load_file(folder / "model.safetensors") for folder in (NANO, built("nano")))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert scores(built("nano")) == pytest.approx(scores(NANO), abs=1e-6)


def test_results_stand_in_the_card_and_in_the_hubs_files():
    folder = built("nano")
    measured = json.loads((ROOT / "recipes/querit-nano/results/dev/results.json").read_text())
    found = {result.dataset_name: result for result in ModelCard.load(folder / "README.md").data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        name: entry["scores"][SYSTEM] for name, entry in measured["sets"].items()
    }
    [entry] = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "xquad-de-en.yaml").read_text()))
    assert (entry.dataset_id, entry.value) == ("google/xquad", measured["sets"]["xquad-de-en"]["scores"][SYSTEM])
    assert f"queries: {measured['sets']['xquad-de-en']['queries']}" in entry.notes
    assert not (folder / ".eval_results" / "cacm.yaml").exists()  # no data set of the Hub


def test_another_process_elsewhere_builds_the_same_bytes_from_the_hub(tmp_path, monkeypatch):
    kind = "deepseek_v3"
    monkeypatch.chdir(folder_of(kind).parent)
    here = build(Path(kind), tmp_path / "tiny", lambda made: render(made), LENGTH)
    command = [str(QUERIT), "build", "--max-length", str(LENGTH)]
    with LoopbackHub() as hub:
        commit = hub.push("org/tiny", folder_of(kind))
        hub.push("org/tiny", save_folder(tmp_path / "later", kind, tiny_model(kind, seed=1)))
        environment = hub.environment(tmp_path / "home")
        arguments = ["org/tiny", "there/tiny", "--revision", commit]
        subprocess.run([*command, *arguments], check=True, cwd=tmp_path, env=environment, timeout=120)
    assert files_in(tmp_path / "there" / "tiny") == files_in(here)
    # Built in its own place, too.
    before = files_in(here)
    assert files_in(build(here, here, lambda made: render(made))) == before


@pytest.mark.parametrize("kind", ["qwen3", "deepseek_v3"])
def test_large_weights_are_split(kind, tmp_path):
    folder = build(folder_of(kind), tmp_path / "x", CARD, LENGTH, max_shard_size="60KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(shards) > 2 and set(index.values()) == set(shards)
    whole = load_file(built(kind) / "model.safetensors")
    split = {key: tensor for shard in shards for key, tensor in load_file(folder / shard).items()}
    assert split.keys() == whole.keys() == index.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in split.items())
    assert scores(folder) == pytest.approx(scores(built(kind)), abs=1e-6)


def test_the_card_is_given_and_what_stood_there_goes(tmp_path):
    folder = shutil.copytree(folder_of("bert"), tmp_path / "nano")
    (folder / "stale.txt").write_text("of an earlier release")
    (folder / "pytorch_model.bin").write_bytes(b"")
    build(folder_of("bert"), folder, CARD, dtype=torch.float16)
    assert not {"stale.txt", "pytorch_model.bin"} & set(files_in(folder))
    assert (folder / "README.md").read_text() == CARD
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_a_build_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    folder = build(folder_of("bert"), tmp_path / "nano", CARD)
    before = files_in(folder)
    monkeypatch.setattr(module, "LICENSE", tmp_path / "no-licence")
    with pytest.raises(FileNotFoundError):
        build(folder_of("bert"), folder, "another card")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model_index"):  # the last thing that is read
        build(folder_of("bert"), folder, "---\nmodel-index:\n- name: x\n---\n")
    rename = Path.rename

    def fail_at_the_new_one(path, target):
        if path.name == target.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", lambda path, to: fail_at_the_new_one(path, Path(to)))
    with pytest.raises(OSError, match="No space"):
        build(folder_of("bert"), folder, "another card")
    monkeypatch.undo()
    assert files_in(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["nano"]


def test_what_is_no_model_is_neither_built_nor_replaced(tmp_path, monkeypatch):
    tiny_model("qwen3").model.save_pretrained(tmp_path / "in" / "backbone")
    tokenizer_of("qwen3").save_pretrained(tmp_path / "in" / "backbone")
    with pytest.raises(ValueError, match="is no Querit reranker"):
        build(tmp_path / "in" / "backbone", tmp_path / "out", CARD)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("kept")
    with pytest.raises(ValueError, match="is no model, and would be replaced"):
        build(folder_of("bert"), tmp_path / "notes", CARD)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        build(tmp_path / "in" / "backbone", tmp_path / "in", CARD)
    with pytest.raises(ValueError, match="is a file"):
        build(tmp_path / "notes" / "diary.txt", tmp_path / "out", CARD)
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    (tmp_path / "clone" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a git repository"):
        build(folder_of("bert"), tmp_path / "clone", CARD)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="the folder that you are in"):
        build(folder_of("bert"), Path("."), CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "here", "in", "notes"]
    assert files_in(tmp_path / "notes") == {"diary.txt": b"kept"}


@pytest.mark.parametrize(("linear", "only"), [(3, False), (6, True)])
def test_the_record_of_a_merge_comes_along_without_paths(tmp_path, linear, only):
    source = shutil.copytree(folder_of("bert"), tmp_path / "merged")
    step = {"model": "/data/me/adapted-b", "t": 0.5, "linear_tensors": linear, "identical_tensors": 4}
    models = [{"model": "/data/me/adapted-a"}, {"model": "/data/me/adapted-b"}]
    record = {"method": "slerp", "models": models, "weights": [0.5, 0.5], "tensors": 10, "steps": [step]}
    (source / "merge.json").write_text(json.dumps(record))
    folder = build(source, tmp_path / "x", lambda made: render(made))
    assert "/data/me" not in (folder / "merge.json").read_text()
    card = (folder / "README.md").read_text()
    assert "adapted-a 0.50, adapted-b 0.50." in card
    assert f"At `adapted-b`, {linear} of the 6 tensors that differed" in card
    assert ("SLERP took its spherical path nowhere" in card) == only


def test_of_several_merges_each_is_told_without_paths(tmp_path):
    source = shutil.copytree(folder_of("bert"), tmp_path / "merged")
    step = {"model": "/data/me/b", "t": 0.5, "linear_tensors": 6, "identical_tensors": 4}
    first = {"method": "slerp", "models": [{"model": "/data/me/a"}, {"model": "/data/me/b"}], "weights": [0.5, 0.5]}
    first |= {"tensors": 10, "steps": [step]}
    last = first | {"method": "linear", "models": [{"model": "/data/me/further"}, {"model": "/data/me/base"}]}
    last |= {"weights": [0.88, 0.12], "steps": [], "first_only": ["word_embeddings"], "earlier": [first]}
    (source / "merge.json").write_text(json.dumps(last))
    folder = build(source, tmp_path / "x", lambda made: render(made))
    assert "/data/me" not in (folder / "merge.json").read_text()
    assert [merge["method"] for merge in merges_of(folder)] == ["slerp", "linear"]
    told = (folder / "README.md").read_text().split("Nobody wrote it down for this card.\n\n")[1].split("\n\n## ")[0]
    assert told.splitlines() == [
        "Its checkpoints were merged (slerp), with the weights a 0.50, b 0.50.",
        "At `b`, 6 of the 6 tensors that differed were so nearly parallel that they were merged linearly.",
        "So SLERP took its spherical path nowhere: the models lie too near each other, and their merge is the weighted "
        "mean.",
        "",
        "Another merge followed (linear), with the weights further 0.88, base 0.12.",
        "Tensors with word_embeddings in their names stayed those of further.",
    ]


def test_what_calibration_measured_comes_along_and_into_the_card(tmp_path):
    source = shutil.copytree(folder_of("bert"), tmp_path / "calibrated")
    values = {"n": 4321, "ece": 0.0567, "right_mean": 0.81, "wrong_mean": 0.12, "bins": []}
    (source / "reliability.json").write_text(json.dumps({"tlh": values}))
    folder = build(source, tmp_path / "x", lambda made: render(made, "querit-reranker-nano"))
    assert json.loads((folder / "reliability.json").read_text()) == {"tlh": values}
    assert "| tlh | 4,321 | 0.057 | 0.81 | 0.12 |" in (folder / "README.md").read_text()
    assert not list(check_kinds(folder))


def test_a_missing_padding_token_is_the_closing_one(tmp_path):
    source = shutil.copytree(folder_of("qwen3"), tmp_path / "in")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    tokenizer = AutoTokenizer.from_pretrained(build(source, tmp_path / "x", CARD))
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_build_loads_by_the_class_installed_here():
    for kind in KINDS:
        model, info = QueritForSequenceClassification.from_pretrained(built(kind), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.pooling == ("cls" if kind == "bert" else "last")


def test_to_other_engines_a_bert_is_a_plain_one_and_the_others_have_no_labels():
    config = json.loads((built("bert") / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["id2label"] == {"0": "LABEL_0"}
    tokenizer = json.loads((built("bert") / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no TokenizersBackend
    for kind in CAUSAL_KINDS:
        config = json.loads((built(kind) / "config.json").read_text())
        assert config["id2label"] == config["label2id"] == {} and "num_labels" not in config
        # The head is not that of transformers: nothing comes out, instead of what a random one says.
        theirs = AutoModelForSequenceClassification.from_pretrained(built(kind), trust_remote_code=False)
        assert theirs(torch.tensor([[1, 2, 3]])).logits.shape == (1, 0)


def probabilities(folder: Path) -> list[float]:
    model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return model.predict([(QUERY, document) for document in DOCUMENTS]).tolist()


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("trust", [False, True])
def test_what_sentence_transformers_trained_and_saved_becomes_a_release_with_one_head(kind, trust, tmp_path):
    saved, options = tmp_path / "saved", {"dtype": torch.float32}
    model = CrossEncoder(str(built(kind)), device="cpu", trust_remote_code=trust, model_kwargs=options)
    head = model[0].model.classifier if kind == "bert" else model[2].linear
    with torch.no_grad():
        head.weight += 0.3 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
        head.bias -= 0.2
    model.save_pretrained(str(saved))
    expected = model.predict([(QUERY, document) for document in DOCUMENTS]).tolist()
    assert max(abs(a - b) for a, b in zip(expected, probabilities(built(kind)), strict=True)) > 0.01
    if kind == "qwen3":
        with pytest.raises(ValueError, match="querit build"):
            querit.load(saved)
    folder = build(saved, tmp_path / "release", CARD, LENGTH, dtype=torch.float32)
    assert probabilities(folder) == pytest.approx(expected, abs=1e-5)
    assert [(score + 1) / 2 for score in scores(folder)] == pytest.approx(expected, abs=1e-5)
    assert by_index(querit.load(folder, dtype="float32")(QUERY, DOCUMENTS), "probability") == pytest.approx(
        expected, abs=1e-5
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 94080108\n"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "Download tokenizer.json"),
        ({"tokenizer.json": None}, "no tokenizer that can be read"),
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}'}, "knows no word"),
        ({"tokenizer_config.json": None}, "no tokenizer_config.json, which says how text is read"),
        ({"tokenizer.json": POINTER}, "git lfs pull"),
        ({"tokenizer_config.json": POINTER}, "git lfs pull"),
        ({"tokenizer.json": b'{"version": "1.0", "trunc'}, "no tokenizer that can be read"),
        ({"tokenizer.json": b"{}"}, "no tokenizer that can be read"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(files, words, tmp_path):
    """transformers itself loads most of these in silence, and the model then ranks by other ids."""
    folder = shutil.copytree(folder_of("bert"), tmp_path / "spoilt")
    for name, content in files.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    for use in (querit.load, lambda source: build(source, tmp_path / "out", CARD)):
        with pytest.raises(ValueError, match=words):
            use(folder)
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_model_has_no_embedding_for_are_refused(tmp_path):
    folder = shutil.copytree(folder_of("bert"), tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["puffinry"])
    tokenizer.save_pretrained(folder)
    for use in (querit.load, lambda source: build(source, tmp_path / "out", CARD)):
        with pytest.raises(ValueError, match=r"ids beyond the .* rows of the embeddings: puffinry"):
            use(folder)


def test_lengths_beyond_the_models_positions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_length=513 is over the 512 positions"):
        build(folder_of("bert"), tmp_path / "out", CARD, max_length=513)


def test_a_missing_checkpoint_is_called_missing_and_a_revision_is_of_a_repo(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder does not exist"):
        build("no-such-folder", tmp_path / "out", CARD)
    for use in (querit.load, lambda source, revision: build(source, tmp_path / "out", CARD, revision=revision)):
        with pytest.raises(ValueError, match="nothing tells commits apart"):
            use(str(folder_of("bert")), revision="0123abc")


@pytest.mark.parametrize(
    ("content", "fix"), [(POINTER, "git lfs pull"), (None, "Download it again"), (b"", "truncated")]
)
def test_broken_weights_are_one_sentence_wherever_they_are_loaded(content, fix, tmp_path):
    folder = shutil.copytree(folder_of("bert"), tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    (tmp_path / "notes.txt").write_text("A line.\n")
    for command in (
        ["rank", QUERY, str(tmp_path / "notes.txt"), "--model", str(folder)],
        ["build", str(folder), str(tmp_path / "out")],
    ):
        found = CliRunner().invoke(cli.app, command)
        assert found.exit_code == 1 and isinstance(found.exception, SystemExit), found.exception
        assert str(file) in found.output.replace("\n", "") and fix in found.output.replace("\n", " ")
    with pytest.raises(ValueError, match=fix):
        merge(MergeArguments(models=[str(folder), str(folder_of("bert"))], output_dir=str(tmp_path / "merged")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "merged").exists()
