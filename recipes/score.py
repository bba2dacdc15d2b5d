"""Retrieve candidates for every query, score them with teachers, keep a spread of them as soft labels.

    python -m recipes.score --config recipes/querit-nano/3_score_cjk.yaml

The retriever finds the top_k passages of each query, the teachers score them. Per query each teacher's scores are
mapped to [0, 1] (min-max), several teachers are averaged, and the known relevance is mixed in:

    label = (1 - relevance_weight) * mean over teachers of minmax(score) + relevance_weight * relevant

Candidates are drawn over the whole range of scores: `bins` equal intervals, filled ones visited in random order, so
that easy and hard ones are all there (Querit's 16 bins). The folders of a target form one pool (recipes.lib.targets)
in which a twin of the positive in another language is a positive.

Queries are scored in shards (recipes.lib.shards), on one process, several or Ray. What is in the making stands in
`<output>.work`; a run that was stopped goes on from there, to the same output.
"""

import random
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import AutoTokenizer
from trl import TrlParser

from querit.files import file_hash
from recipes.lib.records import already_made, write_parquet
from recipes.lib.retrieval import BM25, build_index, load_index
from recipes.lib.shards import ENGINES, Rows, run_shards
from recipes.lib.targets import Passages, Target, prepare, read_target
from recipes.lib.teachers import Teacher, load_teacher, mean_minmax, read_teachers

SELECTIONS, LABELS = ("bins", "hardest"), ("soft", "hard")
SCORED = pa.schema(
    {
        "target": pa.string(),
        "query": pa.string(),
        "documents": pa.list_(pa.string()),
        "labels": pa.list_(pa.float64()),
        "scores": pa.list_(pa.float64()),
        "relevant": pa.list_(pa.bool_()),
    }
)
# Of min-max scores, when a passage of the positive is drawn: the cosines of e5's top 100 span a quarter, so that this
# is 0.05 of a cosine.
POSITIVE_TEMPERATURE = 0.2


