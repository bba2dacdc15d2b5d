"""An index over passages: the nearest ones of each query, by a sentence-transformers model or by BM25.

`build_index` writes a folder, `load_index` opens it again, in another process too. Vectors are searched exactly, a
block of the file at a time: they never stand in memory together. That is torch's topk, on a GPU where there is
one: faiss-cpu's flat search took 3 to 4 times as long, and may crash beside torch on macOS (faiss-wheels issue 73);
sentence-transformers' `semantic_search` takes all vectors at once. BM25's postings are built in memory, some 30 bytes
for every different word piece of a passage (bm25s builds an index of all passages in one go), and mapped from their
file when searched.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from querit import bm25
from querit.files import appears_whole, content_hash, file_hash, write_json
from recipes.lib.shards import Rows, read_rows, run_shards, write_items

BM25 = "bm25"
TEXTS = pa.schema({"text": pa.string()})
VECTORS = pa.schema({"vector": pa.binary()})  # float32
SHARD_SIZE = 4096  # passages encoded between two points that a stopped run goes on from
BLOCK_BYTES = 2**26  # of vectors compared at once


def fingerprint(model: str, revision: str | None) -> str:
    """What a model's name stands for: the hash of a folder's files, or the Hub id at its revision."""
    return content_hash(model) if Path(model).is_dir() else f"{model}@{revision or 'main'}"


def load_encoder(settings: dict) -> SentenceTransformer:
    return SentenceTransformer(
        settings["retriever"],
        revision=settings["revision"],
        trust_remote_code=settings["trust_remote_code"],
        model_kwargs={"dtype": getattr(torch, settings["dtype"])},
    )


def encode(encoder: SentenceTransformer, texts: list[str], batch_size: int, queries: bool = False) -> torch.Tensor:
    """-> float32 `(texts, hidden)` on the CPU, of length 1 unless the model compares by dot product."""
    method = encoder.encode_query if queries else encoder.encode_document
    vectors = method(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False).float().cpu()
    return vectors if encoder.similarity_fn_name == "dot" else F.normalize(vectors, dim=1)


class Encode:
    """The worker of `run_shards` that encodes passages."""

    def __init__(self, settings: dict, batch_size: int):
        self.encoder, self.batch_size = load_encoder(settings), batch_size

    def __call__(self, rows: Rows) -> Rows:
        vectors = encode(self.encoder, [row["text"] for row in rows], self.batch_size).numpy()
        return [{"vector": vector.tobytes()} for vector in vectors]


class Index(ABC):
    """The passages of a folder that `build_index` wrote, numbered from 0 in the order they were given."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings

    def __len__(self) -> int:
        return self.settings["passages"]

    @abstractmethod
    def search(self, queries: list[str], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """-> scores, float32, and rows, int64, each `(queries, min(top_k, passages))`, best first."""


class DenseIndex(Index):
    """Exact search by cosine (or dot product, where the model says so)."""

    encoded: tuple[list[str], torch.Tensor] | None = None  # the queries encoded last, and their vectors

    @cached_property
    def encoder(self) -> SentenceTransformer:
        return load_encoder(self.settings)

    @property
    def vectors(self) -> np.ndarray:
        # Mapped anew each time: the pages that a block touched are given back with it.
        return np.load(self.folder / "vectors.npy", mmap_mode="r")

    def encode_queries(self, queries: list[str]) -> torch.Tensor:
        """-> float32 `(queries, hidden)` on the CPU, not to be changed: asked for the same again, they are given again.

        A retriever that is a teacher too first searches with queries, then scores what was found.
        """
        if self.encoded is None or self.encoded[0] != queries:
            self.encoded = list(queries), encode(self.encoder, queries, self.settings["batch_size"], queries=True)
        return self.encoded[1]

    def search(self, queries: list[str], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.search_vectors(self.encode_queries(queries), top_k)

    def search_vectors(self, queries: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, of queries `(queries, hidden)` that `encode_queries` made."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        queries = queries.to(device)
        scores = torch.empty(len(queries), 0, device=device)
        rows = torch.empty(len(queries), 0, dtype=torch.long, device=device)
        size = max(1, BLOCK_BYTES // (4 * queries.shape[1]))
        for start in range(0, len(self), size):
            block = torch.from_numpy(np.array(self.vectors[start : start + size])).to(device)
            found = queries @ block.T
            best, places = found.topk(min(top_k, len(block)), dim=1)
            scores, rows = torch.cat([scores, best], 1), torch.cat([rows, places + start], 1)
            scores, order = scores.topk(min(top_k, scores.shape[1]), dim=1)
            rows = rows.gather(1, order)
        return scores.cpu().numpy(), rows.cpu().numpy()

    def scores(self, query: torch.Tensor, rows: list[int]) -> np.ndarray:
        """-> float32 `(rows,)` of one query `(hidden,)` that `encode_queries` made."""
        return (torch.from_numpy(self.vectors[rows]) @ query).numpy()


class Bm25Index(Index):
    """See `querit.bm25`."""

    @cached_property
    def words(self) -> bm25.BM25:
        return bm25.BM25.load(self.folder / "bm25", load_tokenizer(self.settings))

    def search(self, queries: list[str], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        kept = min(top_k, len(self))
        scores, rows = np.empty((len(queries), kept), np.float32), np.empty((len(queries), kept), np.int64)
        for number, query in enumerate(queries):
            found = torch.from_numpy(self.words.scores(query)).topk(kept)
            scores[number], rows[number] = found.values.numpy(), found.indices.numpy()
        return scores, rows


def load_tokenizer(settings: dict) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(settings["tokenizer"], revision=settings["revision"])


def write_bm25(texts: Path, folder: Path, settings: dict) -> None:
    batches = tqdm(pq.ParquetFile(texts).iter_batches(1024), desc="word pieces", unit="batch")
    rows = (text for batch in batches for text in batch.column("text").to_pylist())
    bm25.BM25(load_tokenizer(settings), rows).save(folder / "bm25")


def write_vectors(shards: Path, path: Path, passages: int) -> None:
    """The vectors of all shards, in one .npy file that can be mapped."""
    with appears_whole(path) as aside, open(aside, "wb") as file:
        for number, row in enumerate(read_rows(shards)):
            if number == 0:
                shape = (passages, len(row["vector"]) // 4)
                header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(row["vector"])


def build_index(
    passages: Iterable[str],
    retriever: str,
    folder: Path,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    engine: str = "local",
    workers: int = 1,
    batch_size: int = 8,
) -> Index:
    """Index passages in `folder`; a stopped run goes on, and a finished folder of the same passages is opened again.

    `retriever` is a sentence-transformers folder or Hub id, or "bm25", which takes the word pieces of `tokenizer` (a
    folder or Hub id); `revision` is the commit of the one or the other. Encoding runs in shards on `engine` with
    `workers`. Small batches are the fastest on a CPU, whose cache they stay in; a GPU wants larger ones.
    """
    if retriever == BM25 and tokenizer is None:
        raise ValueError("retriever is bm25: give tokenizer, a folder or Hub id whose word pieces are to be counted.")
    folder = Path(folder)
    texts, shards = folder / "texts.parquet", folder / "shards"
    count = write_items(({"text": text} for text in passages), texts, TEXTS, SHARD_SIZE)
    if count == 0:
        raise ValueError("There are no passages to index.")
    model = retriever if retriever != BM25 else str(tokenizer)
    settings = {"retriever": retriever, "revision": revision, "tokenizer": tokenizer, "passages": count}
    settings |= {"trust_remote_code": trust_remote_code, "batch_size": batch_size, "dtype": encoding_dtype()}
    settings |= {"model": fingerprint(model, revision), "texts": file_hash(texts)}
    stored = folder / "index.json"
    if not stored.exists() or json.loads(stored.read_text(encoding="utf-8")) != settings:
        stored.unlink(missing_ok=True)
        if retriever == BM25:
            write_bm25(texts, folder, settings)
        else:
            make_worker = partial(Encode, settings, batch_size)
            run_shards(make_worker, texts, shards, VECTORS, settings, engine, workers, description="encode passages")
            write_vectors(shards, folder / "vectors.npy", count)
        write_json(stored, settings)
    shutil.rmtree(shards, ignore_errors=True)
    texts.unlink()
    return load_index(folder)


def encoding_dtype() -> str:
    """What this machine says it multiplies, not what a trial finds faster: a resumed run must choose the same again."""
    cpu = torch.cpu.get_capabilities()
    bf16 = torch.cuda.is_available() or cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16")
    return "bfloat16" if bf16 else "float32"


def load_index(folder: str | Path) -> Index:
    """Open what `build_index` wrote; models are loaded when first asked."""
    stored = Path(folder) / "index.json"
    if not stored.exists():
        raise FileNotFoundError(f"{folder} holds no finished index: run build_index again, it goes on where it was.")
    settings = json.loads(stored.read_text(encoding="utf-8"))
    return (Bm25Index if settings["retriever"] == BM25 else DenseIndex)(Path(folder), settings)
