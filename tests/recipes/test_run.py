import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from querit.files import content_hash, read_record, write_record
from recipes.lib import records
from recipes.lib.estimates import count_lines, estimate
from recipes.lib.records import code_hashes, difference, move_aside
from recipes.lib.stages import Stage, in_order, is_path, read_stages, script_of
from recipes.run import adopt, check_keys, choose, launch_here, plan, run, show, state_of
from tests.recipes.folders_for_tests import SUBJECTS, small_set, tiny_backbone

ROOT = Path(__file__).parents[2]
# Written so that neither the files' order nor their names alone give the order of the stages.
RECIPE: dict[str, dict] = {
    "1_general": {
        "model_name_or_path": "owner/model", "train_data": "runs/general.parquet", "output_dir": "runs/general",
    },
    "1_general_score": {
        "teachers": [{"model": "owner/teacher"}], "targets": {"a": {"folders": ["data/a"]}},
        "output": "runs/general.parquet",
    },
    "2_mine_fr": {"documents": "data/b", "generators": [{"kind": "crop"}], "output_dir": "runs/fr"},
    "3_score_fr": {
        "teachers": [{"model": "owner/teacher"}], "targets": {"b": {"folders": ["runs/fr"]}},
        "output": "runs/fr.parquet",
    },
    "4_adapt_fr": {
        "model_name_or_path": "runs/general", "train_data": "runs/fr.parquet", "output_dir": "runs/adapted",
    },
    "5_merge": {"models": ["runs/general", "runs/adapted"], "output_dir": "runs/merged"},
}  # fmt: skip
ORDER = ["1_general_score", "1_general", "2_mine_fr", "3_score_fr", "4_adapt_fr", "5_merge"]


def write_yaml(name: str, config: dict, folder: str = "recipe") -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_set(tmp_path / "data" / "a")
    small_set(tmp_path / "data" / "b")
    for name, config in RECIPE.items():
        write_yaml(name, config)
    return tmp_path


def pretend(stage: Stage) -> None:
    """Stands for a stage's script: an output that depends on the inputs and the config, and on nothing else."""
    made = hashlib.sha256(json.dumps(stage.config).encode())
    for path in stage.inputs:
        made.update(content_hash(path).encode())
    if stage.script == "score":
        stage.output.parent.mkdir(exist_ok=True)
        Dataset.from_dict({"query": [made.hexdigest()] * 5}).to_parquet(str(stage.output))
    else:
        stage.output.mkdir(parents=True, exist_ok=True)
        (stage.output / "made").write_text(made.hexdigest())


def run_all(only=None, start=None, do=pretend):
    stages = read_stages("recipe")
    return run(stages, choose(stages, start, only), do)


def edit(name: str, **changes) -> None:
    write_yaml(name, {**RECIPE[name], **changes})


def test_a_recipe_runs_in_order_once(recipe):
    assert [stage.name for stage in read_stages("recipe")] == ORDER
    assert run_all() == ORDER
    assert run_all() == []
    record = read_record(Path("runs/general"))
    assert record["state"] == "done" and record["config"] == RECIPE["1_general"]
    assert record["inputs"] == {"runs/general.parquet": content_hash("runs/general.parquet")}
    assert {"recipes/train.py", "modeling_querit/modeling_querit.py"} <= record["code"].keys()
    assert "recipes/mine.py" not in record["code"] and not any("site-packages" in name for name in record["code"])


def test_scripts_are_told_by_the_last_word_of_a_name():
    names = {"1_general_long_score": "score", "1_general_long": "train", "4_adapt_zh": "train", "0_base": "base"}
    names |= {"5_merge_calibrate": "calibrate", "1_general_groups": "crosslingual", "0_teacher": "packaged"}
    assert {name: script_of(Path(f"{name}.yaml")) for name in names} == names
    with pytest.raises(ValueError, match=r"adaptation.yaml: the name tells no stage; put one of retriever"):
        script_of(Path("4_adaptation.yaml"))


