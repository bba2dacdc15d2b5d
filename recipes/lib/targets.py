"""A target of scoring: BEIR folders -> passages that can be retrieved, and queries with what is known of them.

Folders of one target form one pool in which the same `_id` is the same document in another language. Every random
choice depends on the seed, the target's name and the thing chosen, never on the order in which things are read.
"""

import heapq
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from querit.files import appears_whole, file_hash, write_json
from querit.text import joined
from recipes.lib.data import read_jsonl, read_qrels, read_queries
from recipes.lib.documents import stable_hash
from recipes.lib.shards import batched, write_items

PASSAGES = pa.schema({"text": pa.string(), "document": pa.string(), "folder": pa.int32()})
QUERIES = pa.schema(
    {"id": pa.string(), "query": pa.string(), "answers": pa.list_(pa.int64()), "hidden": pa.list_(pa.int64())}
)
BATCH = 1024  # passages of a record batch


@dataclass
class Target:
    folders: list[str]  # BEIR folders
    queries: int | None = None  # at most so many judged queries; all if not given
    documents: int | None = None  # at most so many documents; all if not given
    crops: int = 0  # fragments of passages asked as queries besides
    cross_lingual: bool = False  # the positive is always a twin in another folder, that is language
    split: str | None = None  # of the qrels; the only one if not given


def read_target(name: str, settings: dict) -> Target:
    unknown = set(settings) - {field.name for field in fields(Target)}
    if unknown or not settings.get("folders"):
        raise ValueError(f"Target {name}: it needs `folders`, and knows {[f.name for f in fields(Target)]}.")
    return Target(**settings)


class Passages:
    """Passages in an Arrow file: mapped, so that a row is read without reading the others."""

    def __init__(self, path: Path):
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self.batches)

    def value(self, column: str, row: int):
        return self.batches[row // BATCH].column(column)[row % BATCH].as_py()

    def text(self, row: int) -> str:
        return self.value("text", row)

    def column(self, name: str) -> Iterator:
        """All values in order, read through a buffer: mapped pages would count as this process's memory."""
        with pa.OSFile(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield from reader.get_batch(number).column(name).to_pylist()


def write_passages(rows: Iterable[dict], path: Path) -> Passages:
    with appears_whole(path) as aside, pa.ipc.new_file(str(aside), PASSAGES) as writer:
        for batch in batched(rows, BATCH):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=PASSAGES))
    return Passages(path)


