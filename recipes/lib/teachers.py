"""Teachers: models that say how well passages answer a query.

Any bi-encoder or cross-encoder of sentence-transformers, a Querit reranker, a model behind vLLM's score API, or the
BM25 that finds the candidates. A teacher scores `(queries, rows, passages)`: for each query the passages with these row
numbers, in the model's own measure (cosine, logits of rerankers); `mean_minmax` brings several onto one scale.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from requests.adapters import HTTPAdapter
from sentence_transformers import CrossEncoder
from transformers.utils import cached_file
from urllib3.util import Retry

from modeling_querit.scoring_querit import score_pairs
from querit.loading import load
from recipes.lib.retrieval import BM25, Bm25Index, DenseIndex, Index, encoding_dtype, fingerprint
from recipes.lib.targets import Passages

KINDS = ("bi-encoder", "cross-encoder", "querit", "vllm", BM25)
REQUESTS = 8  # to a server at once
RETRIES = 6  # waiting 0.5, 1, 2, ... seconds, or as long as the server asks
TIMEOUT = 600  # seconds

Texts = list[list[str]]  # per query
Scores = list[np.ndarray]  # per query, float64 `(passages,)`
Scorer = Callable[[list[str], list[list[int]], Passages], Scores]


@dataclass
class Teacher:
    model: str  # folder or Hub id; with a url the name that the server knows it by
    revision: str | None = None  # commit of a model from the Hub
    kind: str = ""  # one of KINDS; told by the model's files if not given
    url: str | None = None  # base of a vLLM server, as http://localhost:8000
    trust_remote_code: bool = False  # for a model with code of its own on the Hub; pin its revision

    def key(self) -> dict[str, Any]:
        """What its scores depend on. Not the url: a server may move."""
        settings = {name: value for name, value in asdict(self).items() if name != "url"}
        if self.url or self.kind == BM25:
            return settings
        return settings | {"files": fingerprint(self.model, self.revision)}


def read_teachers(entries: list[dict]) -> list[Teacher]:
    """The teachers of a config, each with its kind. ValueError, naming the fix, for what is none."""
    known = {field.name for field in fields(Teacher)}
    teachers = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "model" not in entry or set(entry) - known:
            raise ValueError(f"teachers[{number}] must be a mapping with `model` and, where wanted, others of {known}.")
        teacher = Teacher(**entry)
        if teacher.url and not teacher.url.startswith(("http://", "https://")):
            raise ValueError(f"teachers[{number}]: url is {teacher.url!r}; it must start with http:// or https://.")
        if not teacher.kind:
            known_by_name = "vllm" if teacher.url else BM25 if teacher.model == BM25 else ""
            teacher.kind = known_by_name or kind_of(teacher.model, teacher.revision)
        if teacher.kind not in KINDS or (teacher.kind == "vllm") != bool(teacher.url):
            raise ValueError(f"teachers[{number}]: kind is one of {', '.join(KINDS)}, and vllm goes with a url.")
        teachers.append(teacher)
    if not teachers:
        raise ValueError("teachers is empty: name at least one, as `teachers: [{model: FOLDER}]`.")
    return teachers


def kind_of(model: str, revision: str | None) -> str:
    """bi-encoder, cross-encoder or querit, told by the files of a folder or Hub repo."""

    def read(name: str) -> Any:
        path = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None

    config = read("config.json") or {}
    if "text-ranking" in config.get("custom_pipelines", {}):
        return "querit"
    declared = read("config_sentence_transformers.json")
    if declared is not None or read("modules.json") is not None:
        return "cross-encoder" if (declared or {}).get("model_type") == "CrossEncoder" else "bi-encoder"
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        return "cross-encoder"
    raise ValueError(
        f"{model} is neither a sentence-transformers model nor a Querit reranker by its files. Check the path, or say "
        "what it is with `kind: bi-encoder` or `kind: cross-encoder`."
    )


def load_teacher(teacher: Teacher, index: Index | None, batch_size: int) -> Scorer:
    """The teacher, ready to score. A bi-encoder reads the passages' vectors from `index`, which it encoded itself."""
    if teacher.kind == BM25:
        assert isinstance(index, Bm25Index)
        return partial(score_words, index)
    if teacher.kind == "bi-encoder":
        assert isinstance(index, DenseIndex)
        return partial(score_vectors, index)
    load = {"cross-encoder": load_cross_encoder, "querit": load_querit, "vllm": load_vllm}[teacher.kind]
    return partial(score_texts, load(teacher, batch_size))


