"""What is measured, each a system that mteb searches with: BM25, a retriever, a Querit reranker, a given run."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import mteb
import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mteb.models import ModelMeta, SearchEncoderWrapper, SentenceTransformerEncoderWrapper
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hub_card.convert import check_weight_files
from modeling_querit.pipeline_querit import fuse
from modeling_querit.scoring_querit import fastest_cpu_dtype, score_pairs
from querit import bm25
from querit.files import file_hash
from querit.loading import check_exists, load
from querit.text import joined
from recipes.lib.judged_sets import part_name

Run = dict[str, dict[str, float]]  # query id -> document id -> score
Runs = dict[str, Run]  # part of a task -> run

MODEL_FILES = {".safetensors", ".json", ".jinja", ".model"}  # those that scores depend on; not the card
PAIRS_AT_ONCE = 64  # queries of shorter lists fill batches together; of longer ones each stands alone


@dataclass(frozen=True)
class Weights:
    """A model's place, and what tells it from another one at the same place."""

    path: str  # folder or Hub repo
    revision: str | None  # commit of a Hub repo
    fingerprint: str


def find_weights(path: str, revision: str | None = None) -> Weights:
    """A folder's fingerprint is the hash of its files; a Hub repo's, its commit.

    A repo's commit is `revision`, or stands behind its name: REPO@COMMIT. Without either it is the one that mteb's
    registry pins or, for a model not there, the repo's newest.
    """
    folder = Path(path)
    if folder.is_dir():
        names = {file.relative_to(folder): file for file in folder.rglob("*") if file.suffix in MODEL_FILES}
        names = {name: file for name, file in names.items() if not re.match(r"\.|checkpoint-", name.as_posix())}
        if not any(name.suffix == ".safetensors" for name in names):
            raise ValueError(f"{path} holds no model: it has no *.safetensors.")
        hashes = "\n".join(f"{name.as_posix()} {file_hash(names[name])}" for name in sorted(names))
        return Weights(path, None, hashlib.sha256(hashes.encode()).hexdigest())
    if revision is None and "@" in path:
        path, _, revision = path.partition("@")
    check_exists(path)
    if revision is None:
        with suppress(KeyError):
            revision = mteb.get_model_meta(path).revision
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        try:
            revision = HfApi().model_info(path, revision=revision).sha
        except (HfHubHTTPError, HFValidationError, httpx.TransportError, OSError) as error:
            raise ValueError(
                f"{path} is no folder here, and the Hub does not tell the commit of a repo of that name ({error}). "
                "Mind the path; offline, pin the commit."
            ) from error
    return Weights(path, revision, f"{path}@{revision}")


def check_reranker(weights: Weights) -> None:
    """Tells a folder that is no Querit reranker before hours of first stage, not after."""
    if weights.revision is not None:
        return
    check_weight_files(Path(weights.path))
    keys: set[str] = set()
    for file in Path(weights.path).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys.update(opened.keys())
    if keys.isdisjoint({"head.weight", "classifier.weight"}):
        raise ValueError(
            f"{weights.path} is no Querit reranker: its weights have no head.weight and no classifier.weight. A "
            "checkpoint as published is made one by `querit convert`."
        )


def strict(query: str, scores: dict[str, float]) -> dict[str, float]:
    """The documents best first, scored by their place alone: n for the best, 1 for the last.

    Equal scores stand in an order that depends on a hash of the ids. Left to itself, trec_eval orders them by the ids,
    which in many a set tell the relevant documents, and takes scores as equal that are so in float32.
    """

    def key(document: str) -> tuple[float, str]:
        return -scores[document], hashlib.sha256(f"{query}\0{document}".encode()).hexdigest()

    order = sorted(scores, key=key)
    return {document: float(len(order) - rank) for rank, document in enumerate(order)}


class StrictOrder:
    """Another system without its ties, for mteb. `runs` keeps what it found."""

    def __init__(self, system: Any):
        self.system = system
        self.mteb_model_meta = system.mteb_model_meta
        self.runs: Runs = {}

    def index(self, corpus: Any, **kwargs: Any) -> None:
        self.system.index(corpus, **kwargs)

    def search(self, queries: Any, *, hf_split: str, hf_subset: str, **kwargs: Any) -> Run:
        found = self.system.search(queries, hf_split=hf_split, hf_subset=hf_subset, **kwargs)
        run = {query: strict(query, scores) for query, scores in found.items()}
        self.runs[part_name(hf_subset, hf_split)] = run
        return run


