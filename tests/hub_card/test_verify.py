"""A good release passes; every way to spoil one is named with its fix, and no foreign code runs on the way."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hub_card.build import sums_of
from hub_card.engines import ENGINES
from hub_card.verify import verify
from querit import cli
from tests.hub_card.folders_for_tests import BUILT, built

EVIL = "\nopen({ran!r}, 'w').close()\n"


@pytest.mark.parametrize("kind", BUILT)
def test_a_build_is_good(kind):
    assert verify(built(kind)) == []


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_text(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def edit_weights(change: Callable[[dict], object], name: str = "model.safetensors") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, {"format": "pt"})

    return apply


def write(name: str, text: str = "x") -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return apply


def add_code(name: str) -> Callable[[Path], object]:
    """Code that leaves a trace when it runs, at the end of a file."""

    def apply(folder: Path) -> None:
        old = (folder / name).read_text() if (folder / name).exists() else ""
        (folder / name).write_text(old + EVIL.format(ran=str(folder.parent / "ran")))

    return apply


def other_modules(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "evil.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    add_code("evil.py")(folder)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def foreign(config: str, **names) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        edit_json(folder / config, **names)
        add_code("evil.py")(folder)

    return apply


def head_of(state: dict) -> None:
    state["head.weight"] = torch.zeros(3, 48)


CODE = {"AutoModel": "evil.Model", "AutoModelForSequenceClassification": "evil.Model"}
Spoiled = tuple[str, Callable[[Path], object], bool, str]  # kind, what is done, sums made anew, what is said of it
SPOILED: dict[str, Spoiled] = {
    "missing": ("bert", lambda folder: (folder / "LICENSE").unlink(), False, "LICENSE is missing. Download it again"),
    "missing, listed so": ("bert", lambda folder: (folder / "LICENSE").unlink(), True, "LICENSE is missing: a release"),
    "extra": ("bert", write("vocab.txt"), False, "vocab.txt is not in SHA256SUMS. Remove it"),
    "unknown": ("bert", write("notes/todo.md"), True, "notes/todo.md is no file of a release. Remove it"),
    "changed": ("bert", edit_text("LICENSE", "Apache", "Ápache"), False, "LICENSE is not what was built: its hash"),
    "no sums": ("bert", lambda folder: (folder / "SHA256SUMS").unlink(), False, "SHA256SUMS is missing. Build"),
    "sums": ("bert", edit_text("SHA256SUMS", "  ", " "), False, "SHA256SUMS has the line"),
    "link": ("bert", lambda folder: (folder / "NOTICE").symlink_to("nowhere"), False, "NOTICE is not in SHA256SUMS"),
    "pickle": ("bert", write("pytorch_model.bin"), True, "pytorch_model.bin may hold a pickle.*Remove it"),
    "pickle below": ("bert", write("1_Pooling/state.PT"), True, "1_Pooling/state.PT may hold a pickle"),
    "foreign code": ("bert", add_code("evil.py"), True, "evil.py is code that is not Querit's. It was not run"),
    "changed code": ("bert", add_code("modeling_querit.py"), True, "modeling_querit.py is not the installed package's"),
    "code below": ("bert", write("1_Pooling/__init__.py", "1/0"), True, "1_Pooling/__init__.py is code"),
    "auto_map": ("bert", foreign("config.json", auto_map=CODE), True, "config.json names other code under auto_map"),
    "no auto_map": ("bert", foreign("config.json", auto_map=None), True, "config.json names other code"),
    "pipeline": ("bert", foreign("config.json", custom_pipelines={}), True, "other code under custom_pipelines"),
    "tokenizer's code": (
        "bert", foreign("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}), True,
        "tokenizer_config.json names other code under auto_map",
    ),
    "module's code": ("qwen3", other_modules, True, "modules.json is not that of this config and head"),
    "tensor gone": (
        "qwen3", edit_weights(lambda state: state.pop("model.norm.weight")), True, "weights lack model.norm.weight"
    ),
    "tensor more": (
        "qwen3", edit_weights(lambda state: state.update(x=torch.zeros(1))), True, "weights have x, which this"
    ),
    "expert gone": (
        "deepseek_v3", edit_weights(lambda state: state.pop("model.layers.1.mlp.experts.3.up_proj.weight")), True,
        "the weights lack model.layers.1.mlp.experts.3.up_proj.weight",
    ),
    "shape": (
        "qwen3", edit_weights(head_of), True, r"head.weight has the shape \[3, 48\]; config.json asks for \[2, 48\]"
    ),
    "layers": (
        "qwen3", lambda folder: edit_json(folder / "config.json", num_hidden_layers=1, layer_types=None), True,
        "the weights have model.layers.1.input_layernorm.weight",
    ),
    "truncated": ("qwen3", truncate, True, "truncated or no safetensors file"),
    "no config": ("qwen3", lambda folder: (folder / "config.json").unlink(), True, "config.json is missing"),
    "config": ("qwen3", write("config.json", "{"), True, "config.json"),
    "read-out": ("qwen3", lambda f: edit_json(f / "config.json", classifier_pooling="cls"), True, "1_Pooling/config"),
    "second head": ("bert", write("modules.json", "[]"), True, "modules.json is a second head beside the classifier"),
    "labels": (
        "qwen3", lambda f: edit_json(f / "config.json", id2label={"0": "LABEL_0"}), True, "would rank by random weights"
    ),
    "labels of a bert": (
        "bert", lambda f: edit_json(f / "config.json", architectures=["BertModel"]), True, "with one label"
    ),
    "Dense": (
        "qwen3", edit_weights(lambda state: state["linear.bias"].add_(1), "2_Dense/model.safetensors"), True,
        "2_Dense/model.safetensors is not that of this config and head",
    ),
    "licence": ("bert", edit_text("README.md", "license: apache-2.0\n", ""), True, "metadata has no license. Add it"),
    "task": ("bert", edit_text("README.md", "text-ranking", "fill-mask"), True, "pipeline_tag is 'fill-mask'"),
    "no metadata": ("bert", write("README.md", "# Nano\n"), True, "metadata has no library_name"),
    "yaml": ("bert", write("README.md", "---\na: [\n---\n"), True, "metadata is not valid"),
    "base": (
        "bert", edit_text("README.md", "---\n\n#", "base_model: runs/x/y\n---\n\n#"), True, "'runs/x/y' is no Hub id"
    ),
    "result": (
        "qwen3", edit_text(".eval_results/T2Reranking.yaml", "69.39", "96.39"), True, "does not say what the card says"
    ),
    "result more": ("qwen3", write(".eval_results/x.yaml"), True, "x.yaml and the card's results are not the same"),
    "probes": ("bert", write("probes.json", '{"pairs": []}'), True, "probes.json holds no pairs"),
    "probes' form": ("bert", write("probes.json", '{"pairs": [{"query": "a"}]}'), True, "holds no pairs with scores"),
    "probes' range": ("qwen3", edit_text("probes.json", '"score": ', '"score": 7'), True, r"outside \[-1, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_spoiled_is_named(name, tmp_path):
    kind, spoil, resum, message = SPOILED[name]
    folder = shutil.copytree(built(kind), tmp_path / "release")
    spoil(folder)
    if resum:
        (folder / "SHA256SUMS").write_text(sums_of(folder))
    problems = verify(folder)
    assert any(re.search(message, problem) for problem in problems), problems
    assert not any(engine in problem for engine in ENGINES for problem in problems)  # they were not tried
    assert not (tmp_path / "ran").exists()


def test_the_engines_must_score_the_probes_as_the_builder_did(tmp_path):
    folder = shutil.copytree(built("qwen3"), tmp_path / "release")
    edit_weights(lambda state: state["model.norm.weight"].mul_(1.5))(folder)
    (folder / "SHA256SUMS").write_text(sums_of(folder))
    problems = verify(folder)
    assert [problem.split(" scores ")[0] for problem in problems] == list(ENGINES)
    assert all("Build the folder again" in problem for problem in problems)

    probes = json.loads((built("qwen3") / "probes.json").read_text())
    probes["pairs"][3]["score"] = -probes["pairs"][3]["score"] + 0.01
    folder = shutil.copytree(built("qwen3"), tmp_path / "other")
    (folder / "probes.json").write_text(json.dumps(probes))
    (folder / "SHA256SUMS").write_text(sums_of(folder))
    problems = verify(folder)
    assert len(problems) == len(ENGINES) and all("scores 1 of" in problem for problem in problems)


def test_each_engine_is_judged_by_itself(tmp_path):
    folder = shutil.copytree(built("qwen3"), tmp_path / "release")
    edit_json(folder / "tokenizer_config.json", model_max_length=40)  # those who cut there read less than the builder
    (folder / "SHA256SUMS").write_text(sums_of(folder))
    off = [problem.split(" scores ")[0] for problem in verify(folder)]
    assert off == [name for name in ENGINES if name != "AutoModelForSequenceClassification"]


def test_the_command_reports_each_check_and_fails_with_all_problems(tmp_path):
    good = CliRunner().invoke(cli.app, ["verify", str(built("bert"))])
    assert good.exit_code == 0, good.output
    assert good.stdout.count("ok ") == 8 + len(ENGINES)
    folder = shutil.copytree(built("bert"), tmp_path / "release")
    (folder / "LICENSE").unlink()
    add_code("evil.py")(folder)
    command = [sys.executable, "-m", "querit", "verify", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert "wrong hashes" in found.stdout and "ok    tensors" in found.stdout
    for problem in verify(folder):
        assert problem in found.stderr
    assert "has 4 problems" in found.stderr
    assert not (tmp_path / "ran").exists()
    missing = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "is no folder" in missing.output