@dataclass
class ScoreArguments:
    output: str = field(metadata={"help": "Parquet file to write; it appears only when complete."})
    targets: dict[str, dict] = field(
        metadata={"help": "Name -> {folders, queries, documents, crops, cross_lingual, split}; see targets.Target."}
    )
    teachers: list[dict] = field(
        metadata={"help": "List of {model, revision, kind, url, trust_remote_code}; see teachers.Teacher."}
    )
    retriever: str | None = field(
        default=None, metadata={"help": "Bi-encoder that finds candidates, or bm25; the first teacher if not given."}
    )
    retriever_revision: str | None = field(default=None, metadata={"help": "Commit of a retriever from the Hub."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Cuts passages, and words for bm25; the retriever's or teacher's if not given."}
    )
    tokenizer_revision: str | None = field(default=None, metadata={"help": "Commit of a tokenizer from the Hub."})
    top_k: int = field(default=100, metadata={"help": "Passages retrieved per query."})
    selection: str = field(default="bins", metadata={"help": "bins (over the range of scores) or hardest (the best)."})
    bins: int = field(default=16, metadata={"help": "Equal intervals of the label range to draw candidates from."})
    per_bin: int = field(default=4, metadata={"help": "Most passages of one bin."})
    candidates: int = field(default=6, metadata={"help": "Passages kept per query beside the positive."})
    labels: str = field(default="soft", metadata={"help": "soft, or hard: 1 for the known relevant, 0 for others."})
    relevance_weight: float = field(default=0.4, metadata={"help": "Weight of known relevance in a soft label."})
    passage_tokens: int = field(default=112, metadata={"help": "Documents are cut into passages of at most this many."})
    passages_per_document: int = field(default=3, metadata={"help": "Leading passages kept of a document."})
    batch_size: int = field(default=8, metadata={"help": "Texts per model call; 8 is fastest on CPUs, more on GPUs."})
    engine: str = field(default="local", metadata={"help": "local (processes) or ray (the cluster of RAY_ADDRESS)."})
    workers: int = field(default=1, metadata={"help": "Processes, or Ray's actors; each holds the models."})
    shard_size: int = field(
        default=64, metadata={"help": "Queries between two points that a stopped run goes on from."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every choice made here."})

    def check(self) -> None:
        for name, allowed in (("selection", SELECTIONS), ("labels", LABELS), ("engine", ENGINES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        for name in ("top_k", "bins", "per_bin", "candidates", "passage_tokens", "passages_per_document", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.relevance_weight <= 1:
            raise ValueError(f"relevance_weight is {self.relevance_weight}; it must be in [0, 1].")


@dataclass
class FirstStage:
    """What finds the candidates, and the tokenizer that cuts the passages."""

    retriever: str
    revision: str | None
    trust_remote_code: bool
    tokenizer: str
    tokenizer_revision: str | None


def first_stage(args: ScoreArguments, teachers: list[Teacher]) -> FirstStage:
    if args.retriever is None and teachers[0].kind != "bi-encoder":
        raise ValueError(f"The first teacher is a {teachers[0].kind}: give retriever, a bi-encoder or bm25.")
    if args.retriever != BM25 and any(teacher.kind == BM25 for teacher in teachers):
        raise ValueError("bm25 is a teacher only where it is the retriever, too: set retriever: bm25.")
    retriever = args.retriever or teachers[0].model
    tokenizer = args.tokenizer or (retriever if retriever != BM25 else teachers[0].model)
    if args.tokenizer is None and retriever == BM25 and teachers[0].url:
        raise ValueError("retriever is bm25 and the teacher is on a server: give tokenizer, a folder or Hub id.")
    same = next((teacher for teacher in teachers if teacher.model == retriever), None)
    revisions = {teacher.model: teacher.revision for teacher in teachers}
    revisions[retriever] = args.retriever_revision or revisions.get(retriever)
    return FirstStage(
        retriever=retriever,
        revision=revisions[retriever],
        trust_remote_code=same is not None and same.trust_remote_code,
        tokenizer=tokenizer,
        tokenizer_revision=args.tokenizer_revision or revisions.get(tokenizer),
    )


def draw(labels: np.ndarray, count: int, bins: int, per_bin: int, rng: random.Random) -> list[int]:
    """Draw `count` indices of `labels` (in [0, 1]) spread over equal bins: each filled bin once, then again.

    At most `per_bin` of one bin, so there may be fewer.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(min(int(label * bins), bins - 1), []).append(index)
    for key, indices in members.items():
        members[key] = rng.sample(indices, min(per_bin, len(indices)))
    drawn: list[int] = []
    while members and len(drawn) < count:
        for key in rng.sample(sorted(members), len(members)):
            drawn.append(members[key].pop())
            if not members[key]:
                del members[key]
            if len(drawn) == count:
                break
    return drawn


class Scorer:
    """The worker of `run_shards`: queries of a target in, rows of SCORED out."""

    def __init__(
        self, name: str, folder: Path, teachers: list[Teacher], indexes: list[Path | None], args: ScoreArguments
    ):
        self.name, self.args = name, args
        self.passages = Passages(folder / "passages.arrow")
        # Each folder once: a teacher that is the retriever too shares its model, and the queries that it has encoded.
        opened = {path: load_index(path) for path in (folder / "index", *indexes) if path is not None}
        self.index = opened[folder / "index"]
        self.teachers = [
            load_teacher(teacher, None if path is None else opened[path], args.batch_size)
            for teacher, path in zip(teachers, indexes, strict=True)
        ]

    def __call__(self, items: Rows) -> Rows:
        queries = [item["query"] for item in items]
        hidden = [set(item["hidden"]) for item in items]
        _, found = self.index.search(queries, self.args.top_k + max(map(len, hidden)))
        candidates = [
            [row for row in rows if row not in skipped][: self.args.top_k]
            for rows, skipped in zip(found.tolist(), hidden, strict=True)
        ]
        asked = [[*item["answers"], *rows] for item, rows in zip(items, candidates, strict=True)]
        scored = [teacher(queries, asked, self.passages) for teacher in self.teachers]
        rows = (self.row(item, asked[q], np.stack([scores[q] for scores in scored])) for q, item in enumerate(items))
        return [row for row in rows if row is not None]

    def row(self, item: dict, passages: list[int], scores: np.ndarray) -> dict | None:
        """Choose among the `passages` of a query, answers first, with `scores` `(teachers, passages)`.

        -> a row of SCORED, its positive first, or None where nothing could be learnt.
        """
        args, answers = self.args, len(item["answers"])
        rng = random.Random(f"{args.seed} {self.name} {item['id']} {item['query']}")
        kept = list(range(answers, len(passages)))
        if answers:
            # Which passage of a positive answers is not marked: the nearest one, of all its twins', mostly.
            weights = np.exp(mean_minmax(scores)[:answers] / POSITIVE_TEMPERATURE)
            kept = [rng.choices(range(answers), weights.tolist())[0], *kept]
        if len(kept) < 2 or (args.labels == "hard" and not answers):
            return None
        scores = scores[:, kept]
        evidence = mean_minmax(scores)
        first = 1 if answers else 0
        if args.selection == "bins":
            chosen = draw(evidence[first:], args.candidates, args.bins, args.per_bin, rng)
        else:
            chosen = np.argsort(-evidence[first:], kind="stable")[: args.candidates].tolist()
        picked = list(range(first)) + [first + index for index in chosen]
        relevant = np.array([bool(answers) and index == 0 for index in range(len(kept))])
        labels = (1 - args.relevance_weight) * evidence + args.relevance_weight * relevant
        if args.labels == "hard":
            labels = relevant.astype(float)
        shown = scores[0] if len(scores) == 1 else evidence
        return {
            "target": self.name,
            "query": item["query"],
            "documents": [self.passages.text(passages[kept[i]]) for i in picked],
            "labels": [round(float(labels[i]), 4) for i in picked],
            "scores": [round(float(shown[i]), 4) for i in picked],
            "relevant": [bool(relevant[i]) for i in picked],
        }


def score_target(name: str, target: Target, folder: Path, teachers: list[Teacher], args: ScoreArguments) -> Path:
    """Everything from a target's folders to its scored queries. -> the folder of the finished shards."""
    folder, first = folder.resolve(), first_stage(args, teachers)
    tokenizer = AutoTokenizer.from_pretrained(first.tokenizer, revision=first.tokenizer_revision or "main")
    cut = (args.passage_tokens, args.passages_per_document)
    prepare(name, target, tokenizer, folder, *cut, args.seed, args.shard_size)
    passages = Passages(folder / "passages.arrow")
    options: dict[str, Any] = {"engine": args.engine, "workers": args.workers, "batch_size": args.batch_size}
    known: dict[str, Any] = {"revision": first.revision, "trust_remote_code": first.trust_remote_code}
    if first.retriever == BM25:
        known = {"revision": first.tokenizer_revision, "tokenizer": first.tokenizer}
    build_index(passages.column("text"), first.retriever, folder / "index", **known, **options)
    indexes: list[Path | None] = []
    for number, teacher in enumerate(teachers):
        index = folder / "index" if teacher.kind in ("bi-encoder", BM25) else None
        own_index = (teacher.model, teacher.revision) != (first.retriever, first.revision)
        if index and teacher.kind != BM25 and own_index:
            index = folder / f"teacher-{number}"
            own: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
            build_index(passages.column("text"), teacher.model, index, **own, **options)
        indexes.append(index)
    free = ("output", "targets", "teachers", "retriever", "engine", "workers")  # told by what follows, or of no weight
    settings = {key: value for key, value in asdict(args).items() if key not in free}
    settings |= {"teachers": [teacher.key() for teacher in teachers], "passages": file_hash(folder / "passages.arrow")}
    settings |= {"indexes": [file_hash(index / "index.json") for index in (folder / "index", *indexes) if index]}
    make_worker = partial(Scorer, name, folder, teachers, indexes, args)
    items, scored = folder / "queries.parquet", folder / "scored"
    run_shards(make_worker, items, scored, SCORED, settings, args.engine, args.workers, description=f"{name}: queries")
    return scored


def gather(scored: list[Path], cache: Path, output: Path, settings: dict) -> None:
    """Mix the rows of all shards into one Parquet file, by the settings' seed; they are mapped, not held in memory."""
    shards = [path for folder in scored for path in sorted(folder.glob("shard-*.parquet"))]
    files = [str(path) for path in shards if pq.read_metadata(path).num_rows]
    if not files:
        raise ValueError("No query has candidates: the folders need judged queries, or the targets `crops`.")
    shutil.rmtree(cache, ignore_errors=True)  # half of one, if a run was killed here
    rows = Dataset.from_parquet(files, cache_dir=str(cache)).shuffle(seed=settings["seed"], keep_in_memory=True)
    write_parquet(rows, output, settings)
    pairs = pc.sum(pc.list_value_length(pq.read_table(output, columns=["labels"])["labels"]))
    print(f"{output}: {len(rows):,} queries, {pairs.as_py():,} pairs")


def main(args: ScoreArguments) -> None:
    args.check()
    targets = {name: read_target(name, settings) for name, settings in args.targets.items()}
    output = Path(args.output)
    work = output.with_name(output.name + ".work")
    if not already_made(output, asdict(args)):
        teachers = read_teachers(args.teachers)
        scored = [score_target(name, target, work / name, teachers, args) for name, target in targets.items()]
        gather(scored, work / "cache", output, asdict(args))
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    (arguments,) = TrlParser(ScoreArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
