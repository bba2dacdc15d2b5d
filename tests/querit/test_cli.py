"""The command as a user runs it: a process, its output, its exit code."""

import gzip
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from querit import cli
from recipes.lib.systems import find_weights
from tests.models_for_tests import folder_of, save_folder, tiny_model
from tests.recipes.folders_for_tests import small_set, tiny_retriever

DOCUMENTS = ["The tide rises twice a day.", "Feed the starter with flour.", "Una batería dura más si no se calienta."]


@pytest.fixture(scope="module")
def model():
    return str(folder_of("bert"))


def invoke(*args, input=None):
    # Wide enough that no path of a message is broken.
    return CliRunner(env={"COLUMNS": "500"}).invoke(cli.app, [str(a) for a in args], input=input)


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


def on_a_terminal(*args, columns=120):
    """-> exit code and what a terminal of so many columns shows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-m", "querit", *map(str, args)], stdout=theirs, env=environment)
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
    return process.wait(), shown.decode()


def piped(*args, **environment):
    """Another process, its standard output and error as bytes."""
    return subprocess.run(
        [sys.executable, "-m", "querit", *map(str, args)],
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_a_terminal_gets_a_table_and_a_pipe_json(tmp_path, model):
    file = tmp_path / "notes.txt"
    file.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    code, shown = on_a_terminal("rank", "tide", file, "--model", model)
    assert code == 0 and "probability" in shown and not shown.lstrip().startswith("{")
    found = piped("rank", "tide", file, "--model", model)
    assert found.returncode == 0 and len([json.loads(line) for line in found.stdout.splitlines()]) == 3


def test_text_without_blanks_wraps_in_the_table_and_none_is_cut(tmp_path, model):
    chinese = "".join(chr(0x4E00 + n) for n in range(150))
    (tmp_path / "a.txt").write_text(f"{chinese}\nTides rise (潮汐) {chinese[:120]}\n", encoding="utf-8")
    result = CliRunner(env={"COLUMNS": "80"}).invoke(
        cli.app, ["rank", "潮", str(tmp_path / "a.txt"), "--table", "--model", model]
    )
    assert result.exit_code == 0, result.output
    shown = "".join(re.findall("[\u4e00-\u9fff]", result.stdout))
    assert chinese in shown and f"潮汐{chinese[:120]}" in shown and "…" not in result.stdout
    assert all(cell_len(line) <= 80 for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_json_is_utf8_and_whole_whatever_the_locale(tmp_path, model, environment):
    (tmp_path / "d.jsonl").write_text(
        '{"text": "潮 \\ud83d end", "n": NaN, "m": 1e999}\n{"text": "tide"}\n', encoding="utf-8"
    )
    found = piped("rank", "tide", tmp_path / "d.jsonl", "--model", model, **environment)
    assert found.returncode == 0, found.stderr

    def refuse(constant):
        raise ValueError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in found.stdout.decode("utf-8").splitlines()]
    documents = {line["document"]["text"]: line["document"] for line in lines}
    assert documents["潮 \ufffd end"] == {"text": "潮 \ufffd end", "n": None, "m": None}
    shown = piped("rank", "tide", tmp_path / "d.jsonl", "--table", "--model", model, **environment)
    assert shown.returncode == 0 and b"tide" in shown.stdout


def test_bytes_of_standard_input_that_are_no_text_are_told_with_their_place(model):
    result = invoke("rank", "tide", "-", "--model", model, input="gut\nZugvögel\n".encode("latin-1"))
    assert result.exit_code == 1 and "-:2: not UTF-8 text (0xf6, byte 8" in result.output


def test_a_folder_markdown_html_and_json_are_read_for_what_they_are(tmp_path, model):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("---\ntitle: Tides\n---\n# When\n\nTwice a day.\n", encoding="utf-8")
    (folder / "b.html").write_text("<title>Moon</title><style>p{}</style><p>It pulls.", encoding="utf-8")
    (folder / "c.json").write_text('["one", {"text": "two"}]', encoding="utf-8")
    (folder / "d.ndjson").write_text('{"text": "three"}\n', encoding="utf-8")
    (folder / "e.txt").write_text("four\nlines are one document", encoding="utf-8")
    (folder / "f.csv.gz").write_bytes(gzip.compress(b"text;id\nfive;1\n"))
    (folder / "._a.md").write_bytes(b"\xff")
    (folder / "g.pdf").write_bytes(b"%PDF")
    result = invoke("rank", "tide", folder, "--model", model)
    assert {row["source"].removeprefix(f"{folder}/"): row["document"] for row in rows(result)} == {
        "a.md": {"title": "Tides", "text": "# When\n\nTwice a day."},
        "b.html": {"title": "Moon", "text": "It pulls."},
        "c.json[0]": "one",
        "c.json[1]": {"text": "two"},
        "d.ndjson:1": {"text": "three"},
        "e.txt": "four\nlines are one document",
        "f.csv.gz:2": {"text": "five", "id": "1"},
    }
    assert "left out: 1 hidden or a system's own, 1 of kinds that are not read" in result.stderr


def test_the_column_that_is_ranked_overwrites_no_other(tmp_path, model):
    (tmp_path / "d.jsonl").write_text('{"text": "short", "body": "The tide rises.", "title": 1917}\n')
    (row,) = rows(invoke("rank", "tide", tmp_path / "d.jsonl", "--column", "body", "--model", model))
    assert row["document"] == {"text": "short", "body": "The tide rises.", "title": 1917}
    (tmp_path / "same.jsonl").write_text('{"text": "The tide rises.", "title": "1917"}\n')
    (same,) = rows(invoke("rank", "tide", tmp_path / "same.jsonl", "--model", model))
    assert row["score"] == same["score"]


def test_long_documents_are_scored_by_their_best_passage(tmp_path, model):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "word " * 600 + "The tide rises twice a day."}) + "\n")
    (cut,) = rows(invoke("rank", "tide", tmp_path / "d.jsonl", "--model", model))
    (whole,) = rows(invoke("rank", "tide", tmp_path / "d.jsonl", "--long-documents", "max_passage", "--model", model))
    assert cut["truncated"] and not whole["truncated"] and len(whole["passage"]) == 2
    assert whole["score"] >= cut["score"]


def test_a_first_stage_is_fused_from_a_column_or_from_bm25(tmp_path, model):
    from querit import load

    lines = ["text,found"] + [f"{text},{score}" for text, score in zip(DOCUMENTS, (1, 3.5, "2e0"), strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ranker = load(model)
    for option, scores in (("found", [1, 3.5, 2]), ("bm25", bm25_by_hand(ranker.tokenizer, "starter flour"))):
        found = rows(invoke("rank", "starter flour", tmp_path / "d.csv", "--first-stage", option, "--model", model))
        expected = ranker("starter flour", DOCUMENTS, first_stage_scores=scores)
        assert [(r["index"], r["fused_score"]) for r in found] == [(r["index"], r["fused_score"]) for r in expected]
    shown = invoke("rank", "tide", tmp_path / "d.csv", "--first-stage", "found", "--table", "--model", model)
    assert "fused" in shown.stdout
    (tmp_path / "bad.csv").write_text("text,found\nx,1\ny,high\n")
    result = invoke("rank", "tide", tmp_path / "bad.csv", "--first-stage", "found", "--model", tmp_path / "none")
    assert result.exit_code == 1 and "bad.csv:3: no number under 'found'" in result.output


def bm25_by_hand(tokenizer, query, k1=1.5, b=0.75):
    """Lucene's formula (Kamphuis et al. 2020), word piece by word piece."""
    texts = [tokenizer.encode(text.lower(), add_special_tokens=False) for text in DOCUMENTS]
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        score = 0.0
        for piece in tokenizer.encode(query, add_special_tokens=False):
            df = sum(piece in other for other in texts)
            tf = text.count(piece)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(
    ("name", "text", "options", "code", "message"),
    [
        ("d.csv", "id,body\n1,x\n", [], 1, "--column"),
        ("d.json", "[" * 100_000, [], 1, "d.json: the JSON is nested too deeply"),
        ("d.jsonl", '{"text": {"a": 1}}\n', [], 1, "d.jsonl:1: 'text' is an object"),
        ("d.pdf", "%PDF", [], 1, "d.pdf is of no kind that can be read"),
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
    result = invoke("rank", "tide", tmp_path / "nowhere.txt", "--model", model)
    assert result.exit_code == 2 and "nowhere.txt does not exist" in result.output
    (tmp_path / "empty").mkdir()
    assert "no documents" in invoke("rank", "tide", tmp_path / "empty", "--model", model).output
    for missing in (tmp_path / "no-model", "no-model", "./no/model", "some/deep/no-model"):
        result = invoke("rank", "tide", tmp_path / "d.txt", "--model", missing)
        assert result.exit_code == 1 and f"{missing} does not exist" in result.output, result.output
    weights = Path(model) / "model.safetensors"
    result = invoke("rank", "tide", tmp_path / "d.txt", "--model", weights)
    assert result.exit_code == 1 and f"{weights} is a file. Give the folder" in result.output
    # Before documents and model are looked for.
    result = invoke("rank", " ", tmp_path / "nowhere.txt", "--model", tmp_path / "no-model")
    assert result.exit_code == 1 and "query is empty" in result.output
    (tmp_path / "latin.txt").write_bytes("Zugvögel".encode("latin-1"))
    result = invoke("rank", "tide", tmp_path / "latin.txt", "--model", model)
    assert result.exit_code == 1 and "latin.txt:1: not UTF-8 text" in result.output


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
    assert "no-model does not exist" in error(tmp_path / "no-model", "--data", data, "--retriever", model)
    assert "nowhere does not exist" in error(model, "--data", tmp_path / "nowhere", "--retriever", model)
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


def test_evaluate_shows_a_table_on_a_terminal(tmp_path, model):
    data = small_set(tmp_path / "care")
    code, shown = on_a_terminal(
        "evaluate", model, "--data", data, "--retriever", "bm25", "--output", tmp_path / "out", "--top-k", 4,
        "--max-length", 32,
    )  # fmt: skip
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # colours
    assert code == 0 and "|--" not in shown and "{'" not in shown
    assert re.search(r"care: \S+bert\S* has \d+\.\d and \d+\.\d \+ first stage", shown)
    assert re.search(r"care\s+nDCG@10\s+16", shown) and "…" not in shown


def test_help_eats_no_brackets():
    assert "querit-reranker[onnx]" in invoke("export", "--help").output


def test_help_imports_no_torch():
    code = (
        "import sys; from querit import cli; from typer.testing import CliRunner; "
        "r = CliRunner().invoke(cli.app, ['--help']); "
        "assert r.exit_code == 0 and 'rank' in r.output and 'convert' in r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
