"""Make groups to train a cross-lingual reranker on, with the teacher's logits of their English sides as labels.

    python -m recipes.crosslingual --config recipes/querit-nano/1_general_groups.yaml

What a passage is worth to a question does not depend on their languages. So a teacher that reads English alone can
label parallel items: its logit of the English question and passage is the label of the same pair in any languages (see
recipes.lib.groups for the kinds). Where there is no English side the label is a logit that stands for known relevance,
and an empty passage, of which some groups hold one, has the lowest of all.

The teacher's logits are computed once, in shards: a run that was stopped goes on from the last one. Everything is drawn
from `seed`.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer
from trl import TrlParser

from querit.files import content_hash
from recipes.base import DICTIONARY
from recipes.lib.groups import (
    Builder,
    Group,
    aligned_groups,
    english_groups,
    monolingual_groups,
    pooled_groups,
    question_groups,
    read_judged,
    sentence_groups,
)
from recipes.lib.parallel import read_parallel
from recipes.lib.records import already_made
from recipes.lib.shards import Rows, run_shards, write_items
from recipes.score import SCORED, gather

GROUPS = pa.schema(
    {
        "target": pa.string(),
        "query": pa.string(),
        "documents": pa.list_(pa.string()),
        "english_query": pa.string(),  # empty without an English side
        "english_documents": pa.list_(pa.string()),
        "relevant": pa.list_(pa.bool_()),
    }
)
EMPTY_LOGIT = -11.0  # as low as the teacher's go; of nothing at all it says itself that it may well be an answer
ENGLISH = ("english_query", "english_documents")  # kept beside the labels: recipes.train may learn from them too
LABELLED = pa.schema([*SCORED, *(GROUPS.field(name) for name in ENGLISH)])


@dataclass
class CrosslingualArguments:
    output: str = field(metadata={"help": "Parquet file to write; it appears only when complete."})
    base: str = field(metadata={"help": "Folder of recipes.base: its tokenizer and dictionary."})
    teacher: str = field(metadata={"help": "English cross-encoder that labels the English sides."})
    mix: dict[str, int] = field(
        metadata={"help": "Kind (english, switched, questions, aligned, sentences, monolingual or pooled) -> groups."}
    )
    english: list[dict] = field(
        default_factory=list, metadata={"help": "List of {folder, queries, title}: English questions and passages."}
    )
    monolingual: list[dict] = field(
        default_factory=list, metadata={"help": "List of {folder, queries, title}: the same in another language."}
    )
    questions: list[str] = field(
        default_factory=list, metadata={"help": "Parallel questions, asked of the passages of `english`."}
    )
    sentences: list[str] = field(default_factory=list, metadata={"help": "Parallel sentences."})
    aligned: dict[str, dict[str, str]] = field(
        default_factory=dict, metadata={"help": "Name -> {language: BEIR folder}: headings and sections of equal ids."}
    )
    pooled: dict[str, dict[str, str]] = field(
        default_factory=dict, metadata={"help": "Name -> {language: BEIR folder}: equal ids, own questions."}
    )
    languages: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Language -> how often switched text and parallel questions are drawn in it; 1 if left out."},
    )
    aligned_copies: int = field(default=2, metadata={"help": "Groups of a heading, in different languages."})
    candidates: int = field(default=4, metadata={"help": "Passages of a group."})
    short_tokens: int = field(default=128, metadata={"help": "Most tokens of a passage."})
    long_tokens: int = field(default=224, metadata={"help": "Most tokens of a passage in the long groups."})
    long_share: float = field(default=0.2, metadata={"help": "Share of long groups."})
    query_tokens: int = field(default=48, metadata={"help": "Most tokens of a query."})
    known_logit: float = field(
        default=4.3, metadata={"help": "Label of what is known to be relevant; minus this of the others."}
    )
    empty_share: float = field(default=0.0, metadata={"help": "Share of groups one of whose passages is empty."})
    batch_size: int = field(default=16, metadata={"help": "Pairs per call of the teacher."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the teacher; bfloat16 where the CPU has it."})
    workers: int = field(default=1, metadata={"help": "Processes that label; each holds the teacher."})
    shard_size: int = field(default=256, metadata={"help": "Groups between points that a stopped run goes on from."})
    seed: int = field(default=0, metadata={"help": "Seed of every choice made here."})


def build(builder: Builder, args: CrosslingualArguments) -> Iterator[Group]:
    passages: list[str] = []
    for entry in args.english:
        judged = read_judged(entry["folder"], entry.get("title", True))
        passages += judged.passages.values()
        yield from english_groups(builder, judged, entry["queries"])
    for path in args.questions:
        yield from question_groups(builder, read_parallel(path), passages)
    for folders in args.aligned.values():
        read = {language: read_judged(folder, title=False) for language, folder in folders.items()}
        yield from aligned_groups(builder, read, args.aligned_copies)
    if args.sentences:
        rows = (row for path in args.sentences for row in read_parallel(path))
        yield from sentence_groups(builder, rows, args.mix.get("sentences", 0))
    for entry in args.monolingual:
        judged = read_judged(entry["folder"], entry.get("title", True))
        yield from monolingual_groups(builder, judged, entry["queries"])
    for folders in args.pooled.values():
        yield from pooled_groups(builder, {language: read_judged(folder) for language, folder in folders.items()})


def chosen_groups(builder: Builder, args: CrosslingualArguments) -> list[Group]:
    """At most so many groups of each kind as `mix` says, drawn from all, their texts cut to length."""
    by_kind: dict[str, list[Group]] = defaultdict(list)
    for group in build(builder, args):
        by_kind[group.kind].append(group)
    if unknown := args.mix.keys() - by_kind.keys():
        raise ValueError(f"mix names {', '.join(sorted(unknown))}, of which the sources make none.")
    chosen = []
    for kind, most in args.mix.items():
        builder.rng.shuffle(by_kind[kind])
        chosen += by_kind[kind][:most]

    def cut(texts: list[str], tokens: int) -> list[str]:
        """The first so many tokens of each, as they stand in the text."""
        encoded = builder.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        ends = [encoding.offsets[:tokens][-1][1] if encoding.ids else 0 for encoding in encoded]
        return [text[:end] for text, end in zip(texts, ends, strict=True)]

    for group in chosen:
        tokens = args.long_tokens if builder.rng.random() < args.long_share else args.short_tokens
        group.query, group.documents = cut([group.query], args.query_tokens)[0], cut(group.documents, tokens)
        if group.english:
            query, documents = group.english
            group.english = cut([query], args.query_tokens)[0], cut(documents, tokens)
        if builder.rng.random() < args.empty_share:
            emptied = builder.rng.randrange(1, len(group.documents))  # the first may be the one that is relevant
            for documents in (group.documents, group.english[1] if group.english else []):
                documents[emptied : emptied + 1] = [""]
    return chosen


class Label:
    """The worker of `run_shards`: rows of GROUPS in, LABELLED out; `scores` are logits, `labels` their sigmoid."""

    def __init__(self, teacher: str, batch_size: int, known_logit: float, dtype: str):
        self.model = CrossEncoder(teacher, model_kwargs={"dtype": getattr(torch, dtype)})
        self.batch_size, self.known_logit = batch_size, known_logit

    def __call__(self, items: Rows) -> Rows:
        pairs = [
            (item["english_query"], document)
            for item in items
            if item["english_query"]
            for document in item["english_documents"]
        ]
        logits = iter(self.logits(pairs))
        rows = []
        for item in items:
            if item["english_query"]:
                scores = [next(logits) for _ in item["documents"]]
            else:
                scores = [self.known_logit if relevant else -self.known_logit for relevant in item["relevant"]]
            scores = [score if text else EMPTY_LOGIT for score, text in zip(scores, item["documents"], strict=True)]
            labels = torch.tensor(scores).sigmoid().tolist()
            kept = {key: item[key] for key in ("target", "query", "documents", "relevant", *ENGLISH)}
            rows.append(kept | {"scores": scores, "labels": labels})
        return rows

    def logits(self, pairs: list[tuple[str, str]]) -> list[float]:
        if not pairs:
            return []
        identity = torch.nn.Identity()
        found = self.model.predict(
            pairs, batch_size=self.batch_size, activation_fn=identity, show_progress_bar=False, convert_to_tensor=True
        )
        return [round(value, 4) for value in found.float().tolist()]  # type: ignore[union-attr]


def main(args: CrosslingualArguments) -> None:
    output = Path(args.output)
    work = output.with_name(f"{output.name}.work")
    if not already_made(output, asdict(args)):
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        dictionary = json.loads((Path(args.base) / DICTIONARY).read_text(encoding="utf-8"))
        if wrong := [name for name, weight in args.languages.items() if name not in dictionary or weight <= 0]:
            raise ValueError(f"languages: {wrong[0]} must be one of {', '.join(dictionary)}, with a weight above 0.")
        builder = Builder(tokenizer, dictionary, args.candidates, random.Random(args.seed), args.languages)
        work.mkdir(parents=True, exist_ok=True)
        items = work / "groups.parquet"
        groups = chosen_groups(builder, args)
        write_items((as_row(group) for group in groups), items, GROUPS, args.shard_size)
        print(f"{len(groups):,} groups: {dict(Counter(group.kind for group in groups))}", flush=True)
        worker = partial(Label, args.teacher, args.batch_size, args.known_logit, args.dtype)
        settings = {"teacher": content_hash(args.teacher), "known_logit": args.known_logit, "dtype": args.dtype}
        run_shards(
            worker, items, work / "scored", LABELLED, settings, workers=args.workers, description="teacher's logits"
        )
        gather([work / "scored"], work / "cache", output, asdict(args))
    shutil.rmtree(work, ignore_errors=True)


def as_row(group: Group) -> dict:
    query, documents = group.english or ("", [])
    row = {"target": group.kind, "query": group.query, "documents": group.documents, "relevant": group.relevant}
    return row | {"english_query": query, "english_documents": documents}


if __name__ == "__main__":
    (arguments,) = TrlParser(CrosslingualArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
