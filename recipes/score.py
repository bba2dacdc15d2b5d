"""Retrieve candidates for every query with a teacher, score them, keep a spread of them as soft labels.

    python -m recipes.score --config recipes/querit-nano/1_general_score.yaml

The teacher is an embedding model: its cosine similarities retrieve the top_k passages and are the scores. Per query the
scores are mapped to [0, 1] (min-max over the top_k) and mixed with the known relevance:

    label = (1 - relevance_weight) * minmax(similarity) + relevance_weight * relevant

Candidates are drawn over the whole range of scores: `bins` equal intervals, filled ones visited in random order, so
that easy and hard ones are all there (Querit's 16 bins). Folders of one target form one pool in which the same `_id` is
the same document in another language: a twin of the positive is a positive.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from trl import TrlParser

from recipes.data import read_corpus, read_qrels, read_queries


@dataclass
class ScoreArguments:
    output: str = field(metadata={"help": "Parquet file to write; it appears only when complete."})
    targets: dict[str, dict] = field(
        metadata={"help": "Name -> {folders: [BEIR folder, ...], queries: int, documents: int, crops: int}."}
    )
    teacher: str = field(metadata={"help": "sentence-transformers model: folder or Hub id."})
    teacher_revision: str | None = field(default=None, metadata={"help": "Commit of a teacher from the Hub."})
    top_k: int = field(default=100, metadata={"help": "Passages retrieved per query."})
    bins: int = field(default=16, metadata={"help": "Equal intervals of the label range to draw candidates from."})
    candidates: int = field(default=6, metadata={"help": "Passages kept per query beside the positive."})
    relevance_weight: float = field(default=0.4, metadata={"help": "Weight of known relevance in a label."})
    passage_tokens: int = field(default=112, metadata={"help": "Documents are cut into passages of at most this many."})
    passages_per_document: int = field(default=3, metadata={"help": "Leading passages kept of a document."})
    batch_size: int = field(default=64, metadata={"help": "Texts encoded at once."})
    seed: int = field(default=0, metadata={"help": "Seed of every choice made here."})


@dataclass
class Pool:
    """The passages of a target and the queries that are asked of them."""

    passages: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)  # the document id of each passage
    queries: list[str] = field(default_factory=list)
    positives: list[set[str]] = field(default_factory=list)  # relevant document ids of each query; empty for a crop
    excluded: list[set[str]] = field(default_factory=list)  # documents that may not be candidates


def cut_passages(tokenizer, texts: list[str], passage_tokens: int, limit: int) -> list[list[str]]:
    """Cut each text into at most `limit` passages of near-equal length, none over `passage_tokens` tokens."""
    cut = []
    encodings = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for text, offsets in zip(texts, encodings, strict=True):
        parts = max(1, -(-len(offsets) // passage_tokens))
        size = -(-len(offsets) // parts) if offsets else 1
        starts = [offsets[i][0] for i in range(0, len(offsets), size)] or [0]
        cut.append([text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)][:limit])
    return cut


def load_pool(target: dict, tokenizer, args: ScoreArguments, rng: random.Random) -> Pool:
    pool = Pool()
    asked: list[tuple[str, set[str]]] = []
    corpora = {folder: read_corpus(folder) for folder in target["folders"]}
    ids = sorted(set().union(*corpora.values()))
    if (limit := target.get("documents")) and len(ids) > limit:
        ids = rng.sample(ids, limit)
    kept = set(ids)
    for folder, corpus in corpora.items():
        chosen = [i for i in corpus if i in kept]
        cut = cut_passages(tokenizer, [corpus[i] for i in chosen], args.passage_tokens, args.passages_per_document)
        for document, parts in zip(chosen, cut, strict=True):
            pool.passages += parts
            pool.documents += [document] * len(parts)
        queries = read_queries(folder)
        seen = Counter(text.casefold() for text in queries.values())
        for query, relevant in read_qrels(folder).items():
            positives = {d for d, relevance in relevant.items() if relevance > 0 and d in kept}
            # A heading that stands more than once names no section.
            if positives and query in queries and seen[queries[query].casefold()] == 1:
                asked.append((queries[query], positives))
    asked.sort(key=lambda row: row[0])
    for text, positives in rng.sample(asked, min(len(asked), target.get("queries") or len(asked))):
        pool.queries.append(text)
        pool.positives.append(positives)
        pool.excluded.append(set())
    for _ in range(target.get("crops", 0)):
        source = rng.randrange(len(pool.passages))
        text = pool.passages[source]
        length = rng.randint(min(20, len(text)), max(20, min(len(text) // 2, 240)))
        start = rng.randint(0, max(0, len(text) - length))
        start = text.rfind(" ", 0, start + 1) + 1 if " " in text[:start] else start
        pool.queries.append(text[start : start + length].strip())
        pool.positives.append(set())
        pool.excluded.append({pool.documents[source]})
    return pool


def draw(labels: np.ndarray, count: int, bins: int, rng: random.Random) -> list[int]:
    """Draw `count` indices of `labels` (in [0, 1]) spread over equal bins: each filled bin once, then again."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(min(int(label * bins), bins - 1), []).append(index)
    for indices in members.values():
        rng.shuffle(indices)
    drawn: list[int] = []
    while members and len(drawn) < count:
        for key in rng.sample(sorted(members), len(members)):
            drawn.append(members[key].pop())
            if not members[key]:
                del members[key]
            if len(drawn) == count:
                break
    return drawn


