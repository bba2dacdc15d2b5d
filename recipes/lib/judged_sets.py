"""What rankers are measured on, as tasks of mteb: its own, by name, and BEIR folders on disk."""

import copy
import difflib
import hashlib
import random
import re
import sys
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.get_tasks import TASK_LIST

from querit.files import file_hash
from recipes.lib.data import qrels_files, read_corpus, read_qrels, read_queries, read_top_ranked

METRIC = re.compile(r"(ndcg|map|mrr|recall|precision|hit_rate)_at_(\d+)")  # main scores that have a value per query
# What papers call a set -> mteb's task. MIRACL's whole corpora have some 100 million passages: too many to encode.
ALIASES = {"MIRACL": "MIRACLRetrievalHardNegatives"}
# What an encoder that takes instructions is told of a folder, as Qwen3-Embedding words it.
ENCODER_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class BeirFolder(AbsTaskRetrieval):
    """A BEIR folder as a task of mteb, scored by nDCG@10. `top_ranked.jsonl`, where it stands, gives the candidates.

    Without a `split` it is measured on the only one that its qrels have, and on `test` where that is among several.
    Raises FileNotFoundError for a split that is not there, or where none is given and several are there but no `test`.
    """

    def __init__(self, folder: str | Path, split: str | None = None):
        self.folder = Path(folder)
        if not self.folder.exists():
            raise FileNotFoundError(f"{folder} does not exist.")
        if not self.folder.is_dir():
            raise NotADirectoryError(
                f"{folder} is a file. Give a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv."
            )
        splits = [file.stem for file in qrels_files(folder)]
        if split is None and "test" in splits:
            split = "test"
        if split is not None and split not in splits:
            raise FileNotFoundError(f"{folder}/qrels has no {split}.tsv; its splits are {', '.join(splits) or 'none'}.")
        qrels = read_qrels(folder, split)
        self.qrels = {query: documents for query, documents in qrels.items() if max(documents.values()) > 0}
        files = [*sorted(self.folder.glob("[!.]*.jsonl*")), *qrels_files(folder)]
        hashes = "\n".join(f"{file.name} {file_hash(file)}" for file in files)
        self.metadata = TaskMetadata(
            name=self.folder.resolve().name,
            description=f"BEIR folder {self.folder.resolve().name}",
            prompt={"query": ENCODER_INSTRUCTION},  # type: ignore[arg-type]
            dataset={"path": str(folder), "revision": hashlib.sha256(hashes.encode()).hexdigest()},
            type="Retrieval",
            category="t2t",
            eval_splits=[split or "test"],
            eval_langs=["mul-Zyyy"],
            main_score="ndcg_at_10",
        )
        super().__init__()

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        corpus, listed = read_corpus(self.folder), read_top_ranked(self.folder)
        queries = {query: text for query, text in sorted(read_queries(self.folder).items()) if query in self.qrels}
        if not queries:
            raise ValueError(f"{self.folder}: no query of queries.jsonl has a relevant document in qrels.")
        relevant = {query: {doc for doc, score in self.qrels[query].items() if score > 0} for query in queries}
        lost = sum(documents.isdisjoint(corpus) for documents in relevant.values())
        if lost == len(queries):
            raise ValueError(
                f"{self.folder}: no document that qrels calls relevant is in corpus.jsonl. Are its ids written alike?"
            )
        if lost:
            print(
                f"{self.folder}: of {lost} of {len(queries)} queries no relevant document is in corpus.jsonl; they "
                "count as 0.",
                file=sys.stderr,
            )
        for query in queries if listed is not None else ():
            candidates = (listed or {}).get(query)
            if not candidates:
                raise ValueError(f"{self.folder}/top_ranked.jsonl has no candidates for query {query}.")
            if unknown := [document for document in candidates if document not in corpus]:
                raise ValueError(f"{self.folder}/top_ranked.jsonl, query {query}: {unknown[0]} is not in the corpus.")
        data = {
            "corpus": Dataset.from_dict({"id": list(corpus), "text": list(corpus.values())}),
            "queries": Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
            "relevant_docs": {query: self.qrels[query] for query in queries},
            "top_ranked": listed,
        }
        self.dataset = {"default": {self.eval_splits[0]: data}}  # type: ignore[dict-item]
        self.data_loaded = True


