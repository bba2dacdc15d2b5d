"""The folder that is uploaded as a Space, as its receiver runs it, and the command that serves the page here."""

import os
import re
import socket
import subprocess
import sys
import venv
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import pytest
from gradio_client import Client
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from playwright.sync_api import expect
from typer.testing import CliRunner

import querit
from querit import cli
from tests.models_for_tests import folder_of

ROOT = Path(__file__).parents[2]
QUERY = "When does the tide rise?"
DOCUMENTS = ["Feed the starter with flour.", "Trains leave at ten.", "The tide rises twice a day.", "Salt is dried."]


def requirements(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_the_metadata_and_requirements_are_those_tried_here():
    card = SpaceCard.load(ROOT / "space_app" / "README.md").data.to_dict()
    constraints = {canonicalize_name(r.name): str(r.specifier) for r in requirements(ROOT / "constraints.txt")}
    assert card["sdk"] == "gradio" and f"=={card['sdk_version']}" == constraints["gradio"]
    assert (ROOT / "space_app" / card["app_file"]).exists() and len(card["short_description"]) <= 60
    required = {canonicalize_name(r.name): str(r.specifier) for r in requirements(ROOT / "space_app/requirements.txt")}
    assert required and required.items() <= constraints.items()


@contextmanager
def served(command, folder, **variables):
    """-> the address that the server prints. It is asked at once: no waiting for it to be ready."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", **variables}
    errors = Path(folder) / "errors.txt"
    with errors.open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            line = process.stdout.readline()
            found = re.match(r"Open (http://127\.0\.0\.1:\d+/) ", line)
            assert found, line + errors.read_text()
            yield found[1]
        finally:
            process.terminate()


def environment_of(required, folder):
    """The python of a new environment that has these and what they require, and nothing else: not this checkout."""
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    waiting, seen = list(required), set()
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        key = (canonicalize_name(requirement.name), *extras)
        if key in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        installed = distribution(requirement.name)
        for top in {Path(file).parts[0] for file in installed.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(installed.locate_file(top))
        for inner in map(Requirement, installed.requires or []):
            if not inner.marker or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                waiting.append(inner)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """-> the exported folder, and the address where it runs with its requirements alone."""
    place = tmp_path_factory.mktemp("space")
    result = CliRunner().invoke(cli.app, ["space", str(place / "space")])
    assert result.exit_code == 0 and "hf upload" in result.output
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    gradio = SpaceCard.load(place / "space" / "README.md").data.to_dict()["sdk_version"]
    required = [*requirements(place / "space" / "requirements.txt"), Requirement(f"gradio=={gradio}")]
    python = environment_of(required, place / "environment")
    alone = subprocess.run([python, "-c", "import querit"], cwd=elsewhere, capture_output=True, text=True)
    assert "No module named 'querit'" in alone.stderr
    models = f"Tiny={folder_of('bert')}"
    command = [python, place / "space" / "app.py"]
    with served(command, elsewhere, QUERIT_SPACE_MODELS=models, GRADIO_SERVER_PORT="0") as address:
        yield place / "space", address


@pytest.fixture(scope="module")
def expected():
    """The order of a ranker made here."""
    order = [row["index"] for row in querit.load(folder_of("bert"))(QUERY, DOCUMENTS)]
    assert order != sorted(order)
    return order


def test_the_exported_folder_holds_code_and_neither_weights_nor_leftovers(space):
    names = {path.relative_to(space[0]).as_posix() for path in space[0].rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "space_app/templates/ranking.html"} <= names
    assert "space_app/measured.json" in names  # what the tab About says of the release
    assert not any(name.endswith((".safetensors", ".writing")) for name in names)
    assert sum((space[0] / name).stat().st_size for name in names if "__pycache__" not in name) < 1_000_000
    again = CliRunner().invoke(cli.app, ["space", str(space[0])])
    assert again.exit_code == 1 and "is there already" in again.output


def test_the_exported_folder_ranks_for_programs(space, expected):
    client = Client(space[1], verbose=False)
    found = client.predict(QUERY, DOCUMENTS, api_name="/rank")
    assert [row["index"] for row in found] == expected


def test_the_exported_folder_ranks_on_its_page(space, expected, browser):
    page = browser.new_page()
    page.goto(space[1])
    page.locator("#query textarea, #query input").first.fill(QUERY)
    page.locator("#documents textarea").fill("\n".join(DOCUMENTS))
    page.locator("#rank").click()
    expect(page.locator("#results .q-row")).to_have_count(len(DOCUMENTS))
    shown = [text.strip() for text in page.locator("#results .q-row .q-text").all_text_contents()]
    assert shown == [DOCUMENTS[index] for index in expected]
    page.close()


def test_the_command_serves_the_page_and_says_where(tmp_path, expected):
    command = [sys.executable, "-m", "querit", "demo", "--model", f"Tiny={folder_of('bert')}", "--port", "0"]
    with served(command, tmp_path, PYTHONPATH=str(ROOT)) as address:
        found = Client(address, verbose=False).predict(QUERY, DOCUMENTS, api_name="/rank")
        assert [row["index"] for row in found] == expected


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["=x/y"], "NAME=SOURCE"),
        (["a="], "NAME=SOURCE"),
        (["a=b/c", "a=b/d"], "its name is taken"),
        (["/nonexistent"], "There is no folder /nonexistent"),
        (["Mine=missing-folder"], "There is no folder missing-folder"),
    ],
)
def test_models_that_are_none_are_refused_at_once(entries, words):
    result = CliRunner().invoke(cli.app, ["demo", *(part for entry in entries for part in ("--model", entry))])
    assert result.exit_code == 1 and words in result.output and "Traceback" not in result.output


def test_a_taken_port_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli.app, ["demo", "--model", f"Tiny={folder_of('bert')}", "--port", str(port)])
    assert result.exit_code == 1 and f"port {port}" in result.output and "--port" in result.output
