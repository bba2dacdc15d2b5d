"""The command as a user runs it: a process, its output, its exit code."""

import json
import os
import pty
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import querit
from recipes.systems import find_weights
from tests.models_for_tests import folder_of, save_folder, tiny_model
from tests.recipes.folders_for_tests import small_set, tiny_retriever

DOCUMENTS = ["The tide rises twice a day.", "Feed the starter with flour.", "Una batería dura más si no se calienta."]


@pytest.fixture(scope="module")
def model():
    return str(folder_of("bert"))


def invoke(*args, input=None):
    # Wide enough that no path of a message is broken.
    return CliRunner(env={"COLUMNS": "500"}).invoke(querit.app, [str(a) for a in args], input=input)


def rows(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_lines_of_text_become_json_lines_best_first(tmp_path, model):
    file = tmp_path / "notes.txt"
    file.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    found = rows(invoke("rank", "tide", file, "--model", model))
    assert sorted(row["document"] for row in found) == sorted(DOCUMENTS)
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    line_of = {DOCUMENTS[0]: 1, DOCUMENTS[1]: 3, DOCUMENTS[2]: 5}
    assert all(row["source"] == f"{file}:{line_of[row['document']]}" for row in found)


def test_the_command_scores_as_the_pipeline_does(tmp_path, model):
    from transformers import pipeline

    file = tmp_path / "notes.txt"
    file.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    expected = pipeline("text-ranking", model=model, trust_remote_code=True)("tide", DOCUMENTS)
    found = rows(invoke("rank", "tide", file, "--model", model))
    assert [row["index"] for row in found] == [row["index"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv", 'id,body\n1,"The tide, it rises"\n2,Flour\n'),
        ("d.tsv", "id\tbody\n1\tThe tide, it rises\n2\tFlour\n"),
        ("d.jsonl", '{"id": "1", "body": "The tide, it rises"}\n{"id": "2", "body": "Flour"}\n'),
    ],
)
def test_tables_and_objects_keep_their_other_columns(tmp_path, model, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = rows(invoke("rank", "tide", tmp_path / name, "--column", "body", "--model", model))
    assert {(row["document"]["id"], row["document"]["text"]) for row in found} == {
        ("1", "The tide, it rises"),
        ("2", "Flour"),
    }


def test_jsonl_strings_several_files_standard_input_and_top_k(tmp_path, model):
    (tmp_path / "a.jsonl").write_text(json.dumps(DOCUMENTS[0]) + "\n" + json.dumps(DOCUMENTS[1]) + "\n")
    result = invoke(
        "rank", "tide", tmp_path / "a.jsonl", "-", "--top-k", 2, "--model", model, input=DOCUMENTS[2] + "\n"
    )
    assert len(rows(result)) == 2
    everything = rows(invoke("rank", "tide", tmp_path / "a.jsonl", "-", "--model", model, input=DOCUMENTS[2] + "\n"))
    assert {row["source"] for row in everything} == {f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2", "-:1"}


def test_a_table_shows_the_order_and_takes_brackets_as_text(tmp_path, model):
    file = tmp_path / "notes.txt"
    file.write_text("[red]not markup[/red]\nplain", encoding="utf-8")
    result = invoke("rank", "tide [bold]", file, "--table", "--model", model)
    assert result.exit_code == 0 and "[red]" in result.stdout and "[bold]" in result.stdout and "score" in result.stdout


def test_a_terminal_gets_a_table_and_a_pipe_json(tmp_path, model):
    file = tmp_path / "notes.txt"
    file.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    command = [sys.executable, "-m", "querit", "rank", "tide", str(file), "--model", model]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end of a terminal closes so
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait() == 0
    assert "probability" in shown.decode() and not shown.decode().lstrip().startswith("{")
    piped = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert len([json.loads(line) for line in piped.stdout.splitlines()]) == 3


@pytest.mark.parametrize(
    ("name", "text", "options", "code", "message"),
    [
        ("d.csv", "id,body\n1,x\n", [], 1, "--column"),
        ("d.csv", "id,text\n1,x\n2,tides, they rise\n", [], 1, "d.csv:3: more fields than columns"),
        ("d.csv", 'id,text\n1,x\n2,"tides\n3,y\n', [], 1, "d.csv:3: unexpected end of data"),
        ("d.jsonl", '{"text": "x"}\n{broken\n', [], 1, "d.jsonl:2"),
        ("d.jsonl", '{"body": "x"}\n', [], 1, "--column"),
        ("d.txt", "\n \n", [], 1, "no documents"),
        ("d.txt", "x", ["--top-k", "0"], 2, "top-k"),
    ],
)
def test_bad_files_and_options_say_what_is_wrong(tmp_path, model, name, text, options, code, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    result = invoke("rank", "tide", tmp_path / name, "--model", model, *options)
    assert result.exit_code == code and message in result.output.replace("\n", " ")
    assert not result.stdout.startswith("{") and "Traceback" not in result.output


def test_missing_files_folders_models_and_empty_queries_are_named(tmp_path, model):
    (tmp_path / "d.txt").write_text("x")
    assert "nowhere.txt" in invoke("rank", "tide", tmp_path / "nowhere.txt", "--model", model).output.replace("\n", "")
    assert invoke("rank", "tide", tmp_path / "nowhere.txt", "--model", model).exit_code == 2
    assert invoke("rank", "tide", tmp_path, "--model", model).exit_code == 2
    result = invoke("rank", "tide", tmp_path / "d.txt", "--model", tmp_path / "no-model")
    assert result.exit_code == 1 and "no-model" in result.output and "Traceback" not in result.output
    result = invoke("rank", " ", tmp_path / "d.txt", "--model", model)
    assert result.exit_code == 1 and "query is empty" in result.output
    (tmp_path / "latin.txt").write_bytes("Zugvögel".encode("latin-1"))
    result = invoke("rank", "tide", tmp_path / "latin.txt", "--model", model)
    assert result.exit_code == 1 and "UTF-8" in result.output


def test_evaluate_measures_folders_by_name_and_passes_options_on(tmp_path, model):
    data, retriever = small_set(tmp_path / "care"), tiny_retriever(tmp_path / "retriever")
    other = save_folder(tmp_path / "other", "bert", tiny_model("bert", seed=1))
    options = ["--retriever", retriever, "--output", tmp_path / "out", "--top-k", 4, "--max-length", 32]
    result = invoke("evaluate", model, other, "--data", data, "--data", small_set(tmp_path / "more"), *options)
    assert result.exit_code == 0, result.output
    for row in (
        "| set | score | queries | BM25 | retriever | bert | bert + first stage | other |",
        "| care |",
        "| more |",
    ):
        assert row in result.stdout
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert (settings["top_k"], settings["max_length"], settings["max_queries"]) == (4, 32, None)


def test_evaluate_measures_test_or_the_split_that_is_named(tmp_path, model):
    data, retriever = small_set(tmp_path / "care"), tiny_retriever(tmp_path / "retriever")
    (data / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\nq3\td3\t1\n")
    options = ["--data", data, "--retriever", retriever, "--output", tmp_path / "out", "--top-k", 4, "--max-length", 32]
    for split, queries in (([], 16), (["--split", "dev"], 3)):
        result = invoke("evaluate", model, *options, *split)
        assert result.exit_code == 0, result.output
        assert f"| care | nDCG@10 | {queries} |" in result.stdout
    result = invoke("evaluate", model, *options, "--split", "train")
    assert result.exit_code == 1 and "care/qrels has no train.tsv; its splits are dev, test." in result.output


def test_evaluate_says_what_is_no_set_and_no_reranker(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def error(*args):
        result = invoke("evaluate", *args, "--output", tmp_path / "out")
        assert result.exit_code == 1 and "Traceback" not in result.output
        return " ".join(result.output.split())

    assert "Nothing to measure on" in error(model)
    # The comma within a benchmark's name parts no names.
    assert "no task or benchmark 'MTEB(Multilingual, v0)'. Near it: MTEB(" in error(
        model, "--tasks", "SciFact,MTEB(Multilingual, v0)"
    )
    data = small_set(tmp_path / "care")
    assert "is no folder here" in error(tmp_path / "no-model", "--data", data, "--retriever", model)
    retriever = tiny_retriever(tmp_path / "dense")
    assert "is no Querit reranker" in error(retriever, "--data", data, "--retriever", retriever)
    (data / "qrels" / "test.tsv").unlink()
    assert "care/qrels has []" in error(model, "--data", data, "--retriever", retriever)


def test_evaluate_takes_commits_of_repos(tmp_path, monkeypatch):
    import recipes.evaluate

    seen = []
    monkeypatch.setattr(recipes.evaluate, "evaluate", lambda args: seen.append(args))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.md").write_text("| table |")
    commit, folder = "a" * 40, tmp_path / "name@home"
    folder.mkdir()
    options = ["--tasks", "SciFact, BEIR", "--retriever", f"org/dense@{'b' * 40}", "--output", tmp_path / "out"]
    assert invoke("evaluate", f"org/reranker@{commit}", folder, *options).exit_code == 0
    assert seen[0].models == {"reranker": f"org/reranker@{commit}", "name@home": str(folder)}
    assert seen[0].tasks == ["SciFact", "BEIR"]
    pinned = find_weights(seen[0].models["reranker"])
    assert (pinned.path, pinned.revision) == ("org/reranker", commit)
    pinned = find_weights(seen[0].retriever)
    assert (pinned.path, pinned.revision) == ("org/dense", "b" * 40)


def test_evaluate_takes_several_commits_of_one_repo(tmp_path, monkeypatch):
    import recipes.evaluate

    seen = []
    monkeypatch.setattr(recipes.evaluate, "evaluate", lambda args: seen.append(args))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.md").write_text("| table |")
    models = [f"org/m@{letter * 40}" for letter in "ab"]
    options = ["--tasks", "SciFact", "--retriever", f"org/m@{'c' * 40}", "--output", tmp_path / "out"]
    assert invoke("evaluate", *models, *options).exit_code == 0
    assert seen[0].models == {model: model for model in models}
    found = [find_weights(path) for path in (*seen[0].models.values(), seen[0].retriever)]
    assert [(weights.path, weights.revision) for weights in found] == [("org/m", letter * 40) for letter in "abc"]


def test_help_imports_no_torch():
    code = "import sys, querit; from typer.testing import CliRunner; r = CliRunner().invoke(querit.app, ['--help']); "
    code += (
        "assert r.exit_code == 0 and 'rank' in r.output and 'convert' in r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
