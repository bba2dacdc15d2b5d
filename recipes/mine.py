"""Write queries for documents that have none: documents in, a BEIR folder out, each query's own document judged 1.

    python -m recipes.mine --config recipes/querit-nano/2_mine_cjk_ja.yaml

A sample of the documents is asked, by every generator (recipes.lib.generators). Filters leave out what is no search
query for just that document; `mine.json` counts each: see `why_dropped` in recipes.lib.queries, and here duplicates,
queries that several documents gave, and the round trip: queries that do not bring their own document back among the
retriever's first; and the documents that a server refused. A run that was stopped goes on; its pieces stand in
`<output_dir>.work`.
"""

import heapq
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm
from trl import TrlParser

from querit.files import appears_whole, content_hash, write_json, write_text
from querit.text import joined, left_out
from recipes.lib.crops import count_terms
from recipes.lib.data import read_jsonl
from recipes.lib.documents import detect_language, read_documents, stable_hash
from recipes.lib.generators import (
    REFUSED,
    CropSettings,
    OpenAISettings,
    QueryWriter,
    all_refused,
    name_of,
    read_settings,
)
from recipes.lib.queries import normalise
from recipes.lib.records import already_made, what_counts
from recipes.lib.shards import read_rows, run_shards, write_items

ITEMS = pa.schema(
    {"row": pa.int64(), "id": pa.string(), "title": pa.string(), "text": pa.string(), "language": pa.string()}
    | {"aside": pa.bool_()}
)  # type: ignore[arg-type]
WRITTEN = pa.schema(
    {"row": pa.int64(), "id": pa.string(), "language": pa.string(), "aside": pa.bool_(), "kind": pa.string()}
    | {"text": pa.string(), "dropped": pa.string()}
)  # type: ignore[arg-type]
QUERIES = WRITTEN.append(pa.field("generator", pa.string()))
TERM_DOCUMENTS = 10_000  # documents that tell how common a word is
LAST = 2**64 - 1  # the largest hash
REPORT = "mine.json"
FILTERS = (
    "echo",
    "cut",
    "surplus",
    "too_short",
    "too_long",
    "copy",
    "language",
    "duplicate",
    "ambiguous",
    "round_trip",
)


@dataclass
class MineArguments:
    documents: str = field(
        metadata={"help": "Folder or file: text, Markdown, HTML, JSON(L), CSV, TSV; each also as .gz."}
    )
    output_dir: str = field(metadata={"help": "BEIR folder to write; it appears only when complete."})
    generators: list[dict] = field(
        metadata={"help": "What writes queries: {kind: crop|local|openai, ...}; keys: see recipes.lib.generators."}
    )
    column: str = field(default="text", metadata={"help": "Column or key that holds the text."})
    sample: int | None = field(default=None, metadata={"help": "Documents asked; all if not given."})
    queries_per_document: int = field(default=3, metadata={"help": "Most queries a generator gives of a document."})
    languages: list[str] | None = field(
        default=None, metadata={"help": "Only documents in these languages (ISO 639-1) are asked."}
    )
    held_aside: float = field(default=0.1, metadata={"help": "Share of asked documents whose queries are for testing."})
    retriever: str = field(
        default="bm25", metadata={"help": "Of the round trip: sentence-transformers folder or Hub id, or bm25."}
    )
    retriever_revision: str | None = field(
        default=None, metadata={"help": "Commit of the retriever, or of the tokenizer, from the Hub."}
    )
    retriever_tokenizer: str | None = field(
        default=None, metadata={"help": "bm25: folder or Hub id whose word pieces are counted."}
    )
    retriever_batch_size: int = field(default=8, metadata={"help": "Documents that the retriever encodes at once."})
    round_trip_top_k: int = field(
        default=10, metadata={"help": "A query is kept if its document is among so many of the retriever's; 0: any is."}
    )
    engine: str = field(default="local", metadata={"help": "local or ray."})
    workers: int = field(default=1, metadata={"help": "Processes or Ray actors, each with its own model."})
    shard_size: int = field(default=64, metadata={"help": "Documents between two points that a run goes on from."})
    seed: int = field(default=0, metadata={"help": "Seed of every choice made here."})