def score_pool(name: str, pool: Pool, teacher: SentenceTransformer, args: ScoreArguments, rng: random.Random):
    encode: dict[str, Any] = {"batch_size": args.batch_size, "convert_to_tensor": True, "show_progress_bar": True}
    passages = teacher.encode_document(pool.passages, **encode).float()
    queries = teacher.encode_query(pool.queries, **encode).float()
    rows: dict[str, list[int]] = {}
    for index, document in enumerate(pool.documents):
        rows.setdefault(document, []).append(index)
    for q in tqdm(range(len(pool.queries)), desc=f"{name}: candidates"):
        similarity = passages @ queries[q]
        positive_rows = [row for document in sorted(pool.positives[q]) for row in rows[document]]
        hidden = [row for document in pool.excluded[q] for row in rows[document]]
        # The passage of a positive that answers is not marked; of each language's twin the nearest one stands for it.
        positive = None
        if positive_rows:
            weights = torch.softmax(similarity[positive_rows] / 0.05, 0).tolist()
            positive = rng.choices(positive_rows, weights)[0]
        similarity[positive_rows + hidden] = -2
        top = torch.topk(similarity, min(args.top_k, len(similarity) - len(positive_rows) - len(hidden)))
        indices, scores = top.indices.tolist(), top.values.numpy()
        if positive is not None:
            indices = [positive, *indices]
            scores = np.concatenate([[float(passages[positive] @ queries[q])], scores])
        if len(indices) < 2:
            continue
        span = scores.max() - scores.min()
        minmax = (scores - scores.min()) / (span if span > 0 else 1)
        labels = (1 - args.relevance_weight) * minmax
        first = 0
        if positive is not None:
            labels[0] += args.relevance_weight
            first = 1
        picked = list(range(first)) + [first + i for i in draw(minmax[first:], args.candidates, args.bins, rng)]
        yield {
            "target": name,
            "query": pool.queries[q],
            "documents": [pool.passages[indices[i]] for i in picked],
            "labels": [round(float(labels[i]), 4) for i in picked],
            "scores": [round(float(scores[i]), 4) for i in picked],
            "relevant": [bool(positive is not None and i == 0) for i in picked],
        }


def main(args: ScoreArguments) -> None:
    out = Path(args.output)
    if out.exists():
        print(f"{out} is there already; delete it to make it again.")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if torch.cuda.is_available() or torch.backends.mkldnn.is_available() else torch.float32
    teacher = SentenceTransformer(args.teacher, revision=args.teacher_revision, model_kwargs={"dtype": dtype})
    rows: list[dict] = []
    for name, target in args.targets.items():
        rng = random.Random(f"{args.seed} {name}")
        pool = load_pool(target, teacher.tokenizer, args, rng)
        print(f"{name}: {len(pool.passages):,} passages, {len(pool.queries):,} queries", flush=True)
        part = out.with_suffix(f".{name}.jsonl")
        if not part.exists():  # a killed run goes on with the next target
            scored = list(score_pool(name, pool, teacher, args, rng))
            aside = part.with_suffix(".writing")
            aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored), encoding="utf-8")
            aside.rename(part)
        rows += [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    random.Random(args.seed).shuffle(rows)
    aside = out.with_suffix(".writing")
    Dataset.from_list(rows).to_parquet(str(aside))
    aside.rename(out)
    for name in args.targets:
        out.with_suffix(f".{name}.jsonl").unlink()
    print(f"{out}: {len(rows):,} queries, {sum(len(row['documents']) for row in rows):,} pairs")


if __name__ == "__main__":
    (arguments,) = TrlParser(ScoreArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
