"""`pipeline("text-ranking")`: a query and documents in, the documents best first out."""

from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any

import torch
from transformers import Pipeline

from .attention_querit import use_fast_cpu_kernels
from .experts_querit import pack_experts
from .linear_querit import pack_linear_layers
from .modeling_querit import QueritForSequenceClassification
from .prompting_querit import EncodedPair, PromptEncoder, document_text
from .scoring_querit import NonFiniteScoreError, fastest_cpu_dtype, score_pairs
from .workers_querit import Workers, read_devices

LONG_DOCUMENTS = ("truncate", "max_passage")
# Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009) with the constant of the paper.
RRF_K = 60


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
    list of such lists for a list of queries.

    Raises TypeError or ValueError, naming the fix, for input that is none of this.

    Several devices, in place of the constructor's `device`: `devices=["cuda:0", "cuda:1"]`. Each has a process, started
    by the first call and ended by `close()`, by the end of a `with` block, or with the ranker itself. The scores are
    the same; the model here stays on the CPU. As always with processes, a script calls the ranker under
    `if __name__ == "__main__":`. RuntimeError, if one of them dies; the next call starts new ones.
    """

    tokenizer: Any
    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]

    def __init__(self, model: QueritForSequenceClassification, *args, devices: Sequence | None = None, **kwargs):
        several = None if devices is None else read_devices(devices)
        if several:
            if kwargs.get("device") is not None or getattr(model, "hf_device_map", None):
                raise ValueError("devices takes the place of device and device_map: give only one of them.")
            kwargs["device"] = "cpu"
        super().__init__(model, *args, **kwargs)
        if self.tokenizer is None:
            raise ValueError("The folder has no tokenizer; text-ranking needs one.")
        # Weights are stored in 16 bits, in which a CPU may be far slower than in 32. A dtype asked for is kept.
        on_cpu = "cpu" in {device.type for device in several or [self.device]}
        slow = on_cpu and self.model.dtype.itemsize == 2
        if slow and kwargs.get("dtype", "auto") == "auto" and self.model.dtype != fastest_cpu_dtype():
            self.model.float()  # never down: that would round the buffers that stay in float32, like RoPE's
        if on_cpu:
            use_fast_cpu_kernels(self.model)
        if on_cpu and not several:  # several processes hold the weights once, as they are
            pack_linear_layers(self.model)
            pack_experts(self.model)
        self._encoders: dict[int, PromptEncoder] = {}
        self.workers = Workers(self.model, several) if several else None

    def close(self) -> None:
        """End the processes of several devices. The next call starts new ones."""
        if self.workers is not None:
            self.workers.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def max_length(self) -> int:
        """The longest pair that the model takes, in tokens."""
        limits = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None))
        return int(min(limit for limit in limits if limit))

    def _sanitize_parameters(
        self, instruction=None, max_length=None, long_documents=None, batch_tokens=None, shared_prefix=None, top_k=None,
        threshold=None, return_documents=None, first_stage_scores=None, **unknown,
    ):  # fmt: skip
        if unknown:
            raise TypeError(f"text-ranking has no option {', '.join(unknown)}.")
        for name, value in (("top_k", top_k), ("max_length", max_length), ("batch_tokens", batch_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if threshold is not None and (
            isinstance(threshold, bool) or not isinstance(threshold, Real) or not -1 <= threshold <= 1
        ):
            raise ValueError(f"threshold is a score, in [-1, 1], not {threshold!r}.")
        for name, value in (("shared_prefix", shared_prefix), ("return_documents", return_documents)):
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, not {value!r}.")
        if long_documents is not None and long_documents not in LONG_DOCUMENTS:
            raise ValueError(f"long_documents must be one of {', '.join(LONG_DOCUMENTS)}, not {long_documents!r}.")
        if instruction is not None and (not isinstance(instruction, str) or not instruction.strip()):
            raise ValueError("instruction must be a non-empty string; leave it out for the model's own prompt.")

        def given(**options):
            return {name: value for name, value in options.items() if value is not None}

        return (
            given(instruction=instruction, max_length=max_length, long_documents=long_documents),
            given(batch_tokens=batch_tokens, shared_prefix=shared_prefix),
            given(
                top_k=top_k,
                threshold=threshold,
                return_documents=return_documents,
                first_stage_scores=first_stage_scores,
            ),
        )

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

    def preprocess(  # type: ignore[override]
        self,
        requests: list[tuple[str, list]],
        instruction: str | None = None,
        max_length: int | None = None,
        long_documents: str = "truncate",
    ) -> list[list[list[EncodedPair]]]:
        """requests -> encoded[query][document][window]."""
        limit = self.max_length
        if max_length is not None and max_length > limit:
            raise ValueError(f"max_length={max_length} is over what this model takes: {limit} tokens.")
        encoder = self._encoder(max_length or limit)
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

    def _forward(  # type: ignore[override]
        self, encoded, batch_tokens: int | None = None, shared_prefix: bool | None = None
    ) -> torch.Tensor:
        places = [(q, d) for q, query in enumerate(encoded) for d, windows in enumerate(query) for _ in windows]
        pairs = [pair for query in encoded for windows in query for pair in windows]
        options = (self.tokenizer.pad_token_id, batch_tokens, shared_prefix)
        try:
            if self.workers is not None:
                return self.workers.score_pairs(pairs, *options)
            return score_pairs(self.model, pairs, *options)
        except NonFiniteScoreError as error:
            q, d = places[error.index]
            raise ValueError(
                f"Document {d} of query {q} (counting from 0) scored {error.value} in {error.dtype}: load the model "
                "with dtype=torch.float32, or check its weights."
            ) from error

    def postprocess(  # type: ignore[override]
        self,
        model_outputs,
        top_k: int | None = None,
        threshold: float | None = None,
        return_documents: bool = True,
        first_stage_scores: list[list[float]] | None = None,
    ) -> list[list[dict[str, Any]]]:
        requests, encoded, logits = model_outputs
        values = iter(logits.double().tolist())
        rankings = []
        for number, ((_, documents), per_document) in enumerate(zip(requests, encoded, strict=True)):
            results = []
            for index, (document, windows) in enumerate(zip(documents, per_document, strict=True)):
                scored = [(next(values), -place) for place, _ in enumerate(windows)]
                logit, place = max(scored)
                best = windows[-place]
                probability = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)).item()
                score = torch.tanh(torch.tensor(logit / 2, dtype=torch.float64)).item()
                result = {"index": index, "score": score, "probability": probability, "logit": logit}
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

    def _encoder(self, max_length: int) -> PromptEncoder:
        if max_length not in self._encoders:
            self._encoders[max_length] = PromptEncoder(self.tokenizer, max_length)
        return self._encoders[max_length]


def read_requests(query: Any, documents: Any) -> tuple[list[tuple[str, list]], bool]:
    """The forms of a call -> [(query, documents), ...] and whether it was a single one."""
    if isinstance(query, str):
        if documents is None:
            raise TypeError("documents are missing: call ranker(query, documents).")
        return [_read_request(query, documents)], True
    if documents is not None:
        raise TypeError(
            f"The query must be a string, not {type(query).__name__}. For several queries give a list of "
            '{"query": ..., "documents": [...]}.'
        )
    if isinstance(query, Mapping):
        return [_read_mapping(query, "")], True
    if isinstance(query, Sequence):
        return [_read_mapping(request, f" {number}") for number, request in enumerate(query)], False
    raise TypeError(
        f'Expected (query, documents), {{"query", "documents"}} or a list of such dicts, not {type(query).__name__}.'
    )


def _read_mapping(request: Any, number: str) -> tuple[str, list]:
    if not isinstance(request, Mapping):
        raise TypeError(f'Request{number} must be a dict {{"query", "documents"}}, not {type(request).__name__}.')
    keys = [key for key in ("documents", "texts") if key in request]
    if "query" not in request or len(keys) != 1:
        raise ValueError(f'Request{number} must have "query" and either "documents" or "texts"; it has {[*request]}.')
    return _read_request(request["query"], request[keys[0]])


def _read_request(query: Any, documents: Any) -> tuple[str, list]:
    if not isinstance(query, str):
        raise TypeError(f"The query must be a string, not {type(query).__name__}.")
    if not query.strip():
        raise ValueError("The query is empty.")
    if isinstance(documents, str | Mapping) or not isinstance(documents, Sequence):
        raise TypeError(f"documents must be a list of strings or dicts, not {type(documents).__name__}.")
    for index, document in enumerate(documents):
        try:
            document_text(document)
        except (TypeError, ValueError) as error:
            raise type(error)(f"documents[{index}]: {error}") from None
    return query, list(documents)


def check_first_stage(scores: Any, requests: list[tuple[str, list]]) -> list[list[float]]:
    try:
        rows = [[float(score) for score in row] for row in scores]
    except (TypeError, ValueError):
        rows = []
    if [len(row) for row in rows] != [len(documents) for _, documents in requests] or not all(
        isfinite(score) for row in rows for score in row
    ):
        raise ValueError("first_stage_scores must hold one finite number for each document, in the same order.")
    return rows


def fuse(results: list[dict], first_stage: list[float]) -> list[dict]:
    """Reciprocal rank fusion of the model's ranking and the first stage's, best first."""
    order = sorted(range(len(first_stage)), key=lambda index: -first_stage[index])
    first_rank = {index: rank for rank, index in enumerate(order, 1)}
    for rank, result in enumerate(results, 1):
        result["fused_score"] = 1 / (RRF_K + rank) + 1 / (RRF_K + first_rank[result["index"]])
    return sorted(results, key=lambda result: -result["fused_score"])
