"""`querit adapt`: documents in, a reranker and a verdict out."""

import json
import random
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder
from transformers import pipeline
from typer.testing import CliRunner

import querit
from hub_card.build import build
from modeling_querit.modeling_querit import QueritForSequenceClassification
from recipes import adapt as module
from recipes.adapt import TIMED, AdaptArguments, Pace, adapt, generator_entry, in_words, judge, measure_pace
from recipes.documents import read_documents
from recipes.teachers import Teacher
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
    return CliRunner().invoke(querit.app, [str(arg) for arg in args])


def equal_weights(a, b) -> bool:
    ours, theirs = (QueritForSequenceClassification.from_pretrained(f).state_dict() for f in (a, b))
    return all((ours[key] - theirs[key]).abs().max() <= 0.01 * theirs[key].abs().max() for key in theirs)


def results(before: list[float], after: list[float]) -> dict:
    values = {"general": before, "merged": after, "retriever": before}
    per_query = {name: {"default test": {f"q{i}": x for i, x in enumerate(v)}} for name, v in values.items()}
    scores = {name: 100 * sum(v) / len(v) for name, v in values.items()}
    return {"sets": {"mined": {"per_query": per_query, "scores": scores}}}


def test_one_command_writes_a_reranker_that_loads_and_says_what_came_of_it(documents, model, tmp_path):
    teacher, output = tiny_retriever(tmp_path / "teacher"), tmp_path / "mine"
    options = ["--model", model, "--teacher", teacher, "--budget-minutes", "600"]
    found = invoke("adapt", documents, "--output", output, *options)
    assert found.exit_code == 0, found.output
    work = tmp_path / "mine.work"
    verdict = json.loads((work / "adaptation.json").read_text())["verdict"]
    words = in_words(verdict, str(output))
    assert words in found.stdout and words in (output / "README.md").read_text()
    measured = json.loads((work / "evaluation" / "results.json").read_text())
    values = measured["sets"]["mined"]["per_query"]
    gains = [values["merged"]["default test"][query] - x for query, x in values["general"]["default test"].items()]
    assert verdict["gain"] == pytest.approx(100 * np.mean(gains), abs=0.01)
    # The model of the verdict is the one that was written.
    assert equal_weights(output, model) != verdict["better"]
    assert not (work / "merged").exists() and (work / "mined" / "queries.jsonl").exists()
    rows = invoke("rank", "the violin by the harbour", documents / "violin-by-the-harbour.md", "--model", output)
    assert rows.exit_code == 0, rows.output
    again = invoke("adapt", documents, "--output", output, *options)
    assert again.exit_code == 1 and "is there already" in again.output


def test_a_run_that_was_stopped_goes_on_where_it_was(documents, model, tmp_path, monkeypatch):
    args = AdaptArguments(str(documents), str(model), f"{tmp_path}/mine/", budget_minutes=600)
    monkeypatch.setattr(module, "merge", lambda merge_args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapt(args)
    assert not (tmp_path / "mine").exists()
    work = tmp_path / "mine.work"
    kept = [work / "plan.json", work / "mined" / "queries.jsonl", work / "scored.parquet"]
    before = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="belongs to another request"):
        adapt(AdaptArguments(**{**vars(args), "seed": 4}))
    monkeypatch.setattr(module.train, "main", lambda *args: pytest.fail("it was trained already"))
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


@pytest.mark.parametrize("better", [True, False])
def test_the_better_model_is_the_one_that_is_written(documents, model, tmp_path, monkeypatch, better):
    """The verdict is put in the place of that of the tiny model, which may go either way."""
    found = {"queries": 40, "ndcg@10": {"general": 50.0, "merged": 60.0, "retriever": 40.0}, "gain": 10.0}
    found |= {"interval": [5.0, 15.0], "better": better}
    monkeypatch.setattr(module, "judge", lambda results, seed: found)
    monkeypatch.setattr(module, "rmtree", lambda folder: None)
    adapt(AdaptArguments(str(documents), str(model), str(tmp_path / "mine"), budget_minutes=600))
    written = QueritForSequenceClassification.from_pretrained(tmp_path / "mine").state_dict()
    merged = QueritForSequenceClassification.from_pretrained(tmp_path / "mine.work" / "merged").state_dict()
    close = [(written[key] - merged[key]).abs().max() <= 0.01 * merged[key].abs().max() for key in merged]
    assert all(close) == better and equal_weights(tmp_path / "mine", model) != better