@given(st.permutations(range(7)), st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_order_puts_makers_first_and_smaller_names_before_larger_ones(names, edges):
    # Edges from earlier to later places of a permutation: no circle.
    after = {n: {names[a] for a, b in edges if a < b and names[b] == n} for n in range(7)}
    stages = {
        str(n): Stage(Path(f"{n}.yaml"), "train", {}, Path(str(n)), after=tuple(map(str, after[n]))) for n in range(7)
    }
    done: list[int] = []
    while len(done) < 7:  # the smallest of those that are ready, found by looking at all
        done.append(min(n for n in range(7) if n not in done and after[n] <= set(done)))
    assert [int(stage.name) for stage in in_order(stages)] == done


@pytest.mark.parametrize(
    ("change", "why", "again"),
    [
        (lambda: edit("1_general", seed=3), "config changed: seed", ["1_general", "4_adapt_fr", "5_merge"]),
        (lambda: edit("5_merge", models=["runs/adapted", "runs/general"]), "config changed: models", ["5_merge"]),
        (lambda: Path("data/b/notes.txt").write_text("x"), "input changed: data/b", ORDER[2:]),
        (lambda: Path("runs/general/made").write_text("x"), "output is not what was written", ["1_general"]),
        (lambda: Path("runs/general/more").write_text("x"), "output is not what was written", ["1_general"]),
        (lambda: Path("runs/fr.parquet").unlink(), "output is gone", ["3_score_fr"]),
    ],
    ids=["config", "order", "input", "edited output", "added file", "output gone"],
)
def test_what_changed_runs_again_with_what_builds_on_it(recipe, change, why, again):
    run_all()
    change()
    plans = plan(read_stages("recipe"), ORDER)
    assert plans[again[0]].why == why
    # Where a stage brings the same output again, those that build on it are planned and then found up to date.
    assert run_all() == again
    assert run_all() == []


def test_what_is_of_no_account_runs_nothing_again(recipe):
    run_all()
    text = Path("recipe/1_general.yaml").read_text()
    Path("recipe/1_general.yaml").write_text("# a comment\n" + "\n".join(reversed(text.splitlines())) + "\n")
    os.utime("data/a/corpus.jsonl", (1, 1))
    Path("runs/general/checkpoint-20").mkdir()
    Path("runs/general/checkpoint-20/model.safetensors").write_text("x")
    assert run_all() == []


def test_code_that_only_makes_scoring_faster_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / "querit").mkdir()
    (tmp_path / "querit" / "__init__.py").write_text("")
    (tmp_path / "querit" / "devices.py").write_text("import querit.loading\n")
    (tmp_path / "querit" / "loading.py").write_text("x = 1\n")
    script = tmp_path / "train.py"
    script.write_text("import querit.devices\n")
    before = code_hashes(script)
    assert before.keys() == {"train.py", "querit/__init__.py", "querit/loading.py"}
    (tmp_path / "querit" / "devices.py").write_text("import querit.loading\ny = 2\n")
    assert code_hashes(script) == before


def test_code_counts_as_parsed_and_as_far_as_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / "recipes" / "lib" / "prompts").mkdir(parents=True)
    files = {"__init__": "", "one": "from recipes.two import x\nimport torch\n", "two": "x = 1\n", "three": "y = 1\n"}
    files["lib/generators"] = "def late():\n    import recipes.two\n"
    for name, text in files.items():
        (tmp_path / "recipes" / f"{name}.py").write_text(text)
    (tmp_path / "recipes" / "lib" / "prompts" / "fr.txt").write_text("Écris")
    (tmp_path / "torch").mkdir()  # once installed all libraries lie beside: none is followed
    (tmp_path / "torch" / "__init__.py").write_text("not Python")
    one, generators = (tmp_path / "recipes" / f"{name}.py" for name in ("one", "lib/generators"))
    before = {"config": {}, "inputs": {}, "code": code_hashes(one)}
    assert before["code"].keys() == {"recipes/__init__.py", "recipes/one.py", "recipes/two.py"}
    assert {"recipes/lib/prompts/fr.txt", "recipes/two.py"} <= code_hashes(generators).keys()
    (tmp_path / "recipes" / "two.py").write_text("# why\nx  =  1\n")
    (tmp_path / "recipes" / "three.py").write_text("y = 2\n")
    assert difference(before, {**before, "code": code_hashes(one)}) is None
    (tmp_path / "recipes" / "two.py").write_text("x = 2\n")
    assert difference(before, {**before, "code": code_hashes(one)}) == "code changed: recipes/two.py"