def check(args: MineArguments) -> None:
    if not args.generators:
        raise ValueError("generators is empty; the simplest is [{kind: crop}].")
    for entry in args.generators:
        read_settings(entry)
    for name in ("queries_per_document", "shard_size", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be at least 1.")
    if args.sample is not None and args.sample < 1:
        raise ValueError(f"sample is {args.sample}; it must be at least 1, or null to ask all documents.")
    if not 0 <= args.held_aside < 1:
        raise ValueError(f"held_aside is {args.held_aside}; it must be at least 0 and under 1.")
    if args.round_trip_top_k and args.retriever == "bm25" and not args.retriever_tokenizer:
        raise ValueError("retriever is bm25: give retriever_tokenizer, or round_trip_top_k: 0 for no round trip.")


class Lowest:
    """The `size` lowest of the numbers put in; of all of them if size is None."""

    def __init__(self, size: int | None):
        self.size = size
        self.heap: list[int] = []  # negated

    @property
    def limit(self) -> int:
        """The largest number that belongs to them at this point."""
        return LAST if self.size is None or len(self.heap) < self.size else -self.heap[0] if self.heap else -1

    def put(self, number: int) -> None:
        if self.size is not None and number <= self.limit:
            (heapq.heappush if len(self.heap) < self.size else heapq.heappushpop)(self.heap, -number)


def copy_corpus(args: MineArguments, path: Path, counts: Counter[str]) -> tuple[int, int]:
    """Write corpus.jsonl. -> the largest hash of a document that is asked, and of one whose words are counted.

    Those with the lowest hashes of seed and id are taken, so that neither order nor file form matters.
    """
    asked, counted = Lowest(args.sample), Lowest(TERM_DOCUMENTS)
    with appears_whole(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for document in tqdm(read_documents(args.documents, counts, args.column), desc="documents", unit="document"):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
            number = stable_hash(args.seed, document["_id"])
            counted.put(number)
            if args.sample is not None and number <= asked.limit and language_of(document, args.languages):
                asked.put(number)
            counts["documents"] += 1
    return asked.limit, counted.limit


def language_of(document: dict, languages: list[str] | None) -> str | None:
    """A document's language, or None if it is not among those asked for."""
    language = detect_language(joined(document))
    return language if languages is None or language in languages else None


def asked_documents(folder: Path, limit: int, args: MineArguments, counts: Counter[str]) -> Iterator[dict]:
    for row, document in enumerate(read_jsonl(folder, "corpus")):
        if stable_hash(args.seed, document["_id"]) > limit:
            continue
        language = language_of(document, args.languages)
        if language is None:
            continue
        counts["asked"] += 1
        counts[f"asked_{language}"] += 1
        held_aside = stable_hash(args.seed, "aside", document["_id"]) < args.held_aside * (LAST + 1)
        item = {"row": row, "id": document["_id"], "title": document["title"], "text": document["text"]}
        yield item | {"language": language, "aside": held_aside}


def write_terms(folder: Path, limit: int, args: MineArguments, path: Path) -> None:
    """Count the words of the documents up to this hash, for the crops."""
    chosen = (d for d in read_jsonl(folder, "corpus") if stable_hash(args.seed, d["_id"]) <= limit)
    with appears_whole(path) as aside, open(aside, "wb") as file:
        np.save(file, count_terms(joined(document) for document in tqdm(chosen, desc="words", unit="document")))


def write_queries(args: MineArguments, work: Path) -> list[Path]:
    """Run every generator over the asked documents. -> a folder of shards each."""
    terms, folders = work / "terms.npy", []
    for number, entry in enumerate(args.generators):
        folders.append(work / f"written-{number}")
        read = read_settings(entry)
        generator = {"kind": entry["kind"], **what_counts(asdict(read))}
        if isinstance(read, CropSettings):
            generator["terms"] = content_hash(terms)
        else:
            generator["prompts"] = content_hash(read.prompts)
            generator["model"] = content_hash(read.model) if Path(read.model).is_dir() else read.model
        settings = {"generator": generator, "count": args.queries_per_document, "seed": args.seed}
        make_worker = partial(QueryWriter, entry, args.queries_per_document, args.seed, str(terms.resolve()))
        run_shards(
            make_worker, work / "items.parquet", folders[-1], WRITTEN, settings, args.engine, args.workers,
            description=name_of(entry),
        )  # fmt: skip
        if isinstance(read, OpenAISettings):
            check_answered(name_of(entry), folders[-1], pq.read_metadata(work / "items.parquet").num_rows)
    return folders


def check_answered(name: str, folder: Path, documents: int) -> None:
    """ValueError if a server refused every document. It is to be asked again: the shards are removed."""
    reasons = (row["text"] for row in read_rows(folder) if row["dropped"] == REFUSED)
    reason = next(reasons, None)
    if reason is not None and 1 + sum(1 for _ in reasons) == documents:
        shutil.rmtree(folder)
        raise all_refused(name, documents, reason)


def unique_queries(names: list[str], folders: list[Path], counts: dict[str, Counter[str]]) -> Iterator[dict]:
    """The rows that no filter has dropped, each query once. One that several documents gave tells none of them."""
    source: dict[int, int] = {}  # hash of a query -> row of its document; -1: several, -2: given out
    for folder in folders:
        for row in read_rows(folder):
            if not row["dropped"]:
                key = stable_hash(normalise(row["text"]))
                source[key] = row["row"] if source.get(key, row["row"]) == row["row"] else -1
    for name, folder in zip(names, folders, strict=True):
        for row in read_rows(folder):
            if row["dropped"] == REFUSED:
                if not counts[name][REFUSED]:
                    print(f"{name} refused document {row['id']}: {row['text']}")
                counts[name][REFUSED] += 1
                continue
            counts[name]["written"] += 1
            key = stable_hash(normalise(row["text"]))
            reason = row["dropped"] or {-1: "ambiguous", -2: "duplicate"}.get(source[key], "")
            if reason:
                counts[name][reason] += 1
            else:
                source[key] = -2
                yield row | {"generator": name}


class RoundTrip:
    """A worker of `run_shards`: marks the queries that do not bring their own document back."""

    def __init__(self, index: str, top_k: int):
        from recipes.lib.retrieval import Bm25Index, load_index  # heavy, and not needed without a round trip

        self.index, self.top_k = load_index(index), top_k
        self.is_bm25 = isinstance(self.index, Bm25Index)

    def __call__(self, queries: list[dict]) -> list[dict]:
        scores, rows = self.index.search([query["text"] for query in queries], self.top_k)
        if self.is_bm25:  # where few documents have a word piece of the query, any others fill up the top_k, scored 0
            rows = np.where(scores > 0, rows, -1)
        return [
            query | {"dropped": "" if query["row"] in found else "round_trip"}
            for query, found in zip(queries, rows.tolist(), strict=True)
        ]


def round_trip(args: MineArguments, folder: Path, work: Path) -> Path:
    """-> the folder of shards of the queries, marked."""
    from recipes.lib.retrieval import build_index

    index, output = work / "index", work / "round-trip"
    build_index(
        (joined(document) for document in read_jsonl(folder, "corpus")), args.retriever, index,
        revision=args.retriever_revision, tokenizer=args.retriever_tokenizer, engine=args.engine, workers=args.workers,
        batch_size=args.retriever_batch_size,
    )  # fmt: skip
    settings = {"index": content_hash(index / "index.json"), "top_k": args.round_trip_top_k}
    make_worker = partial(RoundTrip, str(index.resolve()), args.round_trip_top_k)
    run_shards(
        make_worker, work / "queries.parquet", output, QUERIES, settings, args.engine, args.workers,
        description="round trip",
    )  # fmt: skip
    return output


def write_folder(queries: Iterable[dict], folder: Path, counts: dict[str, Counter[str]]) -> Counter[str]:
    """Write queries.jsonl and qrels. -> the number of queries of each split and kind."""
    totals: Counter[str] = Counter()
    shutil.rmtree(folder / "qrels", ignore_errors=True)  # of a run that was stopped here, with other settings
    qrels: dict[str, list[str]] = {"train": [], "test": []}
    with open(folder / "queries.jsonl", "w", encoding="utf-8") as file:
        for query in queries:
            if query["dropped"]:
                counts[query["generator"]][query["dropped"]] += 1
                continue
            counts[query["generator"]]["kept"] += 1
            split, key = "test" if query["aside"] else "train", f"q{sum(map(len, qrels.values()))}"
            line = {"_id": key, "text": query["text"], "document": query["id"]}
            line |= {name: query[name] for name in ("kind", "language", "generator")}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            qrels[split].append(f"{key}\t{query['id']}\t1\n")
            totals.update([split, f"kind_{query['kind']}", f"language_{query['language']}"])
    for split, lines in qrels.items():
        if lines:
            write_text(folder / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))
    return totals


def report(counts: Counter[str], names: list[str], filters: dict[str, Counter[str]], totals: Counter[str]) -> dict:
    def part(counter: Counter[str], prefix: str) -> dict[str, int]:
        return {key.removeprefix(prefix): counter[key] for key in sorted(counter) if key.startswith(prefix)}

    generators: dict[str, dict] = {
        name: {"written": filters[name]["written"], "dropped": {f: filters[name][f] for f in FILTERS}}
        | {"kept": filters[name]["kept"], REFUSED: filters[name][REFUSED]}
        for name in names
    }
    found = {
        "documents": counts["documents"],
        "empty_documents": counts["empty"],
        "documents_asked": counts["asked"],
        "documents_asked_by_language": part(counts, "asked_"),
        "generators": generators,
        "queries": {"train": totals["train"], "test": totals["test"]},
        "queries_by_kind": part(totals, "kind_"),
        "queries_by_language": part(totals, "language_"),
    }
    left = left_out(counts)
    print(f"{counts['documents']:,} documents{f' (left out: {left})' if left else ''}, {counts['asked']:,} asked")
    for name, generator in generators.items():
        dropped = ", ".join(f"{n:,} {f}" for f, n in generator["dropped"].items() if n) or "none"
        print(f"{name}: {generator['written']:,} queries written, {generator['kept']:,} kept; dropped: {dropped}")
        if generator[REFUSED]:
            print(f"{name}: documents refused by the server: {generator[REFUSED]:,}")
    return found


def main(args: MineArguments) -> None:
    out = Path(args.output_dir)
    work = out.with_name(f"{out.name}.work")
    check(args)
    if already_made(out, asdict(args), REPORT):
        shutil.rmtree(work, ignore_errors=True)  # a run may have been stopped just before it
        return
    folder = work / "folder"
    folder.mkdir(parents=True, exist_ok=True)

    counts: Counter[str] = Counter()
    asked_limit, term_limit = copy_corpus(args, folder / "corpus.jsonl", counts)
    items = asked_documents(folder, asked_limit, args, counts)
    if write_items(items, work / "items.parquet", ITEMS, args.shard_size) == 0:
        raise ValueError(f"{args.documents} has no document in {args.languages}; languages: null asks those of any.")
    if any(entry["kind"] == "crop" for entry in args.generators):
        write_terms(folder, term_limit, args, work / "terms.npy")

    names = [name_of(entry) for entry in args.generators]
    names = [name if names.count(name) == 1 else f"{name}-{n}" for n, name in enumerate(names)]
    filters = {name: Counter[str]() for name in names}
    written = unique_queries(names, write_queries(args, work), filters)
    kept = write_items(written, work / "queries.parquet", QUERIES, args.shard_size)
    marked: Iterable[dict] = []
    if kept and args.round_trip_top_k:
        marked = read_rows(round_trip(args, folder, work))
    elif kept:
        batches = pq.ParquetFile(work / "queries.parquet").iter_batches()
        marked = (row for batch in batches for row in batch.to_pylist())
    totals = write_folder(marked, folder, filters)
    summary = report(counts, names, filters, totals)
    if not totals:
        raise ValueError(
            f"No query is left, so {out} is not written. What was written stands in {work}, with the reasons."
        )
    write_json(folder / REPORT, {**summary, "settings": asdict(args)})
    folder.rename(out)
    shutil.rmtree(work)
    print(f"{out}: {totals['train']:,} queries to train with, {totals['test']:,} held aside")


if __name__ == "__main__":
    (arguments,) = TrlParser(MineArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
