import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from sentence_transformers import CrossEncoder
from transformers import pipeline

from hub_card import release as module
from hub_card.release import release
from tests.models_for_tests import folder_of

QUERY, DOCUMENTS = "rain", ["Rain fell all night.", "The train stops twice.", "oil"]


def test_a_release_holds_16_bits_code_licence_and_its_card(tmp_path):
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "stale.txt").write_text("of an earlier release")
    release(folder_of("bert"), folder, "# Nano of the tides\n", max_length=32)
    assert not (folder / "stale.txt").exists()
    assert (folder / "README.md").read_text() == "# Nano of the tides\n"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert not list(folder.rglob("*.bin")) and (folder / "LICENSE").exists()
    ranker = pipeline("text-ranking", model=str(folder), dtype=torch.float32, trust_remote_code=True)
    assert ranker.max_length == 32
    expected = [row["probability"] for row in sorted(ranker(QUERY, DOCUMENTS), key=lambda row: row["index"])]
    encoder = CrossEncoder(str(folder), model_kwargs={"dtype": torch.float32})
    assert encoder.predict([(QUERY, document) for document in DOCUMENTS]).tolist() == pytest.approx(expected, abs=2e-3)


def test_a_release_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "nano"
    release(folder_of("bert"), folder, "card")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(module, "LICENSE", tmp_path / "no-licence")
    with pytest.raises(FileNotFoundError):
        release(folder_of("bert"), folder, "another card")
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["nano"]


def test_the_command_puts_the_table_into_the_card(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "results.md").write_text("| set | nano |\n|---|---|\n| tides | 61.5 |\n")
    command = [sys.executable, "-m", "hub_card.release", str(folder_of("bert")), str(tmp_path / "nano")]
    subprocess.run([*command, "--results", str(results)], check=True, timeout=120)
    card = (tmp_path / "nano" / "README.md").read_text()
    assert "| tides | 61.5 |" in card and "{results}" not in card