def test_an_outdated_output_is_kept_aside(recipe, capsys):
    run_all()
    first = Path("runs/general/made").read_text()
    parquet = Path("runs/general.parquet").read_bytes()
    for number in (1, 2):
        edit("1_general", seed=number)
        run_all(only="1_general")
        assert f"is in runs/old/general-{number} now" in capsys.readouterr().out
    assert Path("runs/old/general-1/general/made").read_text() == first
    assert json.loads(Path("runs/old/general-1/general.run.json").read_text())["config"] == RECIPE["1_general"]
    # another stage's output, though its name begins alike
    assert Path("runs/general.parquet").read_bytes() == parquet and Path("runs/general.parquet.run.json").exists()


def test_a_stopped_stage_goes_on_and_another_config_begins_anew(recipe):
    run_all(only="1_general_score")

    def stopped(stage):
        pretend(stage)
        Path("runs/general.work").mkdir()
        Path("runs/general.work/half").write_text("half")
        raise RuntimeError("stopped")

    def goes_on(stage):
        assert Path("runs/general.work/half").read_text() == "half"
        pretend(stage)

    def begins_anew(stage):
        assert not Path("runs/general").exists() and not Path("runs/general.work").exists()
        pretend(stage)

    with pytest.raises(RuntimeError, match="stopped"):
        run_all(only="1_general", do=stopped)
    stages = read_stages("recipe")
    assert plan(stages, ["1_general"])["1_general"].why == "was stopped, and goes on"
    assert plan(stages, ["5_merge"])["5_merge"].lacks[0] == "runs/general is unfinished: run --only 1_general first"
    assert run_all(only="1_general", do=goes_on) == ["1_general"]
    assert read_record(Path("runs/general"))["seconds"] is None  # part of the time was another run's

    Path("runs/general.run.json").unlink()
    move_aside(Path("runs/general"), [Path("runs/general.parquet")])
    with pytest.raises(RuntimeError, match="stopped"):
        run_all(only="1_general", do=stopped)
    edit("1_general", seed=1)
    assert state_of(next(s for s in read_stages("recipe") if s.name == "1_general")) == (
        "was stopped, and begins anew: config changed: seed", False,
    )  # fmt: skip
    assert run_all(only="1_general", do=begins_anew) == ["1_general"]
    assert (Path("runs/old/general-2/general.work/half")).read_text() == "half"


def test_how_work_is_done_is_of_no_account_to_what_is_done_and_to_what_is_begun(recipe):
    server = {"kind": "openai", "model": "deepseek-ai/DeepSeek-R1", "base_url": "http://a/v1", "concurrency": 8}
    edit("2_mine_fr", generators=[server])

    def stopped(stage):
        Path("runs/fr.work").mkdir(parents=True)
        Path("runs/fr.work/paid").write_text("answers")
        raise RuntimeError("stopped")

    def goes_on(stage):
        assert Path("runs/fr.work/paid").read_text() == "answers"
        Path("runs/fr.work/paid").unlink()
        Path("runs/fr.work").rmdir()
        pretend(stage)

    with pytest.raises(RuntimeError, match="stopped"):
        run_all(only="2_mine_fr", do=stopped)
    edit("2_mine_fr", generators=[server | {"base_url": "http://b/v1", "concurrency": 2, "timeout": 60}], workers=2)
    assert run_all(only="2_mine_fr", do=goes_on) == ["2_mine_fr"]
    edit("2_mine_fr", generators=[server], engine="ray")
    assert run_all(only="2_mine_fr") == []
    edit("2_mine_fr", generators=[server | {"temperature": 0.1}])
    assert plan(read_stages("recipe"), ["2_mine_fr"])["2_mine_fr"].why == "config changed: generators"
    assert run_all(only="2_mine_fr") == ["2_mine_fr"]

    def teachers(**changes):
        edit("3_score_fr", teachers=[{"model": "owner/teacher", **changes}])
        return run_all(only="3_score_fr")

    found = [teachers(), teachers(url="http://a"), teachers(url="http://b")]
    assert found == [["3_score_fr"], ["3_score_fr"], []]  # served, it is another one; where, is of no account


