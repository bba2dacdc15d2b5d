"""A Querit folder -> a folder for another engine: vLLM or ONNX Runtime.

An export is checked before it appears: the engine's prompt must be the model's, and a few probe pairs must score as the
model scores them. What it keeps of the model stands in its export.json and README.md.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from transformers import BertForSequenceClassification

from hub_card.convert import LEGAL_FILES, TOKENIZER_FILES, check_folders, write_json
from hub_card.probes import PROBES
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.pipeline_querit import TextRankingPipeline
from modeling_querit.prompting_querit import EncodedPair
from modeling_querit.scoring_querit import score_pairs
from querit.loading import load

# Largest difference of a float32 logit between two engines, as a share of the largest logit where that is over 1.
TOLERANCE = 1e-4


def export(source: str | Path, output: str | Path, to: str) -> Path:
    """Write the folder `output` of the Querit folder `source` for the engine `to`, "vllm" or "onnx", and return it.

    It appears complete and checked or not at all. Raises FileNotFoundError, FileExistsError or ValueError, naming what
    is wrong and the fix, and ImportError where the packages of the extra `onnx` are missing.
    """
    source, output = Path(source), Path(output)
    check_folders(source, output)
    config = read_querit_config(source)
    if to == "vllm":
        from hub_card.export_vllm import write_vllm as write
    elif to == "onnx":
        from hub_card.export_onnx import write_onnx as write  # needs the extra
    else:
        raise ValueError(f"There is no export to {to!r}: it is vllm or onnx.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        write(source, config, folder)
        os.replace(folder, output)
    return output


def read_querit_config(source: Path) -> dict:
    """config.json as it stands. Raises FileNotFoundError, or ValueError for a folder of another kind."""
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no config.json. Give the folder of a Querit reranker.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Download it again.") from None
    architectures = config.get("architectures") if isinstance(config, dict) else None
    # A `bert` with one label is to everybody the same, whoever saved it.
    readable = {QueritForSequenceClassification.__name__, BertForSequenceClassification.__name__}
    if readable.isdisjoint(architectures or []):
        raise ValueError(
            f"{source} is no Querit reranker: its config.json names {architectures} as architectures. A checkpoint as "
            "published is made one by `querit convert`."
        )
    return config


def load_for_export(source: Path) -> TextRankingPipeline:
    """The ranker in float32, on the CPU."""
    ranker = load(source, device="cpu", dtype="float32")
    # Eager attention: in an exported graph it is a few plain products, and the scores are those of any other.
    ranker.model.set_attn_implementation("eager")
    return ranker


def encode_probes(ranker: TextRankingPipeline) -> tuple[list[tuple[str, str]], list[EncodedPair]]:
    """The probes as texts and as the pipeline encodes them."""
    encoded = ranker.preprocess(list(PROBES.items()))
    texts = [(query, document) for query, documents in PROBES.items() for document in documents]
    return texts, [windows[0] for documents in encoded for windows in documents]


def probe_logits(model, pairs: list[EncodedPair], pad_token_id: int | None) -> np.ndarray:
    return score_pairs(model, pairs, pad_token_id).numpy()


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Of two engines' logits; raises ValueError where it is more than rounding."""
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):  # nan, too, is too much
        raise ValueError(
            f"The export scores otherwise than the model: a logit differs by {difference:.2g}. Nothing was written; "
            "please report it, with the versions of torch and transformers."
        )
    return difference


def config_for_engines(config: dict, architecture: str) -> dict:
    """config.json of a plain classifier with one label: no code of ours is named."""
    ours = ("auto_map", "custom_pipelines", "classifier_pooling")
    return {
        **{key: value for key, value in config.items() if key not in ours},
        "architectures": [architecture],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "num_labels": 1,
    }


def copy_tokenizer_and_licence(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for pattern in LEGAL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def write_record(folder: Path, record: dict, texts: list[tuple[str, str]], logits: np.ndarray, readme: str) -> None:
    """README.md and export.json; the model's own probabilities of the probes are for a check of whatever serves it."""
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    probes = [
        {"query": query, "document": document, "probability": round(float(probability), 6)}
        for (query, document), probability in zip(texts, probabilities, strict=True)
    ]
    write_json(folder / "export.json", {**record, "probes": probes})
    (folder / "README.md").write_text(readme, encoding="utf-8")
