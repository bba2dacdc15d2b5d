"""`querit adapt`: documents in, a reranker and a verdict out."""

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder
from typer.testing import CliRunner

from modeling_querit.modeling_querit import QueritForSequenceClassification
from querit import cli
from recipes import adapt as module
from recipes.adapt import TIMED, adapt, measure_pace, writing_time
from recipes.lib import budget, verdict
from recipes.lib.adaptation import AdaptArguments, generator_entry, roles_of
from recipes.lib.budget import SIZES, Corpus, Pace, affordable_queries, choose, minutes_needed, seconds_of
from recipes.lib.documents import read_documents
from recipes.lib.progress import Bar, Steps
from recipes.lib.verdict import compare, in_words, judge, no_use, values
from tests.models_for_tests import save_folder, tiny_model
from tests.recipes.folders_for_tests import SUBJECTS, tiny_retriever
from tests.recipes.test_generators import Server
from tests.recipes.test_teachers import cross_encoder

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


# Far more than they need: how fast this machine is must not decide.
def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def equal_weights(a, b) -> bool:
    ours, theirs = (QueritForSequenceClassification.from_pretrained(f).state_dict() for f in (a, b))
    return all((ours[key] - theirs[key]).abs().max() <= 0.01 * theirs[key].abs().max() for key in theirs)


def results(**systems: list[float]) -> dict:
    per_query = {name: {"default test": {f"q{i}": x for i, x in enumerate(v)}} for name, v in systems.items()}
    return {"sets": {"mined": {"per_query": per_query}}}


def judged(before: list[float], after: list[float]) -> dict:
    return judge(results(general=before, retriever=before), results(merged=after, retriever=before), 0)


def stored(work: Path, when: str) -> dict:
    return json.loads((work / f"evaluation_{when}" / "results.json").read_text())


def test_one_command_writes_a_reranker_that_loads_and_says_what_came_of_it(documents, model, tmp_path):
    teacher, output = tiny_retriever(tmp_path / "teacher"), tmp_path / "mine"
    options = ["--model", model, "--teacher", teacher, "--budget-minutes", "600"]
    found = invoke("adapt", documents, "--output", output, *options)
    assert found.exit_code == 0, found.output
    work = tmp_path / "mine.work"
    result = json.loads((work / "adaptation.json").read_text())["verdict"]
    words = in_words(result, str(output))
    assert words in found.stdout and in_words(result, "mine") in (output / "README.md").read_text()
    before, after = stored(work, "before"), stored(work, "after")
    gains = [values(after, "merged")[query] - x for query, x in values(before, "general").items()]
    assert result["gain"] == pytest.approx(100 * np.mean(gains), abs=0.01)
    # The model of the verdict is the one that was written.
    assert equal_weights(output, model) != result["better"]
    assert not (work / "merged").exists() and (work / "mined" / "queries.jsonl").exists()
    # Said before the work: documents, queries, minutes, steps.
    said = found.stdout.splitlines()[0]
    assert said.startswith("96 documents in handbook") and "queries are written" in said and "minutes." in said
    assert json.loads((work / "progress.json").read_text())["of"] == 6
    assert str(tmp_path) not in (output / "README.md").read_text()
    rows = invoke("rank", "the violin by the harbour", documents / "violin-by-the-harbour.md", "--model", output)
    assert rows.exit_code == 0, rows.output
    again = invoke("adapt", documents, "--output", output, *options)
    assert again.exit_code == 1 and "is there already" in again.output