def test_measurements_are_kept_for_a_changed_list_of_models(recipe):
    run_all()
    write_yaml("6_evaluate", {"models": {"a": "runs/general"}, "data": ["data/a"], "output_dir": "runs/results"})
    run_all()
    Path("runs/results/parts").mkdir()
    models = {"a": "runs/general", "b": "runs/merged"}
    write_yaml("6_evaluate", {"models": models, "data": ["data/a"], "output_dir": "runs/results"})
    assert run_all() == ["6_evaluate"]
    assert Path("runs/results/parts").exists() and not Path("runs/old").exists()


def test_an_output_without_a_record_is_kept_aside_or_adopted(recipe):
    run_all()
    for path in Path("runs").glob("*.run.json"):
        path.unlink()
    stages = read_stages("recipe")
    assert plan(stages, ORDER)["1_general"].why == "there is an output, but no record of how it was made"
    for stage in stages[1:]:
        adopt(stage)
    assert read_record(Path("runs/general"))["adopted"]
    assert run_all() == ["1_general_score"]
    assert Path("runs/old/general.parquet-1/general.parquet").exists()


def test_from_and_only_leave_the_others_as_they_are(recipe):
    stages = read_stages("recipe")
    assert choose(stages, "3_score_fr", None) == ORDER[3:]
    assert choose(stages, None, "3_score_fr") == ["3_score_fr"]
    with pytest.raises(ValueError, match="no stage 3_score_de; there are 1_general_score, 1_general,"):
        choose(stages, "3_score_de", None)
    assert plan(stages, ["3_score_fr"])["3_score_fr"].lacks == ["runs/fr is missing: run --only 2_mine_fr first"]
    run_all()
    edit("1_general", seed=3)
    assert run_all(start="4_adapt_fr") == []
    assert run_all(only="1_general") == ["1_general"]
    assert run_all(start="4_adapt_fr") == ["4_adapt_fr", "5_merge"]


def test_stages_without_their_inputs_are_left_out_and_the_fix_is_named(recipe):
    edit("2_mine_fr", documents="../shared/data/train/wiki-fr")
    plans = plan(read_stages("recipe"), ORDER)
    assert plans["2_mine_fr"].lacks == [
        "../shared/data/train/wiki-fr is missing: put it there (recipe/README.md says where it is from) "
        "or change recipe/2_mine_fr.yaml"
    ]
    assert plans["3_score_fr"].lacks == ["runs/fr is made by 2_mine_fr, which cannot run"]
    assert [name for name in ORDER if plans[name].lacks] == ORDER[2:]
    assert run_all() == ORDER[:2]


def test_values_are_taken_for_paths_where_they_can_be_nothing_else(recipe):
    outputs = [Path("runs/general"), Path("/made")]
    paths = ["data", "data/a", "data/none", "runs/x", "runs/general/checkpoint-2", "/etc/x", "../x", "a/b/c"]
    others = ["owner/model", "kl", "x" * 300, "", "https://api.example.org/v1", "and/or", "Écris.\nUne question a/b/c"]
    assert [text for text in paths + others if is_path(text, outputs)] == paths