def test_few_queries_tell_nothing():
    verdict = judge(results([0.5, 0.5], [0.63, 0.63]), 0)
    assert not verdict["better"] and in_words(verdict, "out").startswith("Too few queries to tell.")
    assert judge(results([0.5] * 20, [0.63] * 20), 0)["better"]


def test_the_budget_counts_the_model_the_teacher_the_corpus_and_the_generator():
    # By hand: 0.7 * 1800 s - 3 * 100 * 50 * 0.01 s = 1110 s; a query costs 50 * 0.02 + 7 * 4 * 0.01 s.
    assert Pace(0.01, 0.02, 0.0, 0.0).affordable_queries(30) == int(1110 / 1.28)
    assert Pace(0.01, 0.02, 200.0, 0.0).affordable_queries(30) == int(910 / 1.28)
    assert Pace(0.01, 0.0, 0.0, 0.0).affordable_queries(30) == int(1110 / 0.28)
    assert Pace(0.01, 0.02, 0.0, 4.0).affordable_queries(30) == int(1110 / 5.28)


def test_the_pace_counts_every_encoding_and_all_queries_that_are_written(documents, model, tmp_path, monkeypatch):
    runs = []

    def six_seconds(work):
        runs.append(work())
        return 6.0

    monkeypatch.setattr(module, "best_time", six_seconds)
    monkeypatch.setattr(module, "writing_time", lambda *args: 4.0)
    sample = list(islice(read_documents(documents), 16))
    teacher = Teacher(str(tiny_retriever(tmp_path / "teacher")), kind="bi-encoder")
    args = AdaptArguments(str(documents), str(model), "out", queries_per_document=2)
    pace = measure_pace(args, teacher, generator_entry("org/lm"), sample, ["a passage"] * 20, 800)
    # Documents are encoded in mining and in evaluation, passages in scoring: 16 documents have 20 of them here.
    assert len(runs[-1]) == 16 + 16 + 20
    assert (pace.teacher, pace.corpus) == (0.0, 6.0 / 16 * 800)
    # A document takes 4 s and gives 2 queries, of which one in 2.5 is left to train with.
    assert pace.generator == pytest.approx(2.5 * 4.0 / 2)


def test_a_generator_is_timed_on_a_few_documents(documents, model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "some-key")

    def slowly(messages):
        time.sleep(0.3)
        return answer(messages)

    server = Server(answer=slowly)
    sample = list(islice(read_documents(documents), 16))
    args = AdaptArguments(str(documents), str(model), "out")
    seconds = module.writing_time(args, generator_entry(f"{server.base_url}#r1"), sample)
    server.shutdown()
    server.server_close()
    assert len(server.requests) == TIMED and seconds >= 0.3 / TIMED
    assert module.writing_time(args, generator_entry("crop"), sample) == 0


@given(
    st.floats(1e-4, 2),
    st.sampled_from([0.0, 1e-3, 0.5]),
    st.sampled_from([0.0, 60.0, 1e4]),
    st.sampled_from([0.0, 0.1, 30.0]),
    st.integers(1, 500),
)
def test_the_minutes_that_are_asked_for_suffice(model, teacher, corpus, generator, queries):
    pace = Pace(model, teacher, corpus, generator)
    minutes = pace.minutes_needed(queries)
    assert pace.affordable_queries(minutes * 1.001) >= queries > pace.affordable_queries(minutes * 0.99) - 1


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


