"""The three members' recipes, with the files and keys that stand in `recipes/`, at tiny size.

Every kind of stage runs, up to what is released, but for Nano's first two, which take models out of packages. Of the
targets the merge's first and last one run, and of Nano's no ablation.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import pipeline

import recipes.calibrate
from querit.files import read_record
from recipes.lib.stages import Stage, read_stages
from recipes.run import launch_here, plan, run
from tests.models_for_tests import SCRATCH
from tests.recipes.folders_for_tests import SUBJECTS, small_set, tiny_retriever, write_beir
from tests.recipes.nano_for_tests import save_parallel, save_teacher, sentences
from tests.recipes.test_backbone import plain_backbone
from tests.recipes.test_generators import Server

ROOT = Path(__file__).parents[2]
# Keys that say how much; all others are the recipe's own.
SIZES: dict[str, dict[str, Any]] = {
    "train": {
        "use_cpu": True, "torch_compile": False, "max_length": 128, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "learning_rate": 1.0e-3, "warmup_steps": 1, "save_steps": 3, "max_groups": 12,
        "disable_tqdm": True,
    },
    "mine": {"sample": 12, "retriever_batch_size": 8, "shard_size": 8},
    "score": {"top_k": 10, "candidates": 3, "passage_tokens": 32, "batch_size": 8, "shard_size": 8},
    "vocabulary": {
        "words": {"de": 30, "ja": 30}, "parts": {"de": 10, "ja": 5}, "cjk_characters": 300, "hangul_characters": 10,
        "hangul_starts": 5, "other_characters": 400, "sample": 30, "parallel": ["tiny/parallel.jsonl"],
    },
    "base": {"languages": ["de", "ja"], "parallel": ["tiny/parallel.jsonl"], "aligned": {}},
    "align": {
        "languages": {"de": 1.0, "ja": 1.0}, "parallel": ["tiny/parallel.jsonl"], "aligned": {}, "layers": 2,
        "layer_weights": {2: 1.0}, "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "use_cpu": True, "save_steps": 1, "warmup_steps": 1, "disable_tqdm": True,
    },
    "crosslingual": {
        "mix": {"switched": 8, "monolingual": 14, "sentences": 12}, "sentences": ["tiny/parallel.jsonl"],
        "questions": [], "aligned": {}, "pooled": {}, "languages": {}, "short_tokens": 24, "long_tokens": 32,
        "shard_size": 16,
    },
    "calibrate": {"first_group": 12, "groups": 20},
    "evaluate": {"top_k": 6, "max_queries": 5, "max_length": 128},
}  # fmt: skip
TEXTS = {
    "fr": "Le {} de la cuisine reste au sec, et chaque année on le graisse avec de l'huile : c'est le numéro {}.",
    "ja": "台所の{}は乾いた場所に置いて、年に一度は油を差してください。これは{}番の品物です。",
}
ABOUT = (
    "In the {2} an old {0} with the number {1} was found under a sheet of paper. Whoever wants a {0} for the {2} "
    "should oil it once a year, and keep shelf {1} free for it."
)
PLACES = ["harbour", "kitchen", "garden", "workshop", "attic"]
QUERIES = {
    "fr": "graisser objet {0}\nComment faut-il entretenir l'objet numéro {0} de la cuisine ?",
    "ja": "{0}番の油\n台所の{0}番の品物はどのように手入れすればよいですか？",
}


def answer(messages: list[dict]) -> str:
    """What the language model's server says: two queries in the document's language, told by the number in it."""
    document = messages[-1]["content"]
    language = "ja" if re.search("[ぁ-ん]", document) else "fr"
    return "<think>…</think>\n" + QUERIES[language].format(re.findall(r"\d+", document)[-1])


def hub_dataset(folder: Path, entry: dict) -> str:
    """A data set in the Hub's form, in the entry's language where it has one."""
    config, split = entry.get("config"), entry.get("split", "test")
    text = TEXTS.get(config or "", "A {} is kept dry and oiled once a year; it has the number {}.")
    rows = {
        "corpus": [{"_id": f"d{n}", "title": "", "text": text.format(SUBJECTS[n % 16], n)} for n in range(30)],
        "queries": [{"_id": f"q{n}", "text": f"how do I keep the {SUBJECTS[n % 16]} number {n}"} for n in range(20)],
        split: [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1} for n in range(20)],
    }
    folder.mkdir(parents=True)
    subsets = []
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        subset = f"{config}-{name}" if config else name
        if name == split:
            subset = f"{config}-qrels" if config else "default"
        subsets.append({"config_name": subset, "data_files": [{"split": name, "path": f"{name}.jsonl"}]})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(subsets)}\n---\n", encoding="utf-8")
    return str(folder)


def with_makers(names: list[str], stages: dict[str, Stage]) -> set[str]:
    kept, waiting = set(names), list(names)
    while waiting:
        new = [name for name in stages[waiting.pop()].after if name not in kept]
        kept.update(new)
        waiting += new
    return kept


def chosen_stages(folder: Path) -> dict[str, Stage]:
    """The first merge, of its first and last model alone, with all before and after it; the first evaluation."""
    stages = {stage.name: stage for stage in read_stages(folder)}
    merge, evaluate = (next(s for s in stages.values() if s.script == script) for script in ("merge", "evaluate"))
    ends = (merge.config["models"][0], merge.config["models"][-1])
    adapted = [name for name, stage in stages.items() if str(stage.output) in ends]
    kept = with_makers(adapted, stages) | {merge.name, evaluate.name}
    # with what stands between the merge and the calibration of what came of it
    waiting = [name for name, stage in stages.items() if stage.script == "calibrate"]
    while waiting:
        if (name := waiting.pop()) not in kept:
            kept.add(name)
            waiting += stages[name].after
    return {name: stage for name, stage in stages.items() if name in kept}


def tiny_recipe(member: str, server: Server, monkeypatch) -> None:
    """Write `recipe/` and what it reads, from the member's own files: other sizes, small things in place of large."""
    monkeypatch.chdir(ROOT)  # so that its paths are known as such
    stages = chosen_stages(ROOT / "recipes" / member)
    made = [str(stage.output) for stage in stages.values()]
    monkeypatch.chdir(SCRATCH / member)
    tiny_retriever(Path("tiny/retriever"))
    small_set(Path("tiny/judged"))
    save_parallel(Path("tiny/parallel.jsonl"), sentences(30))

    def data(path: str) -> str:
        """A folder that a stage makes, or a small one in place of one that lies elsewhere."""
        if any(path.startswith(output) for output in made):
            return path
        folder = Path("tiny/data") / Path(path).name
        if not folder.exists():
            corpus = {f"d{n}": ABOUT.format(SUBJECTS[n % 16], n, PLACES[n % 5]) for n in range(30)}
            queries = {f"q{n}": f"who needs the {SUBJECTS[n % 16]} number {n}" for n in range(20)}
            write_beir(folder, corpus, queries, {f"q{n}": {f"d{n}": 1} for n in range(20)})
        return str(folder)

    def model(path: str) -> str:
        return path if path in made else "tiny/retriever"

    for name, stage in stages.items():
        config: dict[str, Any] = stage.config | SIZES.get(stage.script, {})
        if member == "querit-nano" and "max_length" in config:
            config["max_length"] = 64  # the tiny retriever's limit
        if "states_layers" in config:
            config["states_layers"] = [1, 3]
        if stage.script == "backbone":
            kind = {"querit-4b": "qwen3", "querit-a0.4b": "deepseek_v3"}[member]
            config["source"] = str(plain_backbone(Path("tiny/backbone"), kind))
        if stage.script == "fetch":
            kept = {
                key: entry for key, entry in config["datasets"].items() if entry.get("config") in (None, "fr", "ja")
            }
            config["datasets"] = {
                key: entry | {"path": hub_dataset(Path("tiny/hub") / key, entry), "documents": 25}
                for key, entry in kept.items()
            }
        if stage.script == "vocabulary":
            config["texts"] = {x: [data(path) for path in config["texts"][x][:1]] for x in ("en", "de", "ja")}
        if stage.script == "crosslingual":
            for key in ("english", "monolingual"):
                config[key] = [{"folder": data(entry["folder"]), "queries": 20} for entry in config[key][:1]]
        if stage.script == "mine":
            config["documents"] = data(config["documents"])
            if config.get("retriever", "bm25") != "bm25":
                config["retriever"] = model(config["retriever"])
            for entry in config["generators"]:
                if entry["kind"] == "openai":
                    entry["base_url"] = server.base_url
        if stage.script == "score":
            for target in config["targets"].values():
                limits = {"queries": 10, "documents": 24, "crops": 2}
                target.update({key: limits[key] for key in limits if key in target})
                target["folders"] = [data(folder) for folder in target["folders"]]
            # of general training, only what is fetched here
            config["targets"] = {
                key: target
                for key, target in config["targets"].items()
                if not any(re.search("miracl-(de|es|ko|ru|zh)", folder) for folder in target["folders"])
            }
            for teacher in config["teachers"]:
                teacher["model"] = model(teacher["model"])
            if config.get("retriever", "bm25") != "bm25":
                config["retriever"] = model(config["retriever"])
        if stage.script == "merge":
            config["models"] = [path for path in config["models"] if path in made]
            config |= {
                key: config[key][: len(config["models"]) - (key == "t")] for key in ("t", "weights") if key in config
            }
        if stage.script == "evaluate":
            config["retriever"] = "tiny/retriever"
            config["models"] = {key: path for key, path in config["models"].items() if path in made}
            config |= {"data": ["tiny/judged"], "tasks": []}
            if "dtype" in config:
                config["dtype"] = "float32"
        Path("recipe").mkdir(exist_ok=True)
        (Path("recipe") / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@pytest.fixture(scope="module")
def server():
    server = Server(answer=answer)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def recipe(server, monkeypatch) -> Callable[[str], list[Stage]]:
    def make(member: str) -> list[Stage]:
        shutil.rmtree(SCRATCH / member, ignore_errors=True)
        (SCRATCH / member).mkdir()
        tiny_recipe(member, server, monkeypatch)
        return read_stages("recipe")

    return make


def up_to_date(stages: list[Stage], names: list[str]) -> bool:
    return {name: state.why for name, state in plan(stages, names).items()} == dict.fromkeys(names, "up to date")


def check_result(stages: list[Stage]) -> None:
    """What is released ranks, and the results tell of the models that were measured."""
    merged = next(stage for stage in stages if stage.script == "merge")
    assert len(merged.config["models"]) == 2
    released = next((stage for stage in stages if stage.script == "calibrate"), merged)
    ranker = pipeline("text-ranking", model=str(released.output), trust_remote_code=True)
    documents = ["The kettle is oiled once a year.", "Le train part à sept heures.", "台所の油は棚にあります。"]
    ranked = ranker("how do I look after a kettle", documents)
    assert sorted(row["index"] for row in ranked) == [0, 1, 2]
    assert len({row["score"] for row in ranked}) == 3 and all(-1 < row["score"] < 1 for row in ranked)
    (evaluated,) = [stage for stage in stages if stage.script == "evaluate"]
    results = json.loads((evaluated.output / "results.json").read_text(encoding="utf-8"))
    assert results["sets"]["judged"]["queries"] == 5
    # as it was before its calibration, which changes no order
    ranked_as = released.config.get("model_name_or_path", str(merged.output))
    assert (
        ranked_as in evaluated.config["models"].values() and evaluated.config["models"].keys() <= results["mean"].keys()
    )


def test_the_dense_member(recipe, server):
    stages = recipe("querit-4b")
    assert [stage.name for stage in stages] == [
        "0_backbone", "0_fetch", "1_general_score", "1_general", "2_mine_fr", "2_mine_ja", "3_score_fr", "3_score_ja",
        "4_adapt_fr", "4_adapt_ja", "5_merge", "6_evaluate",
    ]  # fmt: skip
    names = [stage.name for stage in stages]
    assert run(stages, names, launch_here) == names and up_to_date(stages, names)
    check_result(stages)
    asked = [body["messages"] for _, _, body in server.requests if body["model"] == "deepseek-ai/DeepSeek-R1"]
    assert len(asked) >= 2 * 12 and any("番の品物" in messages[-1]["content"] for messages in asked)
    made = {stage.name: stage.output for stage in stages}
    mined = [json.loads(line) for line in (made["2_mine_ja"] / "queries.jsonl").read_text("utf-8").splitlines()]
    assert mined and all(row["language"] == "ja" for row in mined)
    assert read_record(made["1_general"])["inputs"].keys() == {str(made["0_backbone"]), str(made["1_general_score"])}


def test_the_moe_member_by_the_command(recipe):
    stages = recipe("querit-a0.4b")
    names = [stage.name for stage in stages]
    late = names.index("4_adapt_ja")
    assert run(stages, names[:late], launch_here) == names[:late]
    launcher = str(ROOT / "recipes" / "accelerate_configs" / "cpu.yaml")
    command = [sys.executable, "-m", "recipes.run", "recipe", "--from", names[late], "--accelerate", launcher]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\$ python .*--config recipe/(\w+)\.yaml", done.stdout, re.MULTILINE) == names[late:]
    assert done.stdout.count(f"accelerate.commands.launch --config_file {launcher}") == 1
    assert up_to_date(read_stages("recipe", launcher), names[late:])
    # how a training was launched is one of the things that it depends on
    assert plan(stages, names[late:])[names[late]].why == f"input changed: {launcher}"
    check_result(stages)


def test_the_small_member(recipe, monkeypatch):
    stages = recipe("querit-nano")
    # A model of a few steps may rank upside down, which the fit refuses; how it fits is tested in test_calibrate.py.
    monkeypatch.setattr(recipes.calibrate, "fit", lambda logits, relevant: (2.0, 0.5))
    # what stands in packages
    made = {stage.name: stage for stage in stages}
    shutil.copytree("tiny/retriever", made["0_retriever"].output)
    save_teacher(made["0_teacher"].output)
    names = [stage.name for stage in stages if stage.script != "packaged"]
    assert names[:5] == ["0_vocabulary", "0_base", "1_align", "1_general_groups", "1_general"]
    assert run(stages, names, launch_here) == names and up_to_date(stages, names)
    check_result(stages)
