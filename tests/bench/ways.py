"""The ways to score the same pairs with the same weights. Each loads a folder and gives a function of the requests.

Requests are `[(query, documents), ...]`. A way is what its users would write: texts in, scores out,
tokenising included.
"""

from collections.abc import Callable
from pathlib import Path

import torch

Requests = list[tuple[str, list[str]]]
Run = Callable[[Requests], object]
BATCHES = (1, 4, 8, 32)  # of sentence-transformers: its best settings are the fastest of these, its default is 32


def querit(folder: Path, dtype: torch.dtype, **options) -> Run:
    from transformers import pipeline

    ranker = pipeline("text-ranking", model=str(folder), trust_remote_code=True, dtype=dtype)
    return lambda requests: ranker([{"query": query, "documents": found} for query, found in requests], **options)


def querit_compiled(folder: Path, dtype: torch.dtype) -> Run:
    """torch.compile with dynamic shapes, under the same engine; PyTorch's own attention, which it can fuse."""
    from transformers import pipeline

    ranker = pipeline("text-ranking", model=str(folder), trust_remote_code=True, dtype=dtype)
    ranker.model.set_attn_implementation("sdpa")
    ranker.model.compile(dynamic=True)
    return lambda requests: ranker([{"query": query, "documents": found} for query, found in requests])


def cross_encoder(folder: Path, dtype: torch.dtype, batch_size: int) -> Run:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(
        str(folder), model_kwargs={"dtype": dtype}, device="cuda" if torch.cuda.is_available() else "cpu"
    )

    def run(requests: Requests) -> None:
        pairs = [(query, document) for query, documents in requests for document in documents]
        encoder.predict(pairs, batch_size=batch_size, show_progress_bar=False)

    return run


def plain_loop(folder: Path, dtype: torch.dtype, batch_size: int = 32) -> Run:
    """Pairs in the order given, padded to the longest of each batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(pairs: list[tuple[str, str]]):
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        if tokenizer.chat_template is None:
            return tokenizer(*map(list, zip(*pairs, strict=True)), **options)
        asked = [[{"role": "query", "content": q}, {"role": "document", "content": d}] for q, d in pairs]
        texts = tokenizer.apply_chat_template(asked, tokenize=False)
        return tokenizer(texts, add_special_tokens=False, return_token_type_ids=False, **options)

    def run(requests: Requests) -> None:
        pairs = [(query, document) for query, documents in requests for document in documents]
        with torch.inference_mode():
            for start in range(0, len(pairs), batch_size):
                model(**encode(pairs[start : start + batch_size]).to(model.device)).logits.cpu()

    return run


def published_wrapper(folder: Path, dtype: torch.dtype) -> Run:
    """mteb's copy of the first published wrapper: every pair padded to 4,095 tokens, with a dense mask."""
    from mteb.models.model_implementations.querit_models import QueritWrapper
    from torch.utils.data import DataLoader

    wrapper = QueritWrapper(str(folder), fp_options=dtype, batch_size=1)

    def run(requests: Requests) -> None:
        pairs = [(query, document) for query, documents in requests for document in documents]
        queries, documents = (DataLoader(Rows(list(texts)), batch_size=8) for texts in zip(*pairs, strict=True))
        wrapper.predict(queries, documents, task_metadata=None, hf_split="", hf_subset="")

    return run


class Rows(torch.utils.data.Dataset):
    """What mteb's wrapper reads: batches with `text`, and a data set with `features`."""

    features: tuple[str, ...] = ("text",)

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": self.texts[index]}


def onnx(file: Path) -> Run:
    """ONNX Runtime under the pipeline."""
    from querit import load

    ranker = load(file)
    return lambda requests: ranker([{"query": query, "documents": found} for query, found in requests])