def test_recipes_that_cannot_be_are_refused(recipe):
    with pytest.raises(ValueError, match="data has no YAML files"):
        read_stages("data")
    edit("1_general", model_name_or_path="runs/merged")
    with pytest.raises(ValueError, match=r"wait for each other: .*5_merge.*Break the circle"):
        read_stages("recipe")
    edit("1_general", output_dir="runs/merged/general")
    with pytest.raises(ValueError, match=r"writes to runs/merged/general, which is recipe/5_merge.yaml's"):
        read_stages("recipe")
    edit("1_general", output_dir=None)
    with pytest.raises(ValueError, match=r"1_general.yaml names no output"):
        read_stages("recipe")


def test_wrong_keys_are_named(recipe):
    edit("5_merge", modles=["a"])
    with pytest.raises(ValueError, match=r"5_merge\.yaml: unknown keys modles"):
        check_keys(read_stages("recipe")[-1])
    write_yaml("5_merge", {"output_dir": "runs/merged"})
    with pytest.raises(ValueError, match=r"5_merge\.yaml: models must be given"):
        check_keys(read_stages("recipe")[-1])


def test_estimates_count_what_stands_there_and_what_will(recipe):
    edit("1_general_score", targets={"a": {"folders": ["data/a", "data/b"], "queries": 20, "crops": 7}})
    edit("1_general", num_train_epochs=2)
    generators = [{"kind": "crop"}, {"kind": "openai", "model": "deepseek-ai/DeepSeek-R1"}]
    edit("2_mine_fr", sample=1000, queries_per_document=2, generators=generators)
    write_yaml("6_evaluate", {"data": ["data/a", "data/b"], "max_queries": 12, "output_dir": "runs/results"})
    stages = {stage.name: stage for stage in read_stages("recipe")}
    found = {name: estimate(stage, list(stages.values())) for name, stage in stages.items()}
    items = {name: guess.items for name, guess in found.items()}
    assert items["1_general_score"] == 20 + 7 and items["1_general"] == 2 * 27
    assert items["2_mine_fr"] == 1000 and items["3_score_fr"] == 1000 * 2 * 2
    assert items["5_merge"] == 2 and items["6_evaluate"] == 2 * 12
    assert count_lines("data/a", "corpus") == len(SUBJECTS) and count_lines("data/a", "none") is None
    table = yaml.safe_load((ROOT / "recipes" / "lib" / "rates.yaml").read_text())
    assert found["1_general"].seconds == 54 / table["members"]["querit-nano"]["rates"]["1_general"]
    tokens, price = table["tokens_per_document"], table["prices"]["deepseek-ai/DeepSeek-R1"]
    assert found["2_mine_fr"].dollars == pytest.approx(
        1000 * (tokens["input"] * price["input"] + tokens["output"] * price["output"]) / 1e6
    )
    write_record(Path("runs/general"), {"stage": "1_general", "items": 30, "seconds": 60.0, "state": "done"})
    again = estimate(stages["4_adapt_fr"], list(stages.values()))
    assert again.seconds == again.items * 2 and again.source == "rates of former runs"


def test_a_stage_of_another_pace_has_a_rate_of_its_own(recipe):
    write_yaml("1_general_more", {**RECIPE["1_general"], "output_dir": "runs/more"})
    stages = {stage.name: stage for stage in read_stages("recipe")}
    rates = yaml.safe_load((ROOT / "recipes" / "lib" / "rates.yaml").read_text())["members"]["querit-nano"]["rates"]
    assert rates["1_general"] != rates["train"]
    for name, rate in (("1_general", "1_general"), ("1_general_more", "train"), ("4_adapt_fr", "train")):
        guess = estimate(stages[name], list(stages.values()))
        assert guess.items / guess.seconds == pytest.approx(rates[rate])
    assert estimate(stages["5_merge"], list(stages.values())).seconds is None  # not known, and not made up


def test_the_plan_is_shown_with_reasons_sizes_and_sums(recipe):
    run_all(only="1_general_score")
    stages = read_stages("recipe")
    guesses = {stage.name: estimate(stage, stages) for stage in stages}
    lines = show(stages, plan(stages, ORDER), guesses).splitlines()
    assert lines[0].split() == ["skip", "1_general_score", "16", "queries", "up", "to", "date"]
    assert lines[1].startswith("run ") and "15 queries" in lines[1] and lines[1].endswith("never run")
    assert lines[-1].startswith("in all ") and "estimate" in lines[-1]


