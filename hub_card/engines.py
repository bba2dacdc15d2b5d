"""The ways in which others load a release: each takes a folder and gives the scores of the same pairs, in [-1, 1].

All run in float32 on the CPU. The second runs the folder's own code, and so does the third where the backbone alone is
transformers' own: look at it first (hub_card.verify).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from modeling_querit.modeling_querit import POOLER_MODEL_TYPE
from modeling_querit.pipeline_querit import TextRankingPipeline
from querit.loading import load

# The oldest versions that score as the newest do, seen by tests/integrations/test_oldest_engines.py.
OLDEST_FOR_BERT = {"sentence-transformers": "3.0.0", "transformers": "4.41.2", "tokenizers": "0.19.1"}
OLDEST_FOR_OTHERS = {"sentence-transformers": "6.0.0", "transformers": "5.17.0"}

Requests = Mapping[str, list[str]]  # query -> its documents; scores come in this order


def installed_ranker(folder: Path) -> TextRankingPipeline:
    return load(folder, device="cpu", dtype="float32")


def installed_pipeline(folder: Path, requests: Requests) -> list[float]:
    return _ranked(installed_ranker(folder), requests)


def trusting_pipeline(folder: Path, requests: Requests) -> list[float]:
    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32, "device": "cpu"}
    return _ranked(pipeline("text-ranking", model=str(folder), **options), requests)  # type: ignore[call-overload]


def auto_model(folder: Path, requests: Requests) -> list[float]:
    """As one who knows transformers only: the tokenizer's own template, a padded batch, the output's `logits`.

    Without trust where the folder is to transformers what it is to us.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    trust = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type != POOLER_MODEL_TYPE
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32)
    scores: list[float] = []
    for query, documents in requests.items():
        if tokenizer.chat_template:
            chats = [
                [{"role": "query", "content": query}, {"role": "document", "content": document}]
                for document in documents
            ]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)
            encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        else:
            encoded = tokenizer([query] * len(documents), documents, padding=True, return_tensors="pt")
        with torch.inference_mode():
            scores += torch.tanh(model.eval()(**encoded).logits.squeeze(-1) / 2).tolist()
    return scores


def predict(folder: Path, requests: Requests) -> list[float]:
    pairs = [(query, document) for query, documents in requests.items() for document in documents]
    # The probability p of relevance is the sigmoid of the log-odds, the score their tanh at the half: 2p - 1.
    return (2 * _cross_encoder(folder).predict(pairs).astype(float) - 1).tolist()


def rank(folder: Path, requests: Requests) -> list[float]:
    model, scores = _cross_encoder(folder), []
    for query, documents in requests.items():
        results = model.rank(query, documents)
        if [row["score"] for row in results] != sorted((row["score"] for row in results), reverse=True):
            raise ValueError("the best do not stand first")
        by_place = {row["corpus_id"]: 2 * float(row["score"]) - 1 for row in results}
        scores += [by_place[place] for place in range(len(documents))]
    return scores


ENGINES: dict[str, Callable[[Path, Requests], list[float]]] = {
    "pipeline with the installed code": installed_pipeline,
    "pipeline with the folder's code": trusting_pipeline,
    "AutoModelForSequenceClassification": auto_model,
    "CrossEncoder.predict": predict,
    "CrossEncoder.rank": rank,
}


def _ranked(ranker: Any, requests: Requests) -> list[float]:
    rankings = ranker([{"query": query, "documents": documents} for query, documents in requests.items()])
    return [row["score"] for ranking in rankings for row in sorted(ranking, key=lambda row: row["index"])]


def _cross_encoder(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(
        str(folder),
        device="cpu",
        trust_remote_code=False,
        local_files_only=True,
        model_kwargs={"dtype": torch.float32},
    )