def score_vectors(index: DenseIndex, queries: list[str], rows: list[list[int]], passages: Passages) -> Scores:
    vectors = index.encode_queries(queries)
    return [index.scores(vector, chosen).astype(np.float64) for vector, chosen in zip(vectors, rows, strict=True)]


def score_words(index: Bm25Index, queries: list[str], rows: list[list[int]], passages: Passages) -> Scores:
    return [index.words.scores(query)[chosen].astype(np.float64) for query, chosen in zip(queries, rows, strict=True)]


def score_texts(
    score: Callable[[list[str], Texts], list[list[float]]],
    queries: list[str],
    rows: list[list[int]],
    passages: Passages,
) -> Scores:
    texts = [[passages.text(row) for row in chosen] for chosen in rows]
    return [np.array(scores, np.float64) for scores in score(queries, texts)]


def load_cross_encoder(teacher: Teacher, batch_size: int) -> Callable[[list[str], Texts], list[list[float]]]:
    # Not bf16 on a CPU: its last layer would round the scores to two or three digits.
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = CrossEncoder(
        teacher.model,
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
        model_kwargs={"dtype": dtype},
    )
    if model.num_labels != 1:
        raise ValueError(f"{teacher.model} gives {model.num_labels} numbers for a pair; a teacher gives one.")

    def score(queries: list[str], texts: Texts) -> list[list[float]]:
        pairs = [(query, text) for query, several in zip(queries, texts, strict=True) for text in several]
        # Logits, whatever the model makes of them: probabilities near 1 would no longer be told apart.
        options = {"batch_size": batch_size, "show_progress_bar": False, "activation_fn": torch.nn.Identity()}
        values = iter(model.predict(pairs, **options).tolist() if pairs else [])
        return [[next(values) for _ in several] for several in texts]

    return score


def load_querit(teacher: Teacher, batch_size: int) -> Callable[[list[str], Texts], list[list[float]]]:
    """Its own code is not run: what is installed here reads the folder. Batches are the pipeline's own."""
    ranker = load(teacher.model, teacher.revision, dtype=encoding_dtype())

    def score(queries: list[str], texts: Texts) -> list[list[float]]:
        encoded = ranker.preprocess(list(zip(queries, texts, strict=True)))
        flat = [windows[0] for query in encoded for windows in query]
        logits = iter(score_pairs(ranker.model, flat, ranker.tokenizer.pad_token_id).tolist())
        return [[next(logits) for _ in several] for several in texts]

    return score


def load_vllm(teacher: Teacher, batch_size: int) -> Callable[[list[str], Texts], list[list[float]]]:
    """POST {url}/score, a request per query; refused connections and overload are waited for and tried again."""
    url = f"{str(teacher.url).rstrip('/')}/score"
    session = requests.Session()
    retry = Retry(RETRIES, backoff_factor=0.5, status_forcelist=(408, 429, 500, 502, 503, 504), allowed_methods=None)
    session.mount(url, HTTPAdapter(max_retries=retry, pool_maxsize=REQUESTS))

    def ask(query: str, texts: list[str]) -> list[float]:
        if not texts:
            return []
        try:
            response = session.post(
                url, json={"model": teacher.model, "text_1": query, "text_2": texts}, timeout=TIMEOUT
            )
        except requests.RequestException as error:
            raise RuntimeError(
                f"{url} does not answer ({error}). Start it with `vllm serve {teacher.model}` and run the stage again: "
                "it goes on where it stopped."
            ) from error
        if not response.ok:
            raise RuntimeError(f"{url}: status {response.status_code}, {response.text[:500]}")
        scores = {entry["index"]: float(entry["score"]) for entry in response.json()["data"]}
        if sorted(scores) != list(range(len(texts))) or not np.isfinite(list(scores.values())).all():
            raise RuntimeError(
                f"{url} gave {len(scores)} scores for {len(texts)} passages, or some that are no number."
            )
        return [scores[index] for index in range(len(texts))]

    def score(queries: list[str], texts: Texts) -> list[list[float]]:
        with ThreadPoolExecutor(REQUESTS) as threads:
            return list(threads.map(ask, queries, texts))

    return score


def mean_minmax(scores: np.ndarray) -> np.ndarray:
    """`(teachers, passages)` of one query -> `(passages,)` in [0, 1].

    Per teacher (s - min) / (max - min), then the mean over teachers. A teacher that finds all passages equal gives 0.
    """
    lowest = scores.min(axis=1, keepdims=True)
    span = scores.max(axis=1, keepdims=True) - lowest
    return ((scores - lowest) / np.where(span > 0, span, 1)).mean(axis=0)