def tasks_named(name: str) -> list[AbsTask]:
    """mteb's task of that name, or of a benchmark its reranking tasks (its retrieval tasks, where it has no such)."""
    try:
        return [mteb.get_task(ALIASES.get(name, name))]
    except KeyError:
        pass
    try:
        tasks = list(mteb.get_benchmark(name).tasks)
    except KeyError:
        known = [task.metadata.name for task in TASK_LIST] + [benchmark.name for benchmark in mteb.get_benchmarks()]
        within = [other for other in known if name.lower() in other.lower()]
        near = list(dict.fromkeys([*within[:4], *difflib.get_close_matches(name, known, 4, 0.5)]))
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise ValueError(f"mteb has no task or benchmark {name!r}.{hint} A folder of your own goes to data.") from None
    reranking = [task for task in tasks if task.metadata.type == "Reranking"]
    return reranking or [task for task in tasks if task.metadata.type == "Retrieval"]


def judged_sets(names: list[str], folders: list[str], split: str | None = None) -> dict[str, list[AbsTaskRetrieval]]:
    """Name of a set -> its tasks: one, or those that an aggregate of mteb (CQADupStack) takes the mean of."""
    found: list[AbsTask] = [task for name in names for task in tasks_named(name)]
    found += [BeirFolder(folder, split) for folder in folders]
    if not found:
        raise ValueError("Nothing to measure on: name tasks of mteb (tasks) or BEIR folders (data).")
    sets: dict[str, list[AbsTaskRetrieval]] = {}
    for task in found:
        name = task.metadata.name
        if name in sets:
            raise ValueError(f"Two sets are named {name}: name a task once, and give folders different names.")
        sets[name] = []
        for member in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
            if not isinstance(member, AbsTaskRetrieval) or set(member.metadata.modalities) != {"text"}:
                raise ValueError(f"{name} is no retrieval or reranking task of text; a reranker has no score on it.")
            if not METRIC.fullmatch(member.metadata.main_score):
                raise ValueError(f"{name} is scored by {member.metadata.main_score}, which has no value per query.")
            sets[name].append(member)
    return sets


def load(task: AbsTaskRetrieval, max_queries: int | None, seed: int) -> AbsTaskRetrieval:
    """A copy of the task with its data, and of each part at most `max_queries` queries, drawn by `seed`."""
    task = copy.copy(task)  # what is loaded and set goes with the copy
    task.load_data()
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    for data in parts_of(task).values():
        ids = sorted(set(data["queries"]["id"]) & set(data["relevant_docs"]))
        if max_queries and len(ids) > max_queries:
            ids = sorted(random.Random(seed).sample(ids, max_queries))
            select(data, "queries", set(ids))
            data["relevant_docs"] = {query: data["relevant_docs"][query] for query in ids}
    return task


def part_name(hf_subset: str, hf_split: str) -> str:
    """Of a multilingual task, every language and split is a part with queries of its own."""
    return f"{hf_subset} {hf_split}"


def parts_of(task: AbsTaskRetrieval) -> dict[str, Any]:
    """Part -> its corpus, queries, relevant_docs and top_ranked."""
    return {part_name(a, b): data for a, splits in task.dataset.items() for b, data in splits.items()}


def has_candidates(task: AbsTaskRetrieval) -> bool:
    """Whether the task lists, of itself or by `convert_to_reranking`, the documents to rank for each query."""
    return any(data["top_ranked"] is not None for data in parts_of(task).values())


def drop_unlisted(task: AbsTaskRetrieval) -> None:
    """Leave out the documents that are no query's candidate: nobody looks at them, and encoding them takes time."""
    for data in parts_of(task).values():
        if data["top_ranked"] is not None:
            select(data, "corpus", {d for query in data["queries"]["id"] for d in data["top_ranked"].get(query, ())})


def select(data: Any, name: str, ids: set[str]) -> None:
    data[name] = data[name].select([row for row, key in enumerate(data[name]["id"]) if key in ids])