def test_a_stopped_run_goes_on_and_an_edited_stage_is_run_again(documents, model, tmp_path, monkeypatch, capsys):
    args = AdaptArguments(str(documents), str(model), f"{tmp_path}/mine/", budget_minutes=600)
    launched, launch = [], module.launch_here

    def spy(stage):
        launched.append(stage.name)
        if len(launched) == 5:
            raise KeyboardInterrupt
        launch(stage)

    monkeypatch.setattr(module, "launch_here", spy)
    with pytest.raises(KeyboardInterrupt):
        adapt(args)
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "mine").exists()
    work = tmp_path / "mine.work"
    kept = [work / "plan.json", work / "mined" / "queries.jsonl", work / "scored.parquet"]
    before = [path.stat().st_mtime_ns for path in kept]
    with pytest.raises(ValueError, match=r"other options \(seed changed\)"):
        adapt(AdaptArguments(**{**vars(args), "seed": 4}))
    training = work / "4_adapt.yaml"
    training.write_text(training.read_text().replace("learning_rate: 3.0e-05", "learning_rate: 0.001"))
    assert "0.001" in training.read_text()
    launched[:] = []
    monkeypatch.setattr(module, "measure_pace", lambda *args: pytest.fail("it was planned already"))
    adapt(args)
    assert launched == ["4_adapt", "5_merge", "6_evaluate_after"]
    assert "Taken over from before: writing queries, judging the model as it is" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_where_training_is_no_use_nothing_is_trained(documents, model, tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "CEILING", 0.0)
    output = tmp_path / "mine"
    found = adapt(AdaptArguments(str(documents), str(model), str(output), budget_minutes=600))
    assert not found["better"] and "--generator" in found["not_tried"]
    assert not (tmp_path / "mine.work" / "scored.parquet").exists() and equal_weights(output, model)
    text = (output / "README.md").read_text()
    assert "tiny as it was. Tried: 96 documents" in text and "Not trained." in text and "adapted by" not in text


def test_no_use_is_said_of_a_ceiling_and_of_a_teacher_that_is_no_better():
    rng = random.Random(1)
    low = [rng.random() / 2 for _ in range(60)]
    assert "--generator" in no_use(results(general=[0.98] * 60), None, 0)
    worse = results(general=low, retriever=[x - 0.1 * rng.random() for x in low])
    assert "--teacher" in no_use(worse, "retriever", 0)
    assert no_use(results(general=low, retriever=[x + 0.1 for x in low]), "retriever", 0) is None
    unclear = results(general=low, retriever=[x + (-0.1, 0.1)[i % 2] for i, x in enumerate(low)])
    assert no_use(unclear, "retriever", 0) is None and no_use(worse, None, 0) is None


def test_better_is_said_only_where_the_interval_is_above_zero():
    rng = random.Random(1)
    before = [rng.random() / 2 for _ in range(60)]
    better = judged(before, [x + 0.1 + 0.05 * rng.random() for x in before])
    assert better["better"] and in_words(better, "out").startswith("Better. On 60 queries")
    assert better["gain"] == pytest.approx(12.5, abs=1) and better["interval"][0] > 9
    same = judged(before, [x + (-0.1, 0.1)[i % 2] for i, x in enumerate(before)])
    assert not same["better"] and in_words(same, "out").startswith("No clear gain")
    assert in_words(same, "out").endswith("out holds the model as it was.")
    worse = judged(before, [x - 0.1 * rng.random() for x in before])
    assert not worse["better"] and in_words(worse, "out").startswith("Worse.")
    few = judged([0.5, 0.5], [0.63, 0.63])
    assert not few["better"] and in_words(few, "out").startswith("Too few queries to tell.")
    assert judged([0.5] * 20, [0.63] * 20)["better"]
    assert compare({"a": 0.1, "b": 0.3}, {"b": 0.4, "a": 0.2}, 0)[0] == 10.0  # query by query


def test_the_better_model_is_the_one_that_is_written(documents, model, tmp_path, monkeypatch):
    """The verdict is put in the place of that of the tiny model, which may go either way."""
    found = {"queries": 40, "ndcg@10": {"general": 50.0, "merged": 60.0, "retriever": 40.0}, "gain": 10.0}
    monkeypatch.setattr(verdict, "judge", lambda *args: found | {"interval": [5.0, 15.0], "better": True})
    monkeypatch.setattr(module, "rmtree", lambda folder, ignore_errors: None)
    adapt(AdaptArguments(str(documents), str(model), str(tmp_path / "mine"), budget_minutes=600))
    written = QueritForSequenceClassification.from_pretrained(tmp_path / "mine").state_dict()
    merged = QueritForSequenceClassification.from_pretrained(tmp_path / "mine.work" / "merged").state_dict()
    assert all((written[key] - merged[key]).abs().max() <= 0.01 * merged[key].abs().max() for key in merged)
    assert not equal_weights(tmp_path / "mine", model)
    assert "tiny, adapted by `querit adapt`" in (tmp_path / "mine" / "README.md").read_text()


