"""Small BEIR folders and models for the recipes' tests."""

import gzip
import json
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import BertModel

from tests.models_for_tests import tiny_config, tokenizer_of

SUBJECTS = [
    "bread",
    "tide",
    "battery",
    "lemon",
    "puffin",
    "bicycle",
    "violin",
    "glacier",
    "compass",
    "candle",
    "anchor",
    "saddle",
    "kettle",
    "marble",
    "lantern",
    "ladder",
]


def write_beir(
    folder: Path, corpus: dict[str, str], queries: dict[str, str], qrels: dict, packed: bool = False
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = {
        "corpus": [{"_id": key, "title": "", "text": text} for key, text in corpus.items()],
        "queries": [{"_id": key, "text": text} for key, text in queries.items()],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if packed:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    lines = [f"{q}\t{d}\t{score}" for q, docs in qrels.items() for d, score in docs.items()]
    (folder / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n", encoding="utf-8"
    )
    return folder


def small_set(folder: Path, packed: bool = False) -> Path:
    """One question and one answer per subject."""
    corpus = {f"d{i}": f"A {s} is kept dry, and a new {s} is oiled once a year." for i, s in enumerate(SUBJECTS)}
    queries = {f"q{i}": f"how do I look after a {s}" for i, s in enumerate(SUBJECTS)}
    return write_beir(folder, corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(len(SUBJECTS))}, packed)


def tiny_backbone(folder: Path) -> Path:
    BertModel(tiny_config("bert"), add_pooling_layer=False).save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def tiny_retriever(folder: Path) -> Path:
    tiny_backbone(folder)
    transformer = modules.Transformer(str(folder), max_seq_length=64)
    stack = [transformer, modules.Pooling(transformer.get_embedding_dimension(), "mean"), modules.Normalize()]
    SentenceTransformer(modules=stack, prompts={"query": "", "document": ""}, device="cpu").save(str(folder))
    return folder
