"""From documents without labels to a reranker that is better on them, or to the word that it is not: `querit adapt`.

    querit adapt handbook/ --model hub_card/querit-reranker-nano --output my-reranker

Runs the recipe's stages on one's own documents: queries are written (recipes.mine), candidates scored by the
teacher (recipes.score), the model trained on the soft labels (recipes.train) and merged with what it was before
(recipes.merge). Queries of documents held aside judge before against after (recipes.evaluate). All in the making
stands in `<output>.work`; a run that was stopped goes on there.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer
from trl import RewardConfig

from hub_card.build import build
from modeling_querit.scoring_querit import fastest_cpu_dtype
from recipes import mine, score, train
from recipes.documents import detect_language, joined, read_documents
from recipes.evaluate import EvaluateArguments, evaluate
from recipes.generators import QueryWriter
from recipes.merge import MergeArguments
from recipes.merge import main as merge
from recipes.records import content_hash
from recipes.results import interval_of_mean
from recipes.retrieval import BM25, fingerprint
from recipes.shards import write_aside
from recipes.targets import cut_passages
from recipes.teachers import Teacher, load_cross_encoder, load_querit, read_teachers

CANDIDATES = 7  # passages of a training group, the positive among them
TOP_K = 50  # candidates that the teacher scores
JUDGED = 100  # most queries that judge
FEWEST = 50  # training queries under which an adaptation is not tried
FEWEST_JUDGED = 20  # with fewer, a bootstrap interval is too narrow: models that are no better would pass as better
TRAINING_COST = 4  # a pair forward and backward, in pairs only scored; measured on Nano
ASKED = 2.5  # queries asked for, per training query: a fifth is held aside, and filters leave out about half
PASSAGES = 3  # leading passages of a document among which the candidates are
SAMPLE = 16  # documents that tell how fast the models are
TIMED = 3  # of them, those on which a generator is timed: a language model takes seconds for each
SPARE = 0.7  # share of the budget that is planned: starting, cutting crops and merging take the rest


@dataclass
class AdaptArguments:
    documents: str = field(metadata={"help": "BEIR folder, .jsonl(.gz), .csv, .tsv, or folder of .txt and .md files."})
    model: str = field(metadata={"help": "The Querit reranker to adapt: folder or Hub id."})
    output: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    revision: str | None = field(default=None, metadata={"help": "Commit of a model from the Hub."})
    generator: str = field(
        default="crop", metadata={"help": "crop, a causal LM (folder, .gguf file or Hub id), or URL#MODEL of a server."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Bi-encoder, cross-encoder or Querit model; the model itself if not given."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Commit of a teacher from the Hub."})
    queries_per_document: int = field(default=3, metadata={"help": "Most queries written for a document."})
    budget_minutes: float = field(default=30.0, metadata={"help": "About how long all of it may take."})
    seed: int = field(default=0, metadata={"help": "Seed of every choice."})


def generator_entry(generator: str) -> dict[str, Any]:
    """The entry of recipes.mine's `generators` that the option --generator stands for."""
    if generator == "crop":
        return {"kind": "crop"}
    if generator.startswith(("http://", "https://")):
        url, _, model = generator.partition("#")
        if not model:
            raise ValueError(f"The generator {generator} names no model; write it as {url}#MODEL.")
        return {"kind": "openai", "base_url": url, "model": model}
    if generator.endswith(".gguf"):
        file = Path(generator)
        return {"kind": "local", "model": str(file.parent), "gguf_file": file.name}
    return {"kind": "local", "model": generator}


