"""The folder that is uploaded as a Space, and the command that serves the page here."""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from typer.testing import CliRunner

import querit
from tests.models_for_tests import folder_of

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def pins(path):
    found = re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_the_metadata_and_requirements_are_those_tried_here():
    card = SpaceCard.load(ROOT / "space_app" / "README.md").data.to_dict()
    constraints = pins(ROOT / "constraints.txt")
    assert card["sdk"] == "gradio" and card["sdk_version"] == constraints["gradio"]
    assert (ROOT / "space_app" / card["app_file"]).exists() and len(card["short_description"]) <= 60
    required = pins(ROOT / "space_app" / "requirements.txt")
    assert required and required.items() <= constraints.items()


def serve(command, folder, port):
    """-> the page's text, and what the server printed, after ending it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": str(port)}
    environment["QUERIT_SPACE_MODELS"] = f"Tiny={folder_of('bert')}"
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            return page.read().decode(), line
    finally:
        process.terminate()
        process.wait(20)


def test_the_exported_folder_runs_by_itself(tmp_path):
    result = CliRunner().invoke(querit.app, ["space", str(tmp_path / "space")])
    assert result.exit_code == 0 and "hf upload" in result.output
    names = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    assert {"app.py", "README.md", "requirements.txt", "querit.py", "modeling_querit/pipeline_querit.py"} <= names
    assert "space_app/templates/ranking.html" in names and not any("__pycache__" in name for name in names)
    # -P and the check: nothing of this checkout is imported.
    check = (
        "import sys, runpy; sys.path.insert(0, '.'); import querit, modeling_querit, space_app.look as look; "
        "assert all(m.__file__.startswith(sys.argv[1]) for m in (querit, modeling_querit, look)); "
        "runpy.run_path('app.py', run_name='__main__')"
    )
    port = free_port()
    page, line = serve([sys.executable, "-P", "-c", check, str(tmp_path)], tmp_path / "space", port)
    assert "Querit Reranker" in page and f"http://127.0.0.1:{port}" in line
    again = CliRunner().invoke(querit.app, ["space", str(tmp_path / "space")])
    assert again.exit_code == 1 and "is there already" in again.output


def test_the_command_serves_the_page_and_says_where(tmp_path):
    port = free_port()
    page, line = serve([sys.executable, "-m", "querit", "demo", "--port", str(port)], ROOT, port)
    assert "Querit Reranker" in page and line.startswith(f"Open http://127.0.0.1:{port}")


@pytest.mark.parametrize("entry", ["=x", "a=b=", "a="])
def test_models_that_are_none_are_said(entry):
    result = CliRunner().invoke(querit.app, ["demo", "--model", entry, "--model", entry])
    assert result.exit_code == 1 and "NAME=SOURCE" in result.output


def test_a_taken_port_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(
            querit.app, ["demo", "--model", f"Tiny={folder_of('bert')}", "--port", str(taken.getsockname()[1])]
        )
    assert result.exit_code == 1 and "port" in result.output.lower() and "Traceback" not in result.output