LAPTOP = Pace(model=1 / 2200, teacher=1 / 2200, encoder=0.0, generator=0.0)  # Nano on two cores with AVX2


@pytest.mark.parametrize(
    ("documents", "tokens", "minutes"), [(68, 900, 5), (220, 700, 5), (512, 40, 5), (220, 700, 10), (68, 900, 10)]
)
def test_a_small_corpus_fits_into_minutes_on_a_laptop(documents, tokens, minutes):
    corpus = Corpus((tokens,) * 16, documents, 3)
    size, queries = choose(minutes, LAPTOP, corpus)
    assert queries >= budget.FEWEST and size.judged >= budget.FEWEST_JUDGED
    assert sum(seconds_of(size, queries, LAPTOP, corpus).values()) <= budget.SPARE * 60 * minutes
    # What is left out of the judging is enough to train with.
    assert queries + size.judged <= max(documents * 3 * budget.KEPT, budget.FEWEST + size.judged)


def test_seconds_by_hand():
    corpus = Corpus((100, 1000), 50, 3)  # of 512 tokens: pairs of 120 and 512, 316 on average
    size, pace = SIZES[0], Pace(0.001, 0.002, 0.0001, 6.0)
    found = seconds_of(size, 300, pace, corpus)
    shared, encoding = budget.START / 6, 50 * 550 * 0.0001
    assert found["mine"] == pytest.approx((300 + 100) / 0.5 / 3 * 6 + encoding + shared)
    assert found["before"] == found["after"] == pytest.approx(100 * 50 * 316 * 0.001 + encoding + shared)
    assert found["score"] == pytest.approx(300 * 50 * 316 * 0.002 + encoding + shared)
    assert found["adapt"] == pytest.approx(300 * 7 * 4 * 316 * 0.001 + shared)


@given(
    st.floats(1e-6, 1e-2),
    st.sampled_from([0.0, 1e-4]),
    st.sampled_from([0.0, 1e-3]),
    st.sampled_from([0.0, 0.1, 30.0]),
    st.sampled_from(SIZES),
    st.integers(1, 500),
)
def test_the_minutes_that_are_asked_for_suffice(model, teacher, encoder, generator, size, queries):
    pace, corpus = Pace(model, teacher, encoder, generator), Corpus((50, 400), 300, 3)
    assert affordable_queries(size, minutes_needed(size, queries, pace, corpus), pace, corpus) >= queries


def test_a_larger_budget_takes_a_larger_size_and_too_small_a_one_is_refused():
    corpus = Corpus((300,) * 16, 5000, 3)
    found = [choose(minutes, LAPTOP, corpus) for minutes in (10, 60, 600)]
    assert [SIZES.index(size) for size, _ in found] == sorted((SIZES.index(s) for s, _ in found), reverse=True)
    assert found[0][1] < found[2][1] and found[2][0] == SIZES[0]
    with pytest.raises(ValueError, match=r"Give --budget-minutes [0-9]+"):
        choose(0.1, LAPTOP, corpus)


def test_what_is_left_follows_the_steps_that_ended():
    steps = Steps({"a": 10.0, "b": 30.0})
    steps.begin("a", 0.0)
    assert steps.share(5.0) == pytest.approx(5 / 40) and steps.seconds_left(5.0) == pytest.approx(35)
    assert steps.share(1000.0) == pytest.approx(9.5 / 40)  # not done before it has ended
    steps.end(20.0)  # twice as long as planned: so will the other one be
    steps.begin("b", 20.0)
    assert steps.share(50.0) == pytest.approx(25 / 40) and steps.seconds_left(50.0) == pytest.approx(30)
    other = Steps({"a": 10.0, "b": 30.0})
    other.begin("a", 0.0)
    other.end(0.1, taken_over=True)  # tells nothing of this machine
    assert other.seconds_left(0.1) == pytest.approx(30)


def test_what_a_step_prints_goes_into_the_log(tmp_path, capsys):
    bar = Bar(Steps({"a": 60.0}), {"a": "Training"}, tmp_path / "progress.json")
    with bar.shown(), bar.step("a", tmp_path / "log.txt"):
        print("a line of the stage")
    bar.show()
    shown = capsys.readouterr()
    assert "a line" not in shown.out + shown.err and "1/1 Training (about 60 s left)" in shown.err
    assert (tmp_path / "log.txt").read_text() == "a line of the stage\n"
    told = json.loads((tmp_path / "progress.json").read_text())
    assert told["words"] == "Training" and told["of"] == 1 and 0 <= told["share"] < 1


