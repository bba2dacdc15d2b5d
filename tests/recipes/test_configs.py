"""Every YAML file of a recipe is one that its stage reads, key for key."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from trl import TrlParser

from recipes.fetch import check as check_dataset
from recipes.lib.generators import read_settings
from recipes.lib.stages import ARGUMENTS, OUTPUT_KEYS, is_path, read_stages, script_of, texts_in
from recipes.lib.targets import read_target
from recipes.lib.teachers import Teacher
from recipes.score import ScoreArguments

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FILES = sorted(RECIPES.glob("querit-*/*.yaml"))
FAMILY = ["querit-4b", "querit-a0.4b"]


def parsed(path):
    """The YAML as its stage's dataclasses; an unknown key raises."""
    script = script_of(path)
    options = ["--use_cpu", "true"] if script == "train" else []  # bf16 is refused where there is no GPU
    classes = [getattr(importlib.import_module(f"recipes.{script}"), name) for name in ARGUMENTS[script]]
    return TrlParser(classes).parse_args_and_config(["--config", str(path), *options], fail_with_unknown_args=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_read_by_its_stage(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = parsed(path)
    assert len(values) == len(ARGUMENTS[script_of(path)])
    assert path.parent.name in (getattr(values[-1], "output_dir", None) or values[-1].output)
    # What the dataclasses hold as plain mappings is read too, as the stage reads it.
    for name, target in getattr(values[0], "targets", {}).items() if isinstance(values[0], ScoreArguments) else ():
        read_target(name, target)
    for teacher in getattr(values[0], "teachers", []):
        assert teacher.keys() <= {field.name for field in fields(Teacher)}
    for entry in getattr(values[0], "generators", []):
        read_settings(entry)
    for name, entry in getattr(values[0], "datasets", {}).items():
        check_dataset(name, entry)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_the_stages_of_a_recipe_have_an_order(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    places = {stage.name: place for place, stage in enumerate(read_stages(folder))}
    assert places.keys() == {path.stem for path in folder.glob("*.yaml")}
    assert all(places[maker] < places[stage.name] for stage in read_stages(folder) for maker in stage.after)


def hub_ids(config: dict, outputs: list[Path]):
    """(Hub id, the commit that stands with it) of a config; the names of a server's models are none."""
    pinned = config.get("revisions", {})
    parts = [config, *config.get("teachers", []), *config.get("datasets", {}).values()]
    parts += [entry for entry in config.get("generators", []) if entry["kind"] == "local"]
    for part in parts:
        for key, value in part.items():
            for text in () if key in ("teachers", "generators", "datasets") else texts_in(value):
                if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and key not in OUTPUT_KEYS and not is_path(text, outputs):
                    own = {"retriever_tokenizer": "retriever_revision"}.get(key, "revision")
                    own = f"{key}_revision" if key in ("retriever", "encoder", "tokenizer") else own
                    own = "model_revision" if key == "model_name_or_path" else own
                    yield text, pinned.get(text) or part.get(own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_comes_from_the_hub_is_pinned(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    outputs = [stage.output for stage in read_stages(path.parent)]
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [name for name, commit in hub_ids(config, outputs) if not re.fullmatch("[0-9a-f]{40}", commit or "")] == []


def test_the_family_pins_what_the_registry_of_mteb_pins(monkeypatch):
    import mteb

    monkeypatch.chdir(ROOT)
    tasks = {task.metadata.dataset["path"]: task for task in mteb.get_tasks(["MSMARCO", "MIRACLRetrieval"])}
    seen = set()
    for stage in (stage for name in FAMILY for stage in read_stages(RECIPES / name)):
        for name, commit in hub_ids(stage.config, []):
            meta = tasks[name].metadata.dataset if name in tasks else None
            assert commit == (meta["revision"] if meta else mteb.get_model_meta(name).revision), name
            seen.add(name)
    assert seen == {
        "Qwen/Qwen3-Embedding-4B", "Qwen/Qwen3-Embedding-0.6B", "nvidia/llama-embed-nemotron-8b", "mteb/msmarco",
        "mteb/MIRACLRetrieval",
    }  # fmt: skip


def test_the_family_follows_what_the_publishers_state(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in FAMILY:
        stages = {stage.name: stage for stage in read_stages(RECIPES / name)}
        scripts = [stage.script for stage in stages.values()]
        assert sorted(set(scripts), key=scripts.index) == [
            "backbone", "fetch", "score", "train", "mine", "merge", "evaluate",
        ]  # fmt: skip
        for stage in stages.values():
            config = stage.config
            if stage.script == "train":
                assert (config["loss"], config["margin_scale"], config["pooling"]) == ("margin", 0.8, "last")
            if stage.script == "score":
                assert (config["top_k"], config["bins"], config["labels"]) == (100, 16, "soft")
                assert [teacher["model"] for teacher in config["teachers"]] == ["nvidia/llama-embed-nemotron-8b"]
            if stage.script == "mine":
                assert [entry["model"] for entry in config["generators"]] == ["deepseek-ai/DeepSeek-R1"]
        adapted = [str(stage.output) for stage in stages.values() if "_adapt_" in stage.name]
        assert sorted(stages["5_merge"].config["models"]) == sorted(adapted) and len(adapted) == 4
        assert stages["6_evaluate"].config["retriever"] == "Qwen/Qwen3-Embedding-0.6B"
        assert stages["6_evaluate"].config["top_k"] == 100


def test_the_two_members_differ_only_where_they_must():
    def stated(name):
        files = sorted((RECIPES / name).glob("*.yaml"))
        texts = {file.stem: file.read_text(encoding="utf-8").replace(name, "NAME") for file in files}
        return {stem: yaml.safe_load(text) for stem, text in texts.items()}

    one, other = map(stated, FAMILY)
    assert one.keys() == other.keys()
    differ = {key for stem in one for key in one[stem] | other[stem] if one[stem].get(key) != other[stem].get(key)}
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert differ == {"source", "revision", "learning_rate", *batch}


@pytest.mark.parametrize(("name", "first"), [*((name, "fr") for name in FAMILY), ("querit-nano", "cjk")])
def test_every_stage_of_a_recipe_has_its_command_and_its_time_in_the_readme(name, first):
    readme = (RECIPES / name / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith("| ")]
    for path in sorted((RECIPES / name).glob("*.yaml")):
        # One command stands for the languages or targets, which are named beside it.
        stage, target = re.fullmatch(r"([234]_[a-z]+)_(\w+)|.*", path.stem).groups()
        stem = f"{stage}_{first}(_[a-z]+)?" if target else path.stem
        command = rf"-m recipes.{script_of(path)} --config recipes/{name}/{stem}\.yaml`"
        (row,) = [cells for cells in rows if re.search(command, " ".join(cells))]
        assert len(row) == 3 and row[2].strip(), path.stem
        assert target is None or re.search(rf"\b{target}\b", readme), path.stem


def test_calibration_uses_queries_that_training_left_out():
    nano = RECIPES / "querit-nano"
    (calibrate,) = parsed(nano / "5_merge_calibrate.yaml")
    for name in ("1_general", "5_merge_general"):
        script, _ = parsed(nano / f"{name}.yaml")
        assert calibrate.data == script.train_data
        assert calibrate.first_group >= script.max_groups


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu", DistributedType.NO, 1),
        ("ddp", DistributedType.MULTI_GPU, 8),
        ("fsdp", DistributedType.FSDP, 8),
        ("zero3", DistributedType.DEEPSPEED, 8),
    ],
)
def test_accelerate_reads_its_configs(name, kind, processes):
    config = load_config_from_file(str(RECIPES / "accelerate_configs" / f"{name}.yaml"))  # an unknown key raises
    assert (config.distributed_type, config.num_processes) == (kind, processes)
    assert config.use_cpu == (name == "cpu")


def test_no_accelerate_config_is_forgotten():
    names = {path.stem for path in (RECIPES / "accelerate_configs").glob("*.yaml")}
    assert names == {"cpu", "ddp", "fsdp", "zero3"}
