"""`querit adapt`: documents in, a reranker and a verdict out."""

import json
import random

import numpy as np
import pytest
from typer.testing import CliRunner

import querit
from modeling_querit.modeling_querit import QueritForSequenceClassification
from recipes import adapt as module
from recipes.adapt import AdaptArguments, adapt, affordable_queries, generator_entry, in_words, judge
from tests.models_for_tests import save_folder, tiny_model
from tests.recipes.folders_for_tests import SUBJECTS, tiny_retriever

PLACES = ["in the attic", "by the harbour", "under the stairs", "behind the mill", "near the school", "on the island"]
ACTS = ["is mended", "was found", "stands idle", "is painted", "was sold"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A Markdown file per subject and place."""
    folder = tmp_path_factory.mktemp("handbook")
    for number, subject in enumerate(SUBJECTS):
        for place in PLACES:
            act, other = ACTS[number % 5], SUBJECTS[(number * 3 + 1) % len(SUBJECTS)]
            text = (
                f"# The {subject} {place}\n\nThis {subject} {act} {place}. It is older than the {other}, and lighter.\n"
            )
            (folder / f"{subject}-{place.replace(' ', '-')}.md").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model") / "tiny", "bert")


def invoke(*args):
    return CliRunner().invoke(querit.app, [str(arg) for arg in args])


def results(before: list[float], after: list[float]) -> dict:
    values = {"general": before, "merged": after, "retriever": before}
    per_query = {name: {"default test": {f"q{i}": x for i, x in enumerate(v)}} for name, v in values.items()}
    scores = {name: 100 * sum(v) / len(v) for name, v in values.items()}
    return {"sets": {"mined": {"per_query": per_query, "scores": scores}}}


def test_one_command_writes_a_reranker_that_loads_and_says_what_came_of_it(documents, model, tmp_path):
    teacher, output = tiny_retriever(tmp_path / "teacher"), tmp_path / "mine"
    options = ["--model", model, "--teacher", teacher, "--budget-minutes", "1"]
    found = invoke("adapt", documents, "--output", output, *options)
    assert found.exit_code == 0, found.output
    verdict = json.loads((output / "adaptation.json").read_text())["verdict"]
    words = in_words(verdict, str(output))
    assert words in found.stdout and words in (output / "README.md").read_text()
    measured = json.loads((tmp_path / "mine.work" / "evaluation" / "results.json").read_text())
    values = measured["sets"]["mined"]["per_query"]
    gains = [values["merged"]["default test"][query] - x for query, x in values["general"]["default test"].items()]
    assert verdict["gain"] == pytest.approx(100 * np.mean(gains), abs=0.01)
    # The model of the verdict is the one that was written.
    chosen = tmp_path / "mine.work" / "merged" if verdict["better"] else model
    ours, theirs = (QueritForSequenceClassification.from_pretrained(f).state_dict() for f in (output, chosen))
    assert all((ours[key] - theirs[key]).abs().max() <= 0.01 * theirs[key].abs().max() for key in theirs)
    rows = invoke("rank", "the violin by the harbour", documents / "violin-by-the-harbour.md", "--model", output)
    assert rows.exit_code == 0, rows.output
    again = invoke("adapt", documents, "--output", output, *options)
    assert again.exit_code == 1 and "is there already" in again.output


def test_a_run_that_was_stopped_goes_on_where_it_was(documents, model, tmp_path, monkeypatch):
    args = AdaptArguments(str(documents), str(model), str(tmp_path / "mine"), budget_minutes=1)
    monkeypatch.setattr(module, "merge", lambda merge_args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapt(args)
    assert not (tmp_path / "mine").exists()
    work = tmp_path / "mine.work"
    kept = [
        work / "plan.json",
        work / "mined" / "queries.jsonl",
        work / "scored.parquet",
        work / "adapted" / "config.json",
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="belongs to another request"):
        adapt(AdaptArguments(**{**vars(args), "seed": 4}))
    adapt(args)
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_better_is_said_only_where_the_interval_is_above_zero():
    rng = random.Random(1)
    before = [rng.random() / 2 for _ in range(60)]
    better = judge(results(before, [x + 0.1 + 0.05 * rng.random() for x in before]), 0)
    assert better["better"] and in_words(better, "out").startswith("Better. On 60 queries")
    assert better["gain"] == pytest.approx(12.5, abs=1) and better["interval"][0] > 9
    same = judge(results(before, [x + (-0.1, 0.1)[i % 2] for i, x in enumerate(before)]), 0)
    assert not same["better"] and in_words(same, "out").startswith("No clear gain")
    assert in_words(same, "out").endswith("out holds the model as it was.")
    worse = judge(results(before, [x - 0.1 * rng.random() for x in before]), 0)
    assert not worse["better"] and in_words(worse, "out").startswith("Worse.")


def test_more_minutes_and_a_teacher_that_does_not_read_candidates_afford_more_queries():
    assert affordable_queries(30, 0.01, True) < affordable_queries(60, 0.01, True)
    assert affordable_queries(30, 0.01, True) < affordable_queries(30, 0.01, False)
    assert affordable_queries(0.1, 0.01, True) < 0
    # By hand: 0.7 * 1800 s - 3 * 100 * 50 * 0.01 s = 1110 s; a query costs (50 + 28) * 0.01 s.
    assert affordable_queries(30, 0.01, True) == 1423


@pytest.mark.parametrize(
    ("option", "entry"),
    [
        ("crop", {"kind": "crop"}),
        ("org/model", {"kind": "local", "model": "org/model"}),
        ("lm/tiny.gguf", {"kind": "local", "model": "lm", "gguf_file": "tiny.gguf"}),
        ("http://localhost:8000/v1#m", {"kind": "openai", "base_url": "http://localhost:8000/v1", "model": "m"}),
    ],
)
def test_a_generator_is_told_by_one_word(option, entry):
    assert generator_entry(option) == entry


def test_what_cannot_be_adapted_is_refused_with_the_fix(documents, model, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "One document."}\n')
    found = invoke("adapt", few, "--output", tmp_path / "a", "--model", model)
    assert found.exit_code == 1 and "needs some hundreds" in found.output
    found = invoke("adapt", documents, "--output", tmp_path / "a", "--model", model, "--budget-minutes", "0.001")
    assert found.exit_code == 1 and "Give --budget-minutes" in found.output
    found = invoke("adapt", documents, "--output", tmp_path / "a", "--model", model, "--generator", "http://x/v1")
    assert found.exit_code == 1 and "http://x/v1#MODEL" in found.output
    assert not (tmp_path / "a").exists()


def test_the_largest_model_that_is_tiny_has_a_pace(model):
    pace = module.seconds_per_pair(AdaptArguments("", str(model), ""), ["a bicycle by the mill"] * 16)
    assert 0 < pace < 1


def test_causal_rerankers_are_adapted_too(documents, tmp_path):
    model = save_folder(tmp_path / "causal", "qwen3", tiny_model("qwen3"))
    adapt(AdaptArguments(str(documents), str(model), str(tmp_path / "mine"), budget_minutes=1, queries_per_document=1))
    assert (tmp_path / "mine" / "chat_template.jinja").exists()
