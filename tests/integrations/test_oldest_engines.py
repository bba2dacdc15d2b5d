"""Releases in the oldest versions of others' engines: equal scores where the card says so, and never random ones.

Each set of versions gets an environment of its own, which pip fills: part of `make integrations`.
"""

import json
import os
import subprocess
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from hub_card.build import build
from hub_card.engines import OLDEST_FOR_BERT, OLDEST_FOR_OTHERS, installed_ranker
from modeling_querit.modeling_querit import OLDEST_TRANSFORMERS
from tests.models_for_tests import folder_of

QUERY = "What does a bicycle need?"
DOCUMENTS = [
    "A bicycle needs oil on the chain.",
    "The lighthouse keeper wrote the weather down.",
    "图书馆每天早上九点开门，周末休息。",
    "",
    "The home team won by two goals. " * 100,  # cut
]
# Versions of each other's time, and what they need and do not pin themselves.
VERSIONS = {
    "2024": {**OLDEST_FOR_BERT, "huggingface-hub": "0.26.5", "numpy": "1.26.4", "fsspec": "2024.12.0"},
    "early 2025": {"sentence-transformers": "3.4.1", "transformers": "4.48.3"},
    "late 2025": {"sentence-transformers": "5.1.2", "transformers": "4.57.6"},
    "first of transformers 5": {"sentence-transformers": "5.3.0", "transformers": "5.0.0"},
    "oldest for others": OLDEST_FOR_OTHERS,
    "oldest for the code": {**OLDEST_FOR_OTHERS, "transformers": OLDEST_TRANSFORMERS},
}
# Probabilities by three ways in, or the error: no score at all is what a loader that knows no head may give.
SCRIPT = """
import json, sys
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder, query, documents = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def classifier():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    encoded = tokenizer([query] * len(documents), documents, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**encoded).logits.sigmoid()[:, 0].tolist()

def cross_encoder():
    ranked = CrossEncoder(folder, device="cpu").rank(query, documents)
    return [float(row["score"]) for row in sorted(ranked, key=lambda row: row["corpus_id"])]

def trusting():
    ranked = pipeline("text-ranking", model=folder, trust_remote_code=True)(query, documents)
    return [row["probability"] for row in sorted(ranked, key=lambda row: row["index"])]

def trusting_classifier():  # as servers load it
    return AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).config.num_labels

found = {}
for way in (classifier, cross_encoder, trusting, trusting_classifier):
    try:
        found[way.__name__] = way()
    except Exception as error:
        found[way.__name__] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=VERSIONS)
def python(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    wanted = [f"{name}=={number}" for name, number in VERSIONS[request.param].items()]
    command = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", f"torch=={version('torch')}"]
    subprocess.run([*command, *wanted], check=True, capture_output=True, timeout=1800)
    return python


def scores(python: Path, folder: Path) -> dict:
    command = [python, "-c", SCRIPT, folder, QUERY, json.dumps(DOCUMENTS)]
    environment = os.environ | {"HF_HOME": str(folder.parent / "cache")}  # the published code is copied there
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def release(tmp_path: Path, kind: str) -> Path:
    return build(folder_of(kind), tmp_path / kind, "---\nlicense: apache-2.0\n---\n", dtype=torch.float32)


def expected(folder: Path) -> list[float]:
    rows = sorted(installed_ranker(folder)(QUERY, DOCUMENTS), key=lambda row: row["index"])
    return [row["probability"] for row in rows]


@pytest.fixture
def versions(request) -> dict[str, str]:
    return VERSIONS[request.node.callspec.params["python"]]


def check_trusting(found: dict, versions: dict[str, str], right: list[float]) -> None:
    if versions["transformers"] == OLDEST_TRANSFORMERS:
        assert found["trusting"] == pytest.approx(right, abs=1e-5)
        assert found["trusting_classifier"] == 1
    else:
        for way in ("trusting", "trusting_classifier"):
            assert f"need transformers {OLDEST_TRANSFORMERS}" in str(found[way])


def test_a_bert_scores_as_ever(python, versions, tmp_path):
    folder = release(tmp_path, "bert")
    found, right = scores(python, folder), expected(folder)
    assert max(right) - min(right) > 0.05
    assert found["classifier"] == pytest.approx(right, abs=1e-5)
    assert found["cross_encoder"] == pytest.approx(right, abs=1e-5)
    check_trusting(found, versions, right)


def test_a_causal_one_scores_right_or_not_at_all(python, versions, tmp_path):
    folder = release(tmp_path, "qwen3")
    found, right = scores(python, folder), expected(folder)
    assert isinstance(found["classifier"], str), found  # no labels: an error, not a random head
    if versions["sentence-transformers"] == OLDEST_FOR_OTHERS["sentence-transformers"]:
        assert found["cross_encoder"] == pytest.approx(right, abs=1e-4)
    else:
        assert isinstance(found["cross_encoder"], str), found
    check_trusting(found, versions, right)