@pytest.mark.parametrize("kind", ["querit", "bi-encoder"])
def test_the_pace_is_that_of_each_model(documents, model, tmp_path, kind):
    """Nothing is asked of the clock but that what is used takes time, and what is not takes none."""
    sample = list(islice(read_documents(documents), 8))
    teacher = {"bi-encoder": tiny_retriever(tmp_path / "teacher"), "querit": None}[kind]
    args = AdaptArguments(str(documents), str(model), str(tmp_path / "x"), teacher=teacher and str(teacher))
    pace = measure_pace(args, roles_of(args), generator_entry("crop"), sample)
    assert pace.model > 0 and pace.generator == 0
    assert (pace.encoder > 0) == (kind == "bi-encoder") and pace.teacher == (pace.model if kind == "querit" else 0)
    if teacher:  # it encodes all documents beside another first stage, too
        args.first_stage = "bm25"
        assert measure_pace(args, roles_of(args), generator_entry("crop"), sample).encoder > 0


def test_a_generator_is_timed_on_some_documents(documents, model, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "some-key")
    server = Server(answer=answer)
    sample = list(islice(read_documents(documents), 8))
    args = AdaptArguments(str(documents), str(model), str(tmp_path / "x"))
    assert writing_time(args, generator_entry(f"{server.base_url}#r1"), sample) > 0
    assert len(server.requests) == TIMED
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("option", "entry"),
    [
        ("crop", {"kind": "crop"}),
        ("org/model", {"kind": "local", "model": "org/model"}),
        ("/lm/tiny.gguf", {"kind": "local", "model": "/lm", "gguf_file": "tiny.gguf"}),
        ("http://localhost:8000/v1#m", {"kind": "openai", "base_url": "http://localhost:8000/v1", "model": "m"}),
    ],
)
def test_a_generator_is_told_by_one_word(option, entry):
    assert generator_entry(option) == entry


def test_who_teaches_and_who_finds_candidates(model, tmp_path):
    first, cross = tiny_retriever(tmp_path / "first"), cross_encoder(tmp_path / "cross")
    args = AdaptArguments("docs", str(model), "out")
    default = roles_of(args)
    assert [teacher.kind for teacher in default.teachers] == ["querit", "bm25"] and default.first_stage == "bm25"
    dense = roles_of(AdaptArguments("docs", str(model), "out", first_stage=str(first)))
    assert [teacher.kind for teacher in dense.teachers] == ["querit", "bi-encoder"] and dense.first_stage == str(first)
    named = roles_of(AdaptArguments("docs", str(model), "out", teacher=str(first)))
    assert (named.first_stage, named.system) == (str(first), "retriever")
    other = roles_of(AdaptArguments("docs", str(model), "out", teacher=str(cross)))
    assert (other.first_stage, other.system, len(other.teachers)) == ("bm25", None, 1)
    with pytest.raises(ValueError, match="cannot teach itself"):
        roles_of(AdaptArguments("docs", str(model), "out", teacher=str(model)))


def test_what_cannot_be_adapted_is_refused_with_the_fix(documents, model, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "One document."}\n')
    found = invoke("adapt", few, "--output", tmp_path / "a", "--model", model)
    assert found.exit_code == 1 and "needs some hundreds" in found.output
    found = invoke("adapt", documents, "--output", tmp_path / "a", "--model", model, "--budget-minutes", "0.001")
    assert found.exit_code == 1 and "Give --budget-minutes" in found.output
    found = invoke("adapt", documents, "--output", tmp_path / "a", "--model", model, "--generator", "http://x/v1")
    assert found.exit_code == 1 and "http://x/v1#MODEL" in found.output
    for options in (["--budget-minutes", "inf"], ["--seed", "-1"]):  # numpy takes no negative seed, and tells it late
        found = invoke("adapt", documents, "--output", tmp_path / "a", "--model", model, *options)
        assert found.exit_code == 2 and options[0] in found.output
    found = invoke("adapt", documents, "--output", documents / "a", "--model", model)
    assert found.exit_code == 1 and "would be read as documents" in found.output and not (documents / "a.work").exists()
    found = invoke("adapt", documents, "--output", ".", "--model", model)
    assert found.exit_code == 1 and "is there already" in found.output
    assert not (tmp_path / "a").exists()


