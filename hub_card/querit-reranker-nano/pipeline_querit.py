"""`pipeline("text-ranking")`: a query and documents in, the documents best first out."""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from math import isfinite, nan
from numbers import Integral, Real
from typing import Any

import torch
from transformers import Pipeline, PreTrainedModel
from transformers.dynamic_module_utils import init_hf_modules

from .prompting_querit import EncodedPair, PromptEncoder, document_text
from .scoring_querit import NonFiniteScoreError, fastest_cpu_dtype, score_pairs

LONG_DOCUMENTS = ("truncate", "max_passage")
RRF_K = 60  # of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009), as in the paper
COUNT = (Integral, lambda value: value >= 1, "a whole number of at least 1")
SWITCH = (bool, lambda value: True, "True or False")
OPTIONS: dict[str, tuple[type, Callable, str]] = {
    "top_k": COUNT,
    "threshold": (Real, lambda value: -1 <= value <= 1, "a score, in [-1, 1]"),
    "return_documents": SWITCH,
    "instruction": (str, str.strip, "a non-empty string, or left out for the model's own prompt"),
    "max_length": COUNT,
    "long_documents": (str, LONG_DOCUMENTS.__contains__, f"one of {', '.join(LONG_DOCUMENTS)}"),
    "batch_tokens": COUNT,
    "shared_prefix": SWITCH,
    "first_stage_scores": (object, lambda value: True, ""),  # see `check_first_stage`
}