class BM25:
    """`querit.bm25` as mteb searches with it.

    mteb's own BM25 looks for a task's candidates among the corpus's best only, and loses the others.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.mteb_model_meta = ModelMeta.create_empty({"name": "querit/bm25"})

    def index(self, corpus: Any, **kwargs: Any) -> None:
        self.ids = list(corpus["id"])
        titles = corpus["title"] if "title" in corpus.column_names else [""] * len(self.ids)
        documents = zip(titles, corpus["text"], strict=True)
        self.words = bm25.BM25(self.tokenizer, (joined({"title": title, "text": text}) for title, text in documents))
        # Documents without a word of the query tie at 0: at the cut their place in the corpus must not count.
        self.lot = np.random.default_rng(0).permutation(len(self.ids))

    def search(self, queries: Any, *, top_k: int, top_ranked: Any = None, **kwargs: Any) -> Run:
        rows = {document: row for row, document in enumerate(self.ids)}
        run: Run = {}
        for query, text in zip(queries["id"], queries["text"], strict=True):
            scores = self.words.scores(text)
            if top_ranked is None:
                kept = min(top_k, len(scores))
                best = np.flatnonzero(scores >= np.partition(scores, -kept)[-kept])
                best = best[np.lexsort((self.lot[best], -scores[best]))[:kept]]
            else:
                best = np.array([rows[document] for document in top_ranked.get(query, ())], dtype=int)
            run[query] = {self.ids[row]: float(scores[row]) for row in best}
        return run


def load_retriever(weights: Weights) -> SearchEncoderWrapper:
    """As mteb runs it, instructions included, if it is a repo of mteb's registry, else as sentence-transformers do."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else fastest_cpu_dtype()
    options: dict[str, Any] = {"model_kwargs": {"dtype": dtype}}
    if weights.revision is not None:
        with suppress(KeyError):
            meta = mteb.get_model_meta(weights.path)
            pinned = meta.model_copy(update={"revision": weights.revision})
            return SearchEncoderWrapper(pinned.load_model(**options))  # type: ignore[arg-type]
    model = SentenceTransformer(weights.path, revision=weights.revision, **options)
    return SearchEncoderWrapper(SentenceTransformerEncoderWrapper(model))


class QueritCrossEncoder:
    """A Querit folder or repo as mteb's `CrossEncoderProtocol`, by the code installed here: no remote code is run.

    `max_length` is in tokens, the model's own limit if None. It has no `encode`: mteb would take it for an encoder.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        max_length: int | None = None,
        dtype: str = "auto",
    ):
        self.ranker = load(model_name, revision, device=device, dtype=dtype)
        self.max_length = max_length
        self.mteb_model_meta = ModelMeta.create_empty({"name": model_name, "revision": revision})

    def predict(self, inputs1: Any, inputs2: Any, **kwargs: Any) -> np.ndarray:
        """Log-odds of relevance of (query, document) pairs, float32 `(pairs,)`; the score in [-1, 1] is tanh(x / 2).

        Pairs of a query, which mteb gives one after the other, are scored together: their prompt is computed once.
        """
        batches = zip(inputs1, inputs2, strict=True)
        pairs = (
            pair for queries, documents in batches for pair in zip(queries["text"], documents["text"], strict=True)
        )
        logits = [torch.empty(0)]
        with tqdm(total=len(inputs1.dataset), desc="rerank", unit="pair") as bar:
            for requests in whole_queries(pairs, PAIRS_AT_ONCE):
                encoded = self.ranker.preprocess(requests, max_length=self.max_length)
                flat = [windows[0] for query in encoded for windows in query]
                logits.append(score_pairs(self.ranker.model, flat, self.ranker.tokenizer.pad_token_id))
                bar.update(len(flat))
        return torch.cat(logits).numpy()


def whole_queries(pairs: Iterable[tuple[str, str]], least: int) -> Iterator[list[tuple[str, list[str]]]]:
    """Pairs -> lists of (query, its documents), each list, but for the last one, of at least so many pairs."""
    requests: list[tuple[str, list[str]]] = []
    for query, group in groupby(pairs, key=lambda pair: pair[0]):
        requests.append((query, [document for _, document in group]))
        if sum(len(documents) for _, documents in requests) >= least:
            yield requests
            requests = []
    if requests:
        yield requests


class GivenRuns:
    """Runs that stand already, to be measured."""

    def __init__(self, runs: Runs, name: str):
        self.runs = runs
        self.mteb_model_meta = ModelMeta.create_empty({"name": name})

    def index(self, corpus: Any, **kwargs: Any) -> None:
        pass

    def search(self, queries: Any, *, hf_split: str, hf_subset: str, **kwargs: Any) -> Run:
        run = self.runs[part_name(hf_subset, hf_split)]
        return {query: run[query] for query in queries["id"]}


def fuse_runs(reranked: Run, first: Run) -> Run:
    """Reciprocal rank fusion, as the pipeline does it, of a reranker's run and the first stage's over its documents."""
    fused: Run = {}
    for query, scores in reranked.items():
        ids = sorted(scores, key=lambda document: -scores[document])
        results = fuse([{"index": place} for place in range(len(ids))], [first[query][document] for document in ids])
        fused[query] = {ids[result["index"]]: result["fused_score"] for result in results}
    return fused
