"""Fetch data sets of the Hub, at pinned commits, as BEIR folders.

    python -m recipes.fetch --config recipes/querit-4b/0_fetch.yaml

The data sets are laid out as mteb lays them out (subsets `corpus`, `queries`, `default`, or `fr-corpus`, `fr-queries`,
`fr-qrels`), and are read by mteb's own loader. Downloads are kept in the Hub's cache, so a stopped run goes on there.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader
from tqdm import tqdm
from trl import TrlParser

from querit.files import appears_whole, write_json
from recipes.lib.documents import stable_hash
from recipes.lib.records import already_made

KEYS = {"path", "revision", "config", "split", "documents", "documents_only"}
REPORT = "fetch.json"


@dataclass
class FetchArguments:
    output_dir: str = field(metadata={"help": "Folder to write the BEIR folders into."})
    datasets: dict[str, dict] = field(
        metadata={"help": "Name -> {path: Hub id, revision: its commit, config, split, documents, documents_only}."}
    )


def check(name: str, entry: dict) -> None:
    if unknown := entry.keys() - KEYS:
        raise ValueError(f"{name}: unknown keys {sorted(unknown)}; there are {sorted(KEYS)}.")
    if absent := {"path", "revision"} - entry.keys():
        raise ValueError(f"{name}: {sorted(absent)} must be given.")


def chosen_documents(ids: list[str], limit: int | None, judged: set[str]) -> set[str]:
    """All judged documents and, up to the limit, those of the lowest hash: the same ones in any order of the corpus."""
    others = sorted((key for key in ids if key not in judged), key=stable_hash)
    return judged | set(others[: max(0, limit - len(judged))] if limit else others)


def write_beir(entry: dict, folder: Path) -> None:
    """Write one data set; with `documents_only` its queries and judgements stay out: nothing can be learnt of them.

    `documents` is the most documents to keep; judged ones are kept in any case, unless there are `documents_only`.
    """
    split, only = entry.get("split", "test"), entry.get("documents_only", False)
    loader = RetrievalDatasetLoader(entry["path"], entry["revision"], split=split, config=entry.get("config"))
    data = loader.load()
    judged = set() if only else {document for relevant in data["relevant_docs"].values() for document in relevant}
    kept = chosen_documents(data["corpus"]["id"], entry.get("documents"), judged)
    folder.mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row in tqdm(data["corpus"], desc=f"{folder.name}: documents"):
            if row["id"] in kept:
                document = {"_id": row["id"], "title": row.get("title") or "", "text": row["text"]}
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
    queries, relevant_docs = ([], {}) if only else (data["queries"], data["relevant_docs"])
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for row in queries:
            file.write(json.dumps({"_id": row["id"], "text": row["text"]}, ensure_ascii=False) + "\n")
    (folder / "qrels").mkdir()
    with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        writer.writerow(["query-id", "corpus-id", "score"])
        for query, relevant in sorted(relevant_docs.items()):
            writer.writerows([query, document, score] for document, score in sorted(relevant.items()))


def main(args: FetchArguments) -> None:
    for name, entry in args.datasets.items():
        check(name, entry)
    folders = {name: Path(args.output_dir) / name for name in args.datasets}
    for name in [name for name, entry in args.datasets.items() if not already_made(folders[name], entry, REPORT)]:
        entry, folder = args.datasets[name], folders[name]
        with appears_whole(folder) as whole:
            write_beir(entry, whole)
            write_json(whole / REPORT, {"settings": entry})
        print(f"{folder}: {entry['path']} at {entry['revision']}", flush=True)


if __name__ == "__main__":
    (arguments,) = TrlParser(FetchArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
