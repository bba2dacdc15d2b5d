"""A wheel installed into an environment that cannot see the checkout: every verb works there."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.hub_card.test_convert import published
from tests.loopback_hub import LoopbackHub
from tests.models_for_tests import folder_of
from tests.recipes.folders_for_tests import SUBJECTS

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"hub_card", "modeling_querit", "querit", "recipes", "space_app"}
QUERY = "when does the train leave"
DOCUMENTS = ["The train to Cologne leaves at 7:45.", "Oil the chain.", "图书馆每天早上九点开门。"]
# The site-packages of this interpreter, without what an editable install of the checkout put there.
WHERE = """
import importlib.util, sys
for name in ("querit", "modeling_querit", "recipes", "hub_card", "space_app"):
    print(importlib.util.find_spec(name).submodule_search_locations[0])
print(importlib.util.find_spec("tests") is None, *sys.path, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git tracks or would: setuptools leaves its own folders where it builds."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("hub_card/querit-reranker-nano/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = source.parent / "wheel"
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True, timeout=300)
    [file] = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """What runs `querit ARGUMENTS` of the wheel, in a folder of its own."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", with_pip=False)
    [packages] = (place / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # a wheel of pure Python is installed by unpacking it (PEP 427)
        archive.extractall(packages)
    # All libraries lie beside it, as pip lays them: what walks through that folder meets torch. An editable install of
    # the checkout is known by its finder and its `.pth` file, which stay out of sight.
    for folder in (Path(path) for path in sys.path if Path(path).name == "site-packages"):
        for entry in folder.iterdir():
            kept = entry.suffix != ".pth" and not entry.name.startswith(("__editable__", "querit_reranker-"))
            if kept and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [place / "venv" / "bin" / "python", "-m", "querit", *map(str, arguments)]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "COLUMNS": "200", **environment}
        return subprocess.run(
            command, cwd=elsewhere, env=inherited | settings, capture_output=True, text=True, timeout=600
        )

    run.folder, run.python = elsewhere, place / "venv" / "bin" / "python"
    return run


@pytest.fixture(scope="module")
def built(installed) -> Path:
    done = installed("build", folder_of("bert"), "release", "--max-length", "64")
    assert done.returncode == 0, done.stderr
    return installed.folder / "release"


def succeeds(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == TOP_LEVEL
    assert wheel.stat().st_size < 2_000_000
    for name in (
        "hub_card/templates/LICENSE",
        "hub_card/templates/card.md.jinja",
        "modeling_querit/chat_template.jinja",
        "space_app/style.css",
        "querit/serve/app.py",
        "recipes/querit-nano/results/dev/results.json",
    ):
        assert name in names
    assert any(name.startswith("recipes/") and name.endswith(".txt") for name in names)  # prompts
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "hub_card" / "templates" / "LICENSE").read_bytes()


def test_it_cannot_see_the_checkout(installed):
    done = subprocess.run(
        [installed.python, "-c", WHERE], cwd=installed.folder, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert all("/venv/lib/" in line for line in lines[:5]), lines
    assert lines[5] == "True" and str(ROOT) not in lines


def test_build_verify_and_rank(installed, built):
    assert "a plain card" in succeeds(installed("build", folder_of("bert"), "again", "--max-length", "64"))
    out = succeeds(installed("verify", built))
    assert "wrong" not in out and "CrossEncoder.rank" in out
    (installed.folder / "notes.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8")
    out = succeeds(installed("rank", QUERY, "notes.txt", "--model", "release", "--json"))
    assert {json.loads(line)["document"] for line in out.splitlines()} == set(DOCUMENTS)


def test_without_the_released_nano_its_hub_id_is_named(installed):
    (installed.folder / "notes.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8")
    done = installed("rank", QUERY, "notes.txt")
    assert done.returncode == 1 and "querit/querit-reranker-nano" in done.stderr, done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr and "Traceback" not in done.stderr


def test_convert(installed):
    succeeds(installed("convert", published("qwen3"), "converted"))
    assert (installed.folder / "converted" / "chat_template.jinja").is_file()


@pytest.mark.parametrize("to", ["onnx", "vllm"])
def test_export(installed, built, to):
    source = built if to == "onnx" else folder_of("qwen3")
    succeeds(installed("export", source, f"exported-{to}", "--to", to))
    assert (installed.folder / f"exported-{to}" / "export.json").is_file()


def test_publish_shows_what_would_change(installed, built):
    with LoopbackHub() as hub:
        done = installed(
            "publish", built, "org/tiny", "--dry-run", **hub.environment(installed.folder / "home"), HF_HUB_OFFLINE="0"
        )
    assert "Dry run: nothing was changed." in succeeds(done) and "+ model.safetensors" in done.stdout


def judged_set(folder: Path) -> Path:
    """Two topics, a question about each document."""
    topics = [
        f"the {color} {thing}" for color in ("red", "blue", "old") for thing in ("train", "river", "book", "wheel")
    ]
    (folder / "qrels").mkdir(parents=True)
    rows = [
        {"_id": f"d{i}", "title": "", "text": f"All about {topic}: where {topic} is and why."}
        for i, topic in enumerate(topics)
    ]
    queries = [{"_id": f"q{i}", "text": f"where is {topic}"} for i, topic in enumerate(topics)]
    for name, content in (("corpus", rows), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(topics)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_evaluate(installed, built):
    data = judged_set(installed.folder / "judged")
    out = succeeds(
        installed("evaluate", built, "--data", data, "--retriever", "bm25", "--top-k", "5", "--max-queries", "4")
    )
    assert "release" in out


def test_adapt_comes_to_its_verdict(installed):
    pages = installed.folder / "pages"
    pages.mkdir()
    for subject in SUBJECTS:
        for number, place in enumerate(("in the attic", "by the harbour", "under the stairs", "near the mill")):
            text = f"# The {subject} {place}\n\nThis {subject} stands {place}. It was made {number + 3} years ago.\n"
            (pages / f"{subject}-{number}.md").write_text(text)
    done = installed(
        "adapt", pages, "--output", "adapted", "--model", folder_of("bert"), "--budget-minutes", "600",
        "--queries-per-document", "2",
    )  # fmt: skip
    succeeds(done)
    card = (installed.folder / "adapted" / "README.md").read_text()
    assert "before" in card and (installed.folder / "adapted" / "LICENSE").is_file()


def test_space_writes_its_folder(installed):
    succeeds(installed("space", "my-space"))
    for name in ("app.py", "space_app/views.py", "querit/serve/app.py", "hub_card/templates/querit-reranker-nano.yaml"):
        assert (installed.folder / "my-space" / name).is_file()
    assert json.loads((installed.folder / "my-space" / "space_app" / "measured.json").read_text())["sets"] >= 8


@pytest.mark.parametrize("verb", ["demo", "serve"])
def test_verbs_that_serve_start_up_to_their_help(installed, verb):
    assert "--port" in succeeds(installed(verb, "--help"))
