"""The stages of an adaptation, as YAMLs: who teaches, who finds candidates, and what each stage is told."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.lib.budget import KEPT, Size
from recipes.lib.retrieval import BM25, encoding_dtype
from recipes.lib.teachers import Teacher, read_teachers
from recipes.lib.verdict import public_name

PASSAGES = 3  # leading passages of a document among which the candidates are


@dataclass
class AdaptArguments:
    documents: str = field(
        metadata={"help": "Folder or file: text, Markdown, HTML, JSON(L), CSV, TSV; each also as .gz."}
    )
    model: str = field(metadata={"help": "The Querit reranker to adapt: folder or Hub id."})
    output: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    revision: str | None = field(default=None, metadata={"help": "Commit of a model from the Hub."})
    generator: str = field(
        default="crop", metadata={"help": "crop, a causal LM (folder, .gguf file or Hub id), or URL#MODEL of a server."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Bi-encoder, cross-encoder or Querit model; the model with its first stage if not given."},
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Commit of a teacher from the Hub."})
    first_stage: str | None = field(
        default=None,
        metadata={"help": "Bi-encoder that finds candidates; a teacher that is one, else bm25, if not given."},
    )
    queries_per_document: int = field(default=3, metadata={"help": "Most queries written for a document."})
    budget_minutes: float = field(default=30.0, metadata={"help": "About how long all of it may take."})
    column: str = field(default="text", metadata={"help": "Column or key that holds the documents' text."})
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
        file = Path(generator).resolve()
        return {"kind": "local", "model": str(file.parent), "gguf_file": file.name}
    return {"kind": "local", "model": located(generator)}


def located(name: str) -> str:
    """A folder's whole path, so that the YAMLs hold wherever they are run; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def entry_of(model: str, revision: str | None) -> dict[str, str]:
    return {"model": located(model)} | ({"revision": revision} if revision else {})


@dataclass
class Roles:
    """Who does what in an adaptation."""

    teachers: list[Teacher]
    entries: list[dict[str, str]]  # of the teachers, as the YAML of recipes.score has them
    first_stage: str
    first_stage_revision: str | None
    system: str | None  # the system of the judging before that ranks as the teachers do, where there is one
    words: str  # who teaches, for people


def roles_of(args: AdaptArguments) -> Roles:
    """By default the model and its first stage teach together: a model learns nothing from its own scores alone."""
    if args.teacher is None:
        first = located(args.first_stage or BM25)
        entries = [entry_of(args.model, args.revision), {"model": first}]
        named = "BM25" if first == BM25 else public_name(first)
        words = f"{public_name(args.model)} and {named} together"
        return Roles(read_teachers(entries), entries, first, None, "general + first stage", words)
    entry = entry_of(args.teacher, args.teacher_revision)
    teachers, words = read_teachers([entry]), public_name(args.teacher)
    if args.first_stage:
        return Roles(teachers, [entry], located(args.first_stage), None, None, words)
    if teachers[0].kind == "bi-encoder":
        return Roles(teachers, [entry], entry["model"], args.teacher_revision, "retriever", words)
    if entry == entry_of(args.model, args.revision) and args.generator == "crop":
        raise ValueError(
            f"{args.model} cannot teach itself on queries cut out of the documents: before and after would be the "
            "same. Leave out --teacher (its first stage then has a say), name a stronger one, or a language model "
            "that asks what people ask as --generator."
        )
    return Roles(teachers, [entry], BM25, None, None, words)


def training(args: AdaptArguments, size: Size, work: Path) -> dict[str, Any]:
    """4_adapt.yaml. What the machine can do is settled here, once: a run that goes on must not choose otherwise."""
    cuda = torch.cuda.is_available()
    return {
        "model_name_or_path": located(args.model),
        **({"model_revision": args.revision} if args.revision else {}),
        "train_data": str(work / "scored.parquet"),
        "output_dir": str(work / "adapted"),
        "loss": "kl",
        "attn_implementation": "sdpa" if cuda else "eager",
        "freeze": ["embed"],
        "max_length": size.max_length,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "weight_decay": 0.01,
        "bf16": cuda or encoding_dtype() == "bfloat16",
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,  # a 4B model would not fit without; on a CPU memory is not what is scarce
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 10,
        "save_steps": 50,
        "save_total_limit": 2,
        "report_to": "none",
        "seed": args.seed,
    }


def judging(args: AdaptArguments, roles: Roles, size: Size, work: Path, models: dict[str, str]) -> dict[str, Any]:
    revisions = {located(args.model): args.revision, roles.first_stage: roles.first_stage_revision}
    return {
        "models": models,
        "output_dir": str(work / f"evaluation_{'after' if 'merged' in models else 'before'}"),
        "data": [str(work / "mined")],
        "split": "test",
        "retriever": roles.first_stage,
        "revisions": {model: revision for model, revision in revisions.items() if revision},
        "top_k": size.top_k,
        "max_queries": size.judged,
        "max_length": size.max_length,
        "fused": "general" in models,
        "seed": args.seed,
    }


def recipe(
    args: AdaptArguments, roles: Roles, generator: dict, size: Size, queries: int, documents: int, work: Path
) -> dict[str, dict]:
    """Stage -> its YAML."""
    model, mined, retriever = located(args.model), str(work / "mined"), roles.first_stage
    per_document = args.queries_per_document
    asked = min(documents, math.ceil((queries + size.judged) / KEPT / per_document))
    lexical = {"retriever_tokenizer": model} if retriever == BM25 else {}
    of_bm25 = {"retriever_revision": args.revision} if retriever == BM25 and args.revision else {}
    dense = {"retriever_revision": roles.first_stage_revision} if roles.first_stage_revision else {}
    revisions = {"revisions": {model: args.revision}} if args.revision else {}
    return {
        "1_mine": {
            "documents": str(Path(args.documents).resolve()),
            "column": args.column,
            "output_dir": mined,
            "generators": [generator],
            "sample": asked,
            "queries_per_document": per_document,
            "held_aside": round(min(0.4, max(0.2, size.judged / (asked * per_document * KEPT))), 2),
            "retriever": retriever,
            **lexical,
            **of_bm25,
            **dense,
            "seed": args.seed,
        },
        "2_evaluate_before": judging(args, roles, size, work, {"general": model}),
        "3_score": {
            "output": str(work / "scored.parquet"),
            "targets": {"documents": {"folders": [mined], "split": "train", "queries": queries}},
            "teachers": roles.entries,
            "retriever": retriever,
            **dense,
            "tokenizer": model,
            **({"tokenizer_revision": args.revision} if args.revision else {}),
            "top_k": size.top_k,
            "candidates": size.candidates - 1,
            "passage_tokens": size.max_length - 48,
            "passages_per_document": PASSAGES,
            "seed": args.seed,
        },
        "4_adapt": training(args, size, work),
        "5_merge": {"models": [model, str(work / "adapted")], "output_dir": str(work / "merged"), **revisions},
        "6_evaluate_after": judging(args, roles, size, work, {"merged": str(work / "merged")}),
    }