def test_documents_without_enough_queries_are_refused_before_training(documents, model, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"text": p.read_text()}) + "\n" for p in sorted(documents.iterdir())[:60]))
    options = ["--model", model, "--budget-minutes", "600", "--queries-per-document", "1"]
    found = invoke("adapt", file, "--output", tmp_path / "a", *options)
    assert found.exit_code == 1 and "queries came of 60 documents; " in found.output
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.work" / "adapted").exists()


def test_other_documents_do_not_get_the_old_ones_queries(documents, model, tmp_path):
    file = tmp_path / "docs.jsonl"
    rows = [json.dumps({"text": path.read_text()}) + "\n" for path in sorted(documents.iterdir())]
    file.write_text("".join(rows))
    options = ["--output", tmp_path / "a", "--model", model, "--budget-minutes", "600"]
    assert invoke("adapt", file, *options).exit_code == 0
    shutil.rmtree(tmp_path / "a")
    file.write_text("".join(rows[1:]))
    found = invoke("adapt", file, *options)
    assert found.exit_code == 1 and "another request (documents changed)" in found.output


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
    adapt(AdaptArguments(str(documents), str(model), str(output), budget_minutes=600, queries_per_document=1))
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
    verdict = json.loads((work / "adaptation.json").read_text())["verdict"]
    assert equal_weights(output, model) != verdict["better"]
    files = [path for folder in (work, output) for path in folder.rglob("*") if path.is_file()]
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)


def test_another_commit_as_teacher_leaves_the_model_at_its_own(documents, model, tmp_path, monkeypatch):
    seen = []

    def mined(args):
        Path(args.output_dir).mkdir()
        (Path(args.output_dir) / "mine.json").write_text(json.dumps({"queries": {"train": 100, "test": 40}}))

    def stop(args):
        seen.append(args.revisions)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.mine, "main", mined)
    for stage in (module.score, module.train):
        monkeypatch.setattr(stage, "main", lambda *args: None)
    monkeypatch.setattr(module, "merge", lambda args: None)
    monkeypatch.setattr(module, "evaluate", stop)
    commits = {"revision": "a" * 40, "teacher": str(model), "teacher_revision": "b" * 40}
    with pytest.raises(KeyboardInterrupt):
        adapt(AdaptArguments(str(documents), str(model), str(tmp_path / "mine"), budget_minutes=600, **commits))
    assert seen == [{str(model): "a" * 40}]


@pytest.mark.parametrize("kind", ["querit", "cross-encoder"])
def test_a_model_that_reads_pairs_is_the_teacher(documents, model, tmp_path, kind):
    teacher, output = tmp_path / "teacher", tmp_path / "mine"
    if kind == "querit":  # a released folder, of another backbone than the model that is adapted
        build(save_folder(tmp_path / "causal", "qwen3"), teacher, "# A teacher\n")
        ranker = pipeline("text-ranking", model=str(teacher), trust_remote_code=True)
    else:
        cross_encoder(teacher)
    options = ["--model", model, "--teacher", teacher, "--queries-per-document", "1"]
    found = invoke("adapt", documents, "--output", output, "--budget-minutes", "600", *options)
    assert found.exit_code == 0, found.output
    work = tmp_path / "mine.work"
    for row in pq.read_table(work / "scored.parquet").to_pylist()[:5]:
        if kind == "querit":
            ranked = sorted(ranker(row["query"], row["documents"]), key=lambda result: result["index"])
            expected = [result["score"] for result in ranked]
        else:
            expected = CrossEncoder(str(teacher)).predict([(row["query"], text) for text in row["documents"]])
        assert len(row["documents"]) > 1 and row["scores"] == pytest.approx(expected, abs=0.02)  # in bf16 where fast
    assert f"candidates scored by {teacher}." in (output / "README.md").read_text()
    verdict = json.loads((work / "adaptation.json").read_text())["verdict"]
    assert equal_weights(output, model) != verdict["better"]
