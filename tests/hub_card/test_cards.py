"""Cards: every block of code runs, every number stands in a result file, and the Hub's own classes read them."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from mteb.models.model_implementations import querit_models
from typer.testing import CliRunner

from hub_card.build import SUMS
from hub_card.card import TEMPLATES, member_of, members, reliability_table, render, sources_of
from hub_card.engines import OLDEST_FOR_BERT, OLDEST_FOR_OTHERS, installed_ranker
from hub_card.lineage import data_sets, in_words, stages_of
from querit import cli
from tests.hub_card.folders_for_tests import CARDS, DEV, NANO, ROOT, SYSTEM, built

CARD = sys.modules[render.__module__]
QUERY = "Why does the sea rise twice a day?"
MOON, SALT = "Tides rise twice a day because the Moon pulls on the water.", "Salt lowers its freezing point."
KINDS = list(CARDS)
PUBLISHED = ["qwen3", "deepseek_v3"]
NUMBER = re.compile(r"(?<![\w.-])[+-]?\d[\d,]*(?:\.\d+)?(?![\w-]|\.\d)")


def card(kind: str) -> str:
    return (built(kind) / "README.md").read_text(encoding="utf-8")


def hub_id(kind: str) -> str:
    return f"querit/{CARDS[kind]}"


def blocks(text: str, language: str) -> list[str]:
    tokens = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    assert {token.info for token in tokens} <= {"python", "bash", "text"}  # each is tried below
    return [token.content for token in tokens if token.info == language]


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of each table, its header first."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [[c.strip() for c in line.strip("|").split("|")] for line in t.splitlines() if "---" not in line] for t in found
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_python_runs(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    documents = [MOON, "La marea sube dos veces al día por la Luna.", SALT]
    best_first = [row["document"] for row in installed_ranker(built(kind))(QUERY, documents)]
    if kind == "nano":  # what a stranger runs first shows a sensible order
        assert best_first == documents
    names: dict = {}
    found = blocks(card(kind), "python")
    assert len(found) == (3 if kind == "nano" else 2)
    for code in found:
        assert hub_id(kind) in code
        exec(code.replace(hub_id(kind), str(built(kind))), names)  # noqa: S102 - the card's own lines
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == best_first
    assert sorted(row["corpus_id"] for row in names["ranked"]) == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_shell_runs(kind, tmp_path):
    [code] = blocks(card(kind), "bash")
    assert f"--model {hub_id(kind)}" in code
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = ["bash", "-euo", "pipefail", "-c", code.replace(hub_id(kind), str(built(kind)))]
    environment = {"PATH": path, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    expected = installed_ranker(built(kind))(QUERY, [MOON, SALT])
    assert [json.loads(line)["document"] for line in done.stdout.splitlines()] == [row["document"] for row in expected]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_lines_for_vllm_name_what_the_export_writes(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [text] = blocks(card(kind), "text")
    download, export, serve = (line.split() for line in text.splitlines())
    assert download == ["hf", "download", hub_id(kind), "--local-dir", "model"]
    shutil.copytree(built(kind), "model")
    done = CliRunner().invoke(cli.app, export[1:])
    assert done.exit_code == 0, done.output
    assert serve[:3] == ["vllm", "serve", "exported"]
    assert Path(serve[serve.index("--chat-template") + 1]).is_file()
    [architecture] = json.loads(Path("exported/config.json").read_text())["architectures"]
    assert architecture.endswith("ForSequenceClassification")
    assert int(serve[serve.index("--max-model-len") + 1]) <= installed_ranker(built(kind)).max_length
    assert not blocks(card("nano"), "text")


def test_nanos_results_are_those_of_the_file():
    results = json.loads((DEV / "results.json").read_text())
    by_set, by_language, way = tables(section(card("nano"), "How it scores"))
    systems = ["BM25", "retriever", SYSTEM, f"{SYSTEM} + first stage"]
    assert by_set[0] == [
        "set",
        "score",
        "queries",
        "BM25",
        "first stage",
        "**this model**",
        "**this model** + first stage",
    ]
    for row, (name, entry) in zip(by_set[1:-2], results["sets"].items(), strict=True):
        values = [sum(q.values()) / len(q) for s in systems for q in entry["per_query"][s].values()]
        assert row[:3] == [name, "nDCG@10", str(len(entry["per_query"][SYSTEM]["default test"]))]
        assert [float(cell) for cell in row[3:]] == pytest.approx([100 * value for value in values], abs=0.056)
    means = [results["mean"][system]["score"] for system in systems]
    assert [float(cell) for cell in by_set[-2][3:]] == pytest.approx(means, abs=0.051)
    languages = yaml.safe_load((TEMPLATES / "querit-reranker-nano.yaml").read_text())["languages"]
    assert set(results["sets"]) <= set(languages)
    for language, count, *cells in by_language[1:]:
        sets = [entry["scores"] for name, entry in results["sets"].items() if languages[name] == language]
        assert int(count) == len(sets)
        means = [fmean(scores[system] for scores in sets) for system in systems[1:]]
        assert [float(cell) for cell in cells] == pytest.approx(means, abs=0.051)
    behind = {name for name, x in results["sets"].items() if x["scores"][SYSTEM] < x["scores"]["retriever"]}
    told = re.search(r"behind its first stage on (.*)\.\n", card("nano"))[1]
    assert set(told.split(", ")) == behind or (not behind and told == "none of these sets")
    assert [row[0] for row in way[1:]] == ["first stage" if s == "retriever" else s for s in results["mean"]]
    for row in way[1:]:
        mean = results["mean"]["retriever" if row[0] == "first stage" else row[0]]
        interval = [mean["gain"], *mean["interval"]] if row[0] != "first stage" else []
        assert [float(x) for x in re.findall(r"[+-]?[\d.]+", row[2])] == pytest.approx(interval, abs=0.051)


def test_nanos_other_numbers_come_from_files_too():
    config = json.loads((NANO / "config.json").read_text())
    text = card("nano").split("\n---\n", 1)[1]
    assert f"{config['vocab_size']:,} pieces of eight languages" in text.replace("\n", " ")
    limit = json.loads((NANO / "tokenizer_config.json").read_text())["model_max_length"]
    assert f"reads pairs of up to {limit} tokens" in text
    recipe = ROOT / "recipes" / "querit-nano"
    trainings = {path.stem: yaml.safe_load(path.read_text()) for path in recipe.glob("[14]_*.yaml")}
    rows = {row[0].strip("`"): row[1] for row in tables(section(text, "What it was trained on"))[0][1:]}
    assert "5_merge" in rows and {name for name in rows if name.startswith("4_adapt")} == {
        f"4_adapt_{Path(model).name.removeprefix('adapted-')}"
        for model in yaml.safe_load((recipe / "5_merge.yaml").read_text())["models"]
    }
    sources = [row[0] for row in tables(section(text, "What it was trained on"))[1][1:]]
    known = yaml.safe_load((TEMPLATES / "querit-reranker-nano.yaml").read_text())["data"]
    assert sources and set(sources) <= {entry["what"] for entry in known}
    for name in set(rows) & set(trainings):
        config = trainings[name]
        assert f"up to {config['max_groups']:,} queries" in rows[name] and f"loss {config['loss']}," in rows[name]


def test_speed_and_precision_come_from_the_benchmarks_files_and_stand_nowhere_without_them(monkeypatch, tmp_path):
    row = {"model": "nano", "dtype": "bfloat16", "way": "pipeline"}
    rows = [row | {"work": work, "pairs_per_second": rate} for work, rate in (("a", 71.2), ("b", 9.6))]
    machine = {"cpu": "Some CPU", "threads": 3, "torch": "9"}
    (tmp_path / "scoring.json").write_text(json.dumps({"machine": machine, "rows": rows}), encoding="utf-8")
    over = {"onnx, int8": {"gain": -1.0, "interval": [-2.0, 0.5]}}
    sets = {name: {"float32": x, "onnx, int8": x - 1, "queries": 4} for name, x in (("x", 50.0), ("y", 60.0))}
    (tmp_path / "precision.json").write_text(json.dumps({"sets": sets, "over_float32": over}), encoding="utf-8")
    monkeypatch.setattr(CARD, "SPEED", tmp_path / "scoring.json")
    monkeypatch.setattr(CARD, "PRECISION", tmp_path / "precision.json")
    told = section(render(NANO, "querit-reranker-nano"), "How fast")
    speed, precision = tables(told)
    assert speed == [["way", "a", "b"], ["pipeline", "71", "10"]] and "Some CPU, 3 threads" in told
    assert precision[1:] == [["float32", "55.0", ""], ["onnx, int8", "54.0", "-1.0 [-2.0, +0.5]"]]
    monkeypatch.setattr(CARD, "SPEED", tmp_path / "none")
    monkeypatch.setattr(CARD, "PRECISION", tmp_path / "none")
    assert "How fast" not in render(NANO, "querit-reranker-nano")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_numbers_are_marked_and_none_is_of_this_project(kind):
    published = yaml.safe_load((TEMPLATES / "published.yaml").read_text())
    text = card(kind)
    assert "publishers' own; none was measured here" in text
    assert "What was run here" in text and "How fast" not in text
    known = {f"{value:.2f}" for result in published["results"].values() for value in result["values"].values()}
    [table] = tables(section(text, "How it scores"))
    cells = {cell.rstrip("†") for row in table[1:] for cell in row[2:]} - {""}
    assert cells == known
    own = published["members"]["4b" if kind == "qwen3" else "a0.4b"]
    inflated = ModelCard(text).data.eval_results
    assert all(result.source_url.endswith("2606.19037") for result in inflated)
    assert ("WebLINXCandidatesReranking" in {r.dataset_name for r in inflated}) == (kind == "deepseek_v3")
    prose = " ".join(section(text, title) for title in ("What it was trained on", "Limits"))
    numbers = {
        x.strip("+,") for x in NUMBER.findall(re.sub(r"https?://\S+|`[^`]*`|arXiv\S+|^\d\. ", "", prose, flags=re.M))
    }
    stated = {str(x) for x in [*published["examples"].values(), published["candidates"], published["bins"]]}
    assert numbers <= stated | {f"{own['max_length']:,}"}


def test_published_facts_are_those_of_mtebs_registry():
    """What is told in two places, the paper's tables and the publishers' own entry in mteb, agrees."""
    published = yaml.safe_load((TEMPLATES / "published.yaml").read_text())
    for name, meta in (("4b", querit_models.Querit_Reranker_4B), ("a0.4b", querit_models.Querit_Reranker_A0_4B)):
        own = published["members"][name]
        assert (own["repo"], own["revision"]) == (meta.name, meta.revision)
        assert (own["width"], own["max_length"]) == (meta.embed_dim, meta.max_tokens)
        assert own["parameters"] == pytest.approx(meta.n_parameters, rel=1e-5)
    assert published["members"]["a0.4b"]["active_parameters"] == meta.n_active_parameters
    # The publishers' means over the six reranking tasks.
    means = {"first": 61.41, "a0.4b": 65.84, "4b": 71.09, "jina": 67.84, "nemotron": 67.78}
    tasks = [result["values"] for name, result in published["results"].items() if name.endswith(("ing", "ual"))]
    assert len(tasks) == 6
    for system, mean in means.items():
        assert sum(values[system] for values in tasks) / 6 == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata(kind):
    data = ModelCard.load(built(kind) / "README.md").data
    assert data.language == ["zh", "en", "es", "fr", "de", "ru", "ko", "ja"]
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "text-ranking", "transformers")
    bases = {
        "qwen3": "Querit/Querit-4B",
        "deepseek_v3": "Querit/Querit",
        "nano": "cross-encoder/ms-marco-MiniLM-L-12-v2",
    }
    assert data.base_model == bases[kind]
    assert {"custom_code", "sentence-transformers"} <= set(data.tags)
    assert data.datasets and data.metrics == ["ndcg_at_10"]
    assert data.model_name.startswith("Querit-Reranker-") and len(data.eval_results) >= 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_is_made_anew_from_the_same_files(kind):
    results = DEV if kind == "nano" else None
    assert render(built(kind), CARDS[kind], results) == card(kind)
    # Of a folder that `querit build` made; one from before it has no sums, and an older card.
    if kind == "nano" and (NANO / SUMS).exists():
        assert (NANO / "README.md").read_text(encoding="utf-8") == render(NANO, CARDS[kind], results), "build again"


def test_other_results_make_another_card(tmp_path):
    results = json.loads((DEV / "results.json").read_text())
    results["sets"]["wikiqa"]["scores"][SYSTEM] = 98.76
    results["mean"][SYSTEM] = {"score": 76.54, "gain": 5.0, "interval": [1.0, 9.0]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = render(built("nano"), "querit-reranker-nano", tmp_path)
    assert "| 98.8 |" in text and "| 76.5 |" in text and "+5.0 [+1.0, +9.0]" in text
    assert "By itself it is better than its first stage" in text
    results["mean"][SYSTEM]["interval"] = [-1.0, 9.0]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "neither clearly better nor clearly worse" in render(built("nano"), "querit-reranker-nano", tmp_path)
    results["sets"]["wikiqa"]["scores"][[*results["settings"]["models"]][-1]] = 87.63
    (tmp_path / "results.json").write_text(json.dumps(results))
    plain = render(built("bert"), None, tmp_path)  # of any model: the last one that was measured
    assert plain.split("\n---\n")[1].startswith("\n# bert\n") and "| 87.6 |" in plain
    del results["mean"][SYSTEM]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"not '{SYSTEM}'"):
        render(built("nano"), "querit-reranker-nano", tmp_path)


def test_without_results_a_card_says_so(tmp_path):
    assert "was not measured" in render(built("nano"), "querit-reranker-nano")
    assert "was not measured" in render(built("bert"))
    with pytest.raises(FileNotFoundError, match=r"no .*results\.json"):
        render(built("bert"), None, tmp_path)


def test_what_is_not_known_is_not_told_and_no_path_is():
    text = render(built("bert"))
    assert 'model="YOUR-NAME/bert"' in text and "--model YOUR-NAME/bert" in text
    for place in (tempfile.gettempdir(), str(Path.home()), str(ROOT)):
        assert f"{place}/" not in text
    for name, version in OLDEST_FOR_BERT.items():
        assert f"{name} {version}" in text
    causal = card("qwen3")
    assert all(f"{name} {version}" in causal for name, version in OLDEST_FOR_OTHERS.items())


def test_the_reliability_of_the_probability_is_told_by_language(tmp_path):
    values = {"n": 1234, "ece": 0.0567, "right_mean": 0.81, "wrong_mean": None, "bins": []}
    (tmp_path / "reliability.json").write_text(json.dumps({"ru-en": values, "de-zh": values | {"n": 19}}))
    [table] = tables(reliability_table(tmp_path / "reliability.json") + "\n")
    assert table[1:] == [["ru-en", "1,234", "0.057", "0.81", ""]]
    assert reliability_table(tmp_path / "none.json") == ""


def test_no_card_is_made_of_data_without_a_licence():
    known = yaml.safe_load((TEMPLATES / "querit-reranker-nano.yaml").read_text())["data"]
    assert all(source["licence"] and source["what"] for source in known)
    told = sources_of(["mlqa-de", "mlqa-en", "jaquad-ja"], known)
    assert [source["folders"] for source in told] == [["jaquad"], ["mlqa"]]
    with pytest.raises(ValueError, match="tells no licence of scraped-en"):
        sources_of(["mlqa-de", "scraped-en"], known)


def test_a_member_is_known_by_its_folder():
    assert members() == sorted(CARDS.values())
    assert member_of("runs/x", Path("a/querit-reranker-4b")) == "querit-reranker-4b"
    assert member_of("hub/querit-reranker-nano", Path("a/b")) == "querit-reranker-nano"
    assert member_of("runs/x", Path("a/b")) is None
    with pytest.raises(ValueError, match=r"no card for 'nano'; there are querit-reranker-4b"):
        render(built("bert"), "nano")


def test_the_stages_of_a_model_are_found_from_its_output(tmp_path):
    configs = {
        "1_score": {"output": "runs/a.parquet", "targets": {"x": {"folders": ["../data/x-en", "runs/mined"]}}},
        "1_train": {"output_dir": "runs/a", "train_data": "runs/a.parquet"},
        "2_mine": {"output_dir": "runs/mined", "documents": "../data/x-de", "targets": ["x"]},
        "5_merge": {"output_dir": "runs/m", "models": ["runs/a", "org/other"], "method": "slerp"},
        "6_other": {"output_dir": "runs/o", "models": ["runs/m"], "documents": "../data/y"},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    stages = stages_of(tmp_path, "runs/m")
    assert [stage.name for stage in stages] == ["1_score", "1_train", "2_mine", "5_merge"]
    assert data_sets(stages) == ["x-en", "x-de"]
    weighed = {"models": ["runs/a", "runs/b"], "method": "linear", "weights": [0.88, 0.12]}
    assert in_words(weighed) == "linear of `a` (0.88), `b` (0.12)"
    trained = {"train_data": "a.parquet", "loss": "distil", "max_length": 64, "learning_rate": 1e-4}
    assert "and the states of `base`" in in_words(trained | {"states_teacher": "runs/base"})
    assert "states" not in in_words(trained)
    with pytest.raises(ValueError, match=r"No YAML of .* writes runs/none"):
        stages_of(tmp_path, "runs/none")