def test_documents_without_enough_queries_are_refused_before_training(documents, model, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"text": p.read_text()}) + "\n" for p in sorted(documents.iterdir())[:60]))
    options = ["--model", model, "--budget-minutes", "600", "--queries-per-document", "1"]
    found = invoke("adapt", file, "--output", tmp_path / "a", *options)
    assert found.exit_code == 1 and "queries came of 60 documents; " in found.output
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.work" / "adapted").exists()


def test_a_server_that_refuses_is_named(documents, model, tmp_path, monkeypatch):
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(401, "no such key")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "some-key")
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        options = ["--model", model, "--generator", f"{url}#m", "--budget-minutes", "600"]
        found = invoke("adapt", documents, "--output", tmp_path / "a", *options)
        server.shutdown()
    assert found.exit_code == 1 and f"querit: {url}" in found.output and "some-key" not in found.output


def test_causal_rerankers_are_adapted_too(documents, tmp_path):
    model = save_folder(tmp_path / "causal", "qwen3", tiny_model("qwen3"))
    output = tmp_path / "mine"
    adapt(AdaptArguments(str(documents), str(model), str(output), budget_minutes=600, queries_per_document=2))
    assert (output / "chat_template.jinja").exists()


def written_queries(subject: str, place: str) -> list[str]:
    return [f"{subject} {place} age", f"How old is the {subject} {place}?"]


def answer(messages: list[dict]) -> str:
    """What a language model's server says of the document that it is shown."""
    subject, place = re.findall(rf"The (\w+) ({'|'.join(PLACES)})", messages[-1]["content"])[-1]
    return "<think>Hm.</think>\n1. " + "\n2. ".join(written_queries(subject, place))


def test_a_server_writes_the_queries(documents, model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server, output = Server(answer=answer), tmp_path / "mine"
    options = ["--model", model, "--generator", f"{server.base_url}#r1", "--queries-per-document", "2"]
    found = invoke("adapt", documents, "--output", output, "--budget-minutes", "600", *options)
    server.shutdown()
    server.server_close()
    assert found.exit_code == 0, found.output
    assert len(server.requests) == TIMED + len(SUBJECTS) * len(PLACES)
    assert {(key, body["model"]) for _, key, body in server.requests} == {("Bearer sk-very-secret", "r1")}
    work = tmp_path / "mine.work"
    mined = {json.loads(line)["text"] for line in (work / "mined" / "queries.jsonl").read_text().splitlines()}
    wanted = {query for subject in SUBJECTS for place in PLACES for query in written_queries(subject, place)}
    assert mined <= wanted and len(mined) > 0.9 * len(wanted)
    assert {row["query"] for row in pq.read_table(work / "scored.parquet").to_pylist()} <= wanted
    assert f"{server.base_url}#r1" in (output / "README.md").read_text()
    result = json.loads((work / "adaptation.json").read_text())["verdict"]
    assert equal_weights(output, model) != result["better"]
    files = [path for folder in (work, output) for path in folder.rglob("*") if path.is_file()]
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)


def test_a_cross_encoder_is_the_teacher(documents, model, tmp_path):
    teacher, output = cross_encoder(tmp_path / "teacher"), tmp_path / "mine"
    options = ["--model", model, "--teacher", teacher, "--queries-per-document", "2"]
    found = invoke("adapt", documents, "--output", output, "--budget-minutes", "600", *options)
    assert found.exit_code == 0, found.output
    work, own = tmp_path / "mine.work", CrossEncoder(str(teacher))
    for row in pq.read_table(work / "scored.parquet").to_pylist()[:5]:
        pairs = [(row["query"], text) for text in row["documents"]]
        expected = own.predict(pairs, activation_fn=torch.nn.Identity())
        assert len(row["documents"]) > 1 and row["scores"] == pytest.approx(expected, abs=1e-3)
    assert "candidates scored by teacher." in (output / "README.md").read_text()
    result = json.loads((work / "adaptation.json").read_text())["verdict"]
    assert equal_weights(output, model) != result["better"]