def cut_passages(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], passage_tokens: int, limit: int
) -> list[list[str]]:
    """Cut each text into at most `limit` passages of near-equal length, none over `passage_tokens` tokens."""
    cut = []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
        parts = max(1, -(-len(offsets) // passage_tokens))
        size = -(-len(offsets) // parts) if offsets else 1
        starts = [offsets[i][0] for i in range(0, len(offsets), size)] or [0]
        cut.append([text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)][:limit])
    return cut


def sample_ids(target: Target, seed: str) -> set[str]:
    """`target.documents` ids of all folders: first those that queries ask for, then by hash, whatever the files' order.

    A mined target asks few of its documents: without them its queries would have no positive.
    """
    assert target.documents is not None
    asked = {document for _, _, documents, _ in judged_queries(target) for document in documents}
    heap: list[tuple[bool, int, str]] = []
    kept: set[str] = set()
    for folder in target.folders:
        for row in read_jsonl(folder, "corpus"):
            entry = (row["_id"] in asked, -stable_hash(seed, row["_id"]), row["_id"])
            if row["_id"] in kept:
                continue
            if len(heap) < target.documents:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                kept.remove(heapq.heapreplace(heap, entry)[2])
            else:
                continue
            kept.add(row["_id"])
    return kept


def passages_of(target: Target, tokenizer, passage_tokens: int, limit: int, seed: str) -> Iterator[dict]:
    kept = sample_ids(target, seed) if target.documents else None
    for number, folder in enumerate(target.folders):
        rows = (row for row in read_jsonl(folder, "corpus") if kept is None or row["_id"] in kept)
        for batch in batched(tqdm(rows, desc=f"{Path(folder).name}: passages", unit="document"), 256):
            texts = [joined(row) for row in batch]
            cut = cut_passages(tokenizer, texts, passage_tokens, limit)
            for row, parts in zip(batch, cut, strict=True):
                for part in filter(None, parts):
                    yield {"text": part, "document": row["_id"], "folder": number}


def judged_queries(target: Target) -> Iterator[tuple[str, str, set[str], int]]:
    """(query id, text, relevant document ids, number of its folder)."""
    for number, folder in enumerate(target.folders):
        queries = read_queries(folder)
        seen = Counter(text.casefold() for text in queries.values())
        for query, relevant in read_qrels(folder, target.split).items():
            positives = {document for document, relevance in relevant.items() if relevance > 0}
            text = queries.get(query, "")
            # A heading that stands more than once names no section.
            if positives and text.strip() and seen[text.casefold()] == 1:
                yield query, text, positives, number


def crop(text: str, rng: random.Random) -> str:
    """A fragment of 20 to 240 characters, at most half of a long text; it starts at a word where there are spaces."""
    length = rng.randint(min(20, len(text)), max(20, min(len(text) // 2, 240)))
    start = rng.randint(0, max(0, len(text) - length))
    start = text.rfind(" ", 0, start + 1) + 1 if " " in text[:start] else start
    return text[start : start + length].strip()


def queries_of(target: Target, passages: Passages, seed: str) -> list[dict]:
    """Rows of QUERIES: `answers` may stand as the positive, `hidden` may not be candidates (row numbers)."""
    sources = []
    for number in range(target.crops):
        rng = random.Random(f"{seed} crop {number}")
        source = rng.randrange(len(passages))
        fragment = crop(passages.text(source), rng)
        sources.append(
            (f"crop-{number}", fragment, passages.value("document", source), passages.value("folder", source))
        )
    judged = list(judged_queries(target))
    rows: dict[str, list[tuple[int, int]]] = {document: [] for _, _, document, _ in sources}
    rows |= {document: [] for _, _, positives, _ in judged for document in positives}
    for row, (document, folder) in enumerate(zip(passages.column("document"), passages.column("folder"), strict=True)):
        if document in rows:
            rows[document].append((row, folder))

    def item(query: str, text: str, documents: set[str], folder: int, answered: bool) -> dict:
        hidden = [entry for document in sorted(documents) for entry in rows.get(document, [])]
        answers = [row for row, of in hidden if of != folder or not target.cross_lingual] if answered else []
        return {"id": query, "query": text, "answers": answers, "hidden": [row for row, _ in hidden]}

    known = [entry for entry in judged if any(rows[document] for document in entry[2])]
    known.sort(key=lambda entry: stable_hash(seed, entry[0], entry[1]))
    items = [item(*entry, answered=True) for entry in known[: target.queries]]
    # A fragment finds its own document by its words; what it means shows in another language only.
    crops = (item(query, text, {own}, folder, target.cross_lingual) for query, text, own, folder in sources if text)
    return items + list(crops)


def prepare(
    name: str,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    passage_tokens: int,
    passages_per_document: int,
    seed: int,
    shard_size: int,
) -> None:
    """Write `passages.arrow` and `queries.parquet` of a target, unless they are there, made of the same."""
    inputs = [path for source in target.folders for path in sorted(Path(source).rglob("*")) if path.is_file()]
    key = {
        "target": asdict(target),
        "inputs": [file_hash(path) for path in inputs],
        "tokenizer": stable_hash(tokenizer.backend_tokenizer.to_str()),
        "numbers": [passage_tokens, passages_per_document, seed, shard_size],
    }
    stored = folder / "target.json"
    if stored.exists() and json.loads(stored.read_text(encoding="utf-8")) == key:
        return
    stored.unlink(missing_ok=True)  # killed on the way, the files would be of two configs
    folder.mkdir(parents=True, exist_ok=True)
    seeded = f"{seed} {name}"
    rows = passages_of(target, tokenizer, passage_tokens, passages_per_document, seeded)
    passages = write_passages(rows, folder / "passages.arrow")
    if not len(passages):
        raise ValueError(f"Target {name}: its folders hold no text.")
    items = queries_of(target, passages, seeded)
    write_items(items, folder / "queries.parquet", QUERIES, shard_size)
    write_json(stored, key)
    print(f"{name}: {len(passages):,} passages, {len(items):,} queries", flush=True)