@dataclass
class Pace:
    """Seconds, measured here on some of the documents."""

    model: float  # a pair scored by the model that is adapted
    teacher: float  # a pair scored by the teacher; 0 for a bi-encoder
    corpus: float  # all documents encoded by a bi-encoder, as often as the stages do; 0 for other teachers
    generator: float  # as many queries written as it takes for one to train with; 0 for crops

    def fixed(self) -> float:
        """What does not depend on how many queries there are: encoding, and judging three models."""
        return self.corpus + 3 * JUDGED * TOP_K * self.model

    def query(self) -> float:
        """A training query: written, its candidates read by the teacher, its group trained on."""
        return self.generator + TOP_K * self.teacher + CANDIDATES * TRAINING_COST * self.model

    def affordable_queries(self, budget_minutes: float) -> int:
        return int((SPARE * 60 * budget_minutes - self.fixed()) / self.query())

    def minutes_needed(self, queries: int) -> float:
        return (self.fixed() + queries * self.query()) / (SPARE * 60)


def best_time(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of three runs: the first is slower, and others may disturb one."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def writing_time(args: AdaptArguments, generator: dict[str, Any], sample: list[dict]) -> float:
    """Seconds that a generator takes for a document, once it is loaded; 0 for crops, which cost next to nothing.

    Where it answers more than TIMED documents at once, it takes less in the end. Raises RuntimeError for a server that
    does not answer, ValueError for one whose key is not there.
    """
    if generator["kind"] == "crop":
        return 0.0
    items = [
        {"row": row, "id": document["_id"], "title": document["title"], "text": document["text"]}
        | {"language": detect_language(joined(document)), "aside": False}
        for row, document in enumerate(sample[:TIMED])
    ]
    write = QueryWriter(generator, args.queries_per_document, args.seed, "")  # only crops read a table of terms
    start = time.perf_counter()
    write(items)
    return (time.perf_counter() - start) / len(items)


def measure_pace(
    args: AdaptArguments,
    teacher: Teacher,
    generator: dict[str, Any],
    sample: list[dict],
    passages: list[str],
    documents: int,
) -> Pace:
    """The pace here, by a sample of the `documents` that there are, and its passages. Raises what writing_time does."""
    texts = [joined(document) for document in sample]

    def reading(model: Teacher) -> float:
        score = load_querit(model, 32) if model.kind == "querit" else load_cross_encoder(model, 32)
        return best_time(lambda: score([texts[0][:60]], [texts])) / len(texts)

    written = ASKED / args.queries_per_document * writing_time(args, generator, sample)
    model = reading(Teacher(args.model, args.revision, "querit"))
    if teacher.kind == "bi-encoder":
        encoder = SentenceTransformer(teacher.model, revision=teacher.revision)
        # For the round trip of mining, for the first stage of the evaluation, and for the teacher.
        encoded = [*texts, *texts, *passages]
        return Pace(model, 0.0, best_time(lambda: encoder.encode(encoded)) / len(texts) * documents, written)
    same = (teacher.model, teacher.revision) == (args.model, args.revision)
    return Pace(model, model if same else reading(teacher), 0.0, written)


def training_config(args: AdaptArguments, folder: Path, max_length: int) -> RewardConfig:
    cuda = torch.cuda.is_available()
    return RewardConfig(
        output_dir=str(folder),
        max_length=max_length,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=3e-5,
        lr_scheduler_type="linear",
        warmup_steps=10,
        weight_decay=0.01,
        bf16=cuda or fastest_cpu_dtype() == torch.bfloat16,
        use_cpu=not cuda,
        gradient_checkpointing=cuda,  # a 4B model would not fit without; on a CPU memory is not what is scarce
        train_sampling_strategy="group_by_length",
        logging_steps=10,
        save_steps=50,
        save_total_limit=2,
        report_to="none",
        seed=args.seed,
    )


def judge(results: dict, seed: int) -> dict[str, Any]:
    """Merged against general on the queries held aside, in points of nDCG@10, with a paired 95% bootstrap interval."""
    (entry,) = results["sets"].values()
    (before,), (after,) = (entry["per_query"][name].values() for name in ("general", "merged"))
    gains = np.array([after[query] - before[query] for query in before])
    low, high = interval_of_mean([gains], [1.0], seed)
    return {
        "queries": len(gains),
        "ndcg@10": entry["scores"],
        "gain": round(100 * float(gains.mean()), 2),
        "interval": [round(100 * low, 2), round(100 * high, 2)],
        "better": low > 0 and len(gains) >= FEWEST_JUDGED,
    }


def in_words(verdict: dict, output: str) -> str:
    points = verdict["ndcg@10"]
    low, high = verdict["interval"]
    facts = (
        f"On {verdict['queries']} queries of documents held aside, nDCG@10 is {points['merged']:.1f} after adaptation "
        f"and {points['general']:.1f} before ({verdict['gain']:+.1f}; 95% interval {low:+.1f} to {high:+.1f}). "
        f"The first stage by itself has {points['retriever']:.1f}."
    )
    if verdict["better"]:
        return f"Better. {facts} {output} holds the adapted model."
    if verdict["queries"] < FEWEST_JUDGED:
        return f"Too few queries to tell. {facts} {output} holds the model as it was."
    worse = "Worse" if high < 0 else "No clear gain"
    return f"{worse}. {facts} {output} holds the model as it was."


def card(args: AdaptArguments, counts: dict[str, Any], words: str, table: str) -> str:
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-ranking
tags: [reranker, cross-encoder, custom_code, sentence-transformers]
---

# {Path(args.output).name}

Made from {args.model} by `querit adapt` on {counts["documents"]:,} documents without labels:
{counts["queries"]:,} queries written by `{args.generator}`, candidates scored by {args.teacher or "the model itself"}.

{words} The queries that judged were written in the same way as those of the training; people's own may be different.

{table}
"""


def adapt(args: AdaptArguments) -> dict[str, Any]:
    """Write the better of the adapted and the given model to `args.output`. -> the verdict.

    It stands in `<output>.work/adaptation.json` too, beside the queries and scores.

    Raises ValueError for documents, models and budgets that cannot be used, FileExistsError if the output is there.
    """
    out = Path(args.output)
    work = out.with_name(f"{out.name}.work")
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another output, or move it away.")
    sample: list[dict] = []
    documents = 0
    for document in read_documents(args.documents):
        documents += 1
        if len(sample) < SAMPLE:
            sample.append(document)
    if documents < FEWEST:
        raise ValueError(f"{args.documents} has {documents} documents; an adaptation needs some hundreds.")
    generator = generator_entry(args.generator)
    entry = {"model": args.teacher or args.model}
    if revision := args.teacher_revision if args.teacher else args.revision:
        entry["revision"] = revision
    (teacher,) = read_teachers([entry])
    bi_encoder = teacher.kind == "bi-encoder"
    first_stage = teacher.model if bi_encoder else BM25
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision or "main")
    max_length = min(tokenizer.model_max_length, 512)
    passage_tokens = max_length - 48

    # What is asked for is fixed once: a run that goes on must not measure another speed and ask other documents.
    plan_file = work / "plan.json"
    request = asdict(args) | {"output": out.name, "documents": content_hash(args.documents)}
    request |= {"model": fingerprint(args.model, args.revision), "teacher": fingerprint(teacher.model, revision)}
    if not plan_file.exists():
        cut = cut_passages(tokenizer, [joined(document) for document in sample], passage_tokens, PASSAGES)
        pace = measure_pace(args, teacher, generator, sample, list(chain(*cut)), documents)
        queries = pace.affordable_queries(args.budget_minutes)
        if queries < FEWEST:
            raise ValueError(
                f"{args.budget_minutes:g} minutes are too few: a pair takes {1000 * pace.model:.1f} ms here, for the "
                f"teacher {1000 * pace.teacher:.1f}, encoding the documents {pace.corpus:.0f} s, writing for a query "
                f"{pace.generator:.1f} s. Give --budget-minutes {math.ceil(pace.minutes_needed(FEWEST))}."
            )
        write_aside(plan_file, json.dumps({"request": request, "queries": queries}, indent=1) + "\n")
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    if changed := [key for key, value in request.items() if plan["request"].get(key) != value]:
        raise ValueError(
            f"{work} belongs to another request ({', '.join(changed)} changed). Remove it, or name another output."
        )

    mined = work / "mined"
    if not mined.exists():
        mine.main(
            mine.MineArguments(
                documents=args.documents,
                output_dir=str(mined),
                generators=[generator],
                sample=math.ceil(ASKED * plan["queries"] / args.queries_per_document),
                queries_per_document=args.queries_per_document,
                held_aside=0.2,
                retriever=first_stage,
                retriever_revision=args.teacher_revision if first_stage != BM25 else args.revision,
                retriever_tokenizer=args.model if first_stage == BM25 else None,
                seed=args.seed,
            )
        )
    counts = json.loads((mined / "mine.json").read_text(encoding="utf-8"))
    for split, fewest in (("train", FEWEST), ("test", FEWEST_JUDGED)):
        if counts["queries"].get(split, 0) < fewest:
            raise ValueError(
                f"Only {counts['queries'].get(split, 0)} {split} queries came of {documents} documents; {fewest} are "
                "needed. Give more documents, more --queries-per-document, or another --generator, and remove "
                f"{work}; mined/mine.json there tells what the filters left out."
            )
    scored = work / "scored.parquet"
    if not scored.exists():
        score.main(
            score.ScoreArguments(
                output=str(scored),
                targets={"documents": {"folders": [str(mined)], "split": "train", "queries": plan["queries"]}},
                teachers=[entry],
                retriever=first_stage,
                retriever_revision=args.teacher_revision if first_stage != BM25 else None,
                tokenizer=args.model,
                tokenizer_revision=args.revision,
                top_k=TOP_K,
                candidates=CANDIDATES - 1,
                passage_tokens=passage_tokens,
                passages_per_document=PASSAGES,
                seed=args.seed,
            )
        )
    adapted, merged = work / "adapted", work / "merged"
    if not (adapted / "trainer_state.json").exists():
        script = train.ScriptArguments(
            model_name_or_path=args.model,
            model_revision=args.revision,
            train_data=str(scored),
            loss="kl",
            attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
            freeze=["embed"],
        )
        train.main(script, training_config(args, adapted, max_length))
    if not merged.exists():
        revisions = {args.model: args.revision} if args.revision else {}
        merge(MergeArguments(models=[args.model, str(adapted)], output_dir=str(merged), revisions=revisions))
    # Another teacher has no part in this: it may be another commit of the model's own repo.
    measured = {args.model: args.revision} | ({teacher.model: teacher.revision} if bi_encoder else {})
    results = evaluate(
        EvaluateArguments(
            models={"general": args.model, "adapted": str(adapted), "merged": str(merged)},
            output_dir=str(work / "evaluation"),
            data=[str(mined)],
            split="test",
            retriever=first_stage,
            revisions={model: commit for model, commit in measured.items() if commit},
            top_k=TOP_K,
            max_queries=JUDGED,
            max_length=max_length,
            fused=False,
            seed=args.seed,
        )
    )
    verdict = judge(results, args.seed)
    words = in_words(verdict, args.output)
    table = (work / "evaluation" / "results.md").read_text(encoding="utf-8")
    readme = card(args, {"documents": counts["documents"], "queries": sum(counts["queries"].values())}, words, table)
    built = work / "built"
    chosen, revision = (str(merged), None) if verdict["better"] else (args.model, args.revision)
    build(chosen, built, readme, max_length=tokenizer.model_max_length, revision=revision)
    write_aside(work / "adaptation.json", json.dumps({"request": request, "verdict": verdict}, indent=1) + "\n")
    built.rename(out)
    for folder in (adapted, merged):  # large, and the better one is in `out`; what was mined and scored may serve again
        rmtree(folder)
    print(words)
    return verdict