class TextRankingPipeline(Pipeline):
    """Ranks documents for a query.

    >>> ranker = pipeline("text-ranking", model="querit/querit-reranker-nano", trust_remote_code=True)
    >>> ranker("Where do puffins nest?", ["In burrows on sea cliffs.", "In the north, days are short."], top_k=1)

    Call it with `(query, documents)`, with a dict `{"query", "documents"}` or `{"query", "texts"}` (the Hub's schema),
    or with a list of such dicts. A document is a string or a mapping `{"title", "text", ...}`, returned as it came.

    Options, of a call or, as defaults, of the constructor:
        top_k (int): keep the first so many.
        threshold (float in [-1, 1]): keep only documents with at least this score.
        return_documents (bool, True): give each document back in its result.
        instruction (str): what relevance means here, in place of the prompt's own words.
        max_length (int): most tokens of a pair; the model's own limit if not given.
        long_documents: "truncate" cuts a document that does not fit; "max_passage" scores overlapping windows of it and
            takes the best, telling which as `passage` (characters `[start, end)` of the text, title included).
        batch_tokens (int): most tokens computed at once; by the device and the model if not given.
        shared_prefix (bool): compute a query's prompt once for all its documents; where it pays if not given.
        first_stage_scores (list of float, or of such lists for many queries): the retriever's scores. The order then is
            the reciprocal rank fusion of both rankings, told as `fused_score`; `score` stays the model's own.

    Returns, for one query, a list of dicts, best first, equal ones in the order given: `index` (place among the
    documents given), `score` in [-1, 1], `probability` of relevance (the same on [0, 1]), `document`, `truncated`. A
    list of such lists for a list of queries. Raises TypeError or ValueError, naming the fix, for any other input.
    """

    tokenizer: Any
    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel, *args, **kwargs):
        if not hasattr(model, "is_causal"):  # where Querit's class refuses a folder, transformers tries its plain one
            raise ValueError(
                f"{model.name_or_path} was loaded as a plain {type(model).__name__}, not as a Querit reranker. Its "
                "weights must be in model.safetensors, never pickled; load it with trust_remote_code=True."
            )
        super().__init__(model, *args, **kwargs)
        if self.tokenizer is None:
            raise ValueError("The folder has no tokenizer; text-ranking needs one.")
        # Weights are stored in 16 bits, in which a CPU may be far slower than in 32. A dtype asked for is kept, and so
        # is the caller's model. Never down to 16: that would round the buffers that stay in float32, like RoPE's.
        if self.device.type == "cpu" and self.model.dtype.itemsize == 2 and kwargs.get("dtype", "auto") == "auto":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # those of OpenMP, once started, a process that forks later would wait for
            if self.model.dtype != fastest_cpu_dtype():
                self.model = copy.deepcopy(self.model).float()
            torch.set_num_threads(threads)
        self._encoder: PromptEncoder | None = None

    def __reduce_ex__(self, protocol):
        return object.__new__, (_RemoteClass(type(self)),), self.__getstate__()

    @property
    def max_length(self) -> int:
        """The longest pair that the model takes, in tokens."""
        limits = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None))
        return int(min(limit for limit in limits if limit))

    def _sanitize_parameters(self, **options):
        if unknown := [name for name in options if name not in OPTIONS]:
            raise TypeError(
                f"text-ranking has no option {', '.join(unknown)}. It has {', '.join(OPTIONS)}: batches are counted in "
                "tokens. Several devices are an option of querit.load."
            )
        options = {name: value for name, value in options.items() if value is not None}
        for name, value in options.items():
            kind, is_right, wanted = OPTIONS[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not is_right(value):
                raise ValueError(f"{name} must be {wanted}, not {value!r}.")
        groups = (("instruction", "max_length", "long_documents"), ("batch_tokens", "shared_prefix"))
        preprocess, forward = ({name: options.pop(name) for name in group if name in options} for group in groups)
        return preprocess, forward, options

    def __call__(self, query=None, documents=None, **options) -> list:  # type: ignore[override]
        # Not the base class's loop over single inputs: pairs of many queries fill batches together.
        requests, single = read_requests(query, documents)
        preprocess, forward, postprocess = self._sanitize_parameters(**options)
        postprocess = {**self._postprocess_params, **postprocess}
        first_stage = postprocess.pop("first_stage_scores", None)
        if first_stage is not None:
            postprocess["first_stage_scores"] = check_first_stage([first_stage] if single else first_stage, requests)
        encoded = self.preprocess(requests, **{**self._preprocess_params, **preprocess})
        with self.device_placement():
            logits = self._forward(encoded, **{**self._forward_params, **forward})
        rankings = self.postprocess((requests, encoded, logits), **postprocess)
        return rankings[0] if single else rankings

    def preprocess(self, requests, instruction=None, max_length=None, long_documents="truncate"):  # type: ignore[override]
        """[(query, documents)] -> encoded[query][document][window], of `EncodedPair`."""
        limit = self.max_length
        if max_length is not None and max_length > limit:
            raise ValueError(f"max_length={max_length} is over what this model takes: {limit} tokens.")
        encoder = self.encoder(max_length or limit)
        encoded = []
        for query, documents in requests:
            texts = [document_text(document) for document in documents]
            pairs = [[pair] for pair in encoder.encode(query, texts, instruction)] if texts else []
            if long_documents == "max_passage":
                for index, (text, windows) in enumerate(zip(texts, pairs, strict=True)):
                    if windows[0].truncated:
                        pairs[index] = encoder.encode_passages(query, text, instruction)
            encoded.append(pairs)
        return encoded

    def _forward(self, encoded, batch_tokens=None, shared_prefix=None) -> torch.Tensor:  # type: ignore[override]
        places = [(q, d) for q, query in enumerate(encoded) for d, windows in enumerate(query) for _ in windows]
        pairs = [pair for query in encoded for windows in query for pair in windows]
        try:
            return self.score_pairs(pairs, self.tokenizer.pad_token_id, batch_tokens, shared_prefix)
        except NonFiniteScoreError as error:
            q, d = places[error.index]
            raise ValueError(
                f"Document {d} of query {q} (counting from 0) scored {error.value} in {error.dtype}: load the model "
                "with dtype=torch.float32, or check its weights."
            ) from error

    def postprocess(self, outputs, top_k=None, threshold=None, return_documents=True, first_stage_scores=None):  # type: ignore[override]
        requests, encoded, logits = outputs
        values = iter(logits.double().tolist())
        rankings = []
        for number, ((_, documents), per_document) in enumerate(zip(requests, encoded, strict=True)):
            results = []
            for index, (document, windows) in enumerate(zip(documents, per_document, strict=True)):
                logit, place = max((next(values), -place) for place, _ in enumerate(windows))
                half, best = torch.tensor(logit / 2, dtype=torch.float64), windows[-place]
                probability = torch.sigmoid(2 * half).item()
                result = {"index": index, "score": half.tanh().item(), "probability": probability, "logit": logit}
                if return_documents:
                    result["document"] = document
                result["truncated"] = best.truncated
                if len(windows) > 1:
                    result["passage"] = best.span
                results.append(result)
            # By the logit: at the ends of its range the score's last bits would tie.
            results.sort(key=lambda result: -result.pop("logit"))
            if first_stage_scores is not None:
                results = fuse(results, first_stage_scores[number])
            if threshold is not None:
                results = [result for result in results if result["score"] >= threshold]
            rankings.append(results[:top_k])
        return rankings

    def score_pairs(self, pairs: Sequence[EncodedPair], *options) -> torch.Tensor:
        """As `scoring_querit.score_pairs`. A subclass may compute elsewhere."""
        return score_pairs(self.model, pairs, *options)

    def encoder(self, max_length: int) -> PromptEncoder:
        self._encoder = self._encoder or PromptEncoder(self.tokenizer, self.max_length)
        return self._encoder.limited(max_length)


class _RemoteClass:
    """Pickles as the class itself, once the folder is importable in which transformers keeps remote code."""

    def __init__(self, kind: type | None):
        self.kind = kind

    def __reduce__(self):
        return (operator.getitem, ((_RemoteClass(None), self.kind), 1)) if self.kind else (init_hf_modules, ())


def read_requests(query: Any, documents: Any) -> tuple[list[tuple[str, list]], bool]:
    """The forms of a call -> [(query, documents), ...] and whether it was a single one."""
    if documents is not None or isinstance(query, str):
        return [_read_request({"query": query, "documents": documents})], True
    if isinstance(query, Mapping):
        return [_read_request(query)], True
    if isinstance(query, Iterable):
        return [_read_request(request, f" {number}") for number, request in enumerate(query)], False
    raise TypeError(
        f'Expected (query, documents), {{"query", "documents"}} or a list of such dicts, not {type(query).__name__}.'
    )


def _read_request(request: Any, number: str = "") -> tuple[str, list]:
    if not isinstance(request, Mapping):
        raise TypeError(f'Request{number} must be a dict {{"query", "documents"}}, not {type(request).__name__}.')
    if sorted(request) not in (["documents", "query"], ["query", "texts"]):
        raise ValueError(
            f'Request{number} must have "query" and either "documents" or "texts", and no more; it has {[*request]}. '
            "Options, like top_k, are given to the call."
        )
    query, documents = request["query"], request.get("documents", request.get("texts"))
    if not isinstance(query, str):
        raise TypeError(f"The query must be a string, not {type(query).__name__}; for several give a list of requests.")
    if not query.strip():
        raise ValueError("The query is empty.")
    if isinstance(documents, str | Mapping) or not isinstance(documents, Sequence):
        named = isinstance(documents, str | Mapping) or hasattr(documents, "columns")  # a list would be of names
        fix = ": give list(documents)" if isinstance(documents, Iterable) and not named else ""
        raise TypeError(f"documents must be a list of strings or dicts, not {type(documents).__name__}{fix}.")
    for index, document in enumerate(documents):
        try:
            document_text(document)
        except (TypeError, ValueError) as error:
            raise type(error)(f"documents[{index}]: {error}") from None
    return query, list(documents)


def check_first_stage(scores: Any, requests: list[tuple[str, list]]) -> list[list[float]]:
    try:
        given = [row for row in scores if not isinstance(row, str | bytes | Mapping | Set)]
        rows = [[nan if isinstance(score, bool) else float(score) for score in row] for row in given]
    except (TypeError, ValueError, OverflowError):
        rows = []
    if [len(row) for row in rows] != [len(documents) for _, documents in requests] or not all(
        isfinite(score) for row in rows for score in row
    ):
        raise ValueError("first_stage_scores must be a list of one finite number for each document, in the same order.")
    return rows


def fuse(results: list[dict], first_stage: list[float]) -> list[dict]:
    """Reciprocal rank fusion of the model's ranking and the first stage's, best first."""
    order = sorted(range(len(first_stage)), key=lambda index: -first_stage[index])
    first_rank = {index: rank for rank, index in enumerate(order, 1)}
    for rank, result in enumerate(results, 1):
        result["fused_score"] = 1 / (RRF_K + rank) + 1 / (RRF_K + first_rank[result["index"]])
    return sorted(results, key=lambda result: -result["fused_score"])