# The real scripts, and the command itself.


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "recipes.run", *arguments], env=environment, capture_output=True, text=True, **options
    )


@pytest.fixture
def training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_backbone(tmp_path / "base")
    rows = []
    for i in range(64):
        subject, other, third = (SUBJECTS[(i + k * 5) % len(SUBJECTS)] for k in range(3))
        documents = [f"the {subject} is oiled", f"the {other} is dry", f"a {third} and a {other}"]
        rows.append({"query": f"how to keep a {subject}", "documents": documents, "labels": [1.0, 0.1, 0.0]})
    Dataset.from_list(rows).to_parquet("data.parquet")
    config = {
        "model_name_or_path": "./base", "train_data": "./data.parquet", "output_dir": "runs/general",
        "pooling": "mean", "loss": "kl", "attn_implementation": "eager", "max_steps": 60, "save_steps": 10,
        "save_total_limit": 2, "per_device_train_batch_size": 8, "learning_rate": 3.0e-3, "max_length": 48,
        "warmup_steps": 5, "bf16": True, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none",
        "train_sampling_strategy": "group_by_length", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    write_yaml("1_general", config)
    return config


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(training):
    unbroken = Path("whole")
    write_yaml("1_general", {**training, "output_dir": str(unbroken)}, "recipe-whole")
    assert run(read_stages("recipe-whole"), ["1_general"], launch_here) == ["1_general"]

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        [sys.executable, "-m", "recipes.run", "recipe"], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(Path("runs").glob("general/checkpoint-*")):
        assert killed.poll() is None, "training ended before its first checkpoint"
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)  # run and train, at once
    killed.wait()
    assert read_record(Path("runs/general"))["state"] == "started"
    assert not Path("runs/general/model.safetensors").exists()
    # The newest checkpoint may be half there; another one, surely half there, must not be chosen either.
    half = Path("runs/general/checkpoint-50")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    resumed = command("recipe")
    assert resumed.returncode == 0, resumed.stderr
    assert "was stopped, and goes on" in resumed.stdout and "checkpoint-50 is not whole" in resumed.stdout
    expected, found = (load_file(folder / "model.safetensors") for folder in (unbroken, Path("runs/general")))
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not tensor.equal(found[name])] == []
    up_to_date = command("recipe", "--dry-run")
    assert up_to_date.returncode == 0 and up_to_date.stdout.splitlines()[0].endswith("up to date")


def test_the_command_tells_what_is_wrong_and_how_it_ended(training):
    write_yaml("1_general", {**training, "train_data": "./gone.parquet"})
    lacking = command("recipe")
    assert lacking.returncode == 1 and "./gone.parquet is missing: put it there" in lacking.stdout
    assert "not run for want of inputs" in lacking.stderr and "Traceback" not in lacking.stderr
    assert command("recipe", "--dry-run").returncode == 0
    unknown = command("recipe", "--only", "2_mine")
    assert unknown.returncode == 1 and unknown.stderr == "error: There is no stage 2_mine; there are 1_general.\n"
    write_yaml("1_general", {**training, "learning_rate": 0.0})
    write_yaml("5_merge", {"models": ["runs/general", "./base"], "output_dir": "runs/merged", "tee": [0.5]})
    misspelt = command("recipe")  # of a later stage, and found before the first one runs
    assert misspelt.returncode == 1 and "error: recipe/5_merge.yaml: unknown keys tee" in misspelt.stderr
    assert not Path("runs").exists()
    Path("recipe/5_merge.yaml").unlink()
    failed = command("recipe")
    assert failed.returncode == 1 and "learning_rate is 0" in failed.stderr
    assert "1_general failed (1): see above. The same command goes on from where it stopped." in failed.stderr
