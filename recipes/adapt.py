"""From documents without labels to a reranker that is better on them, or to the word that it is not: `querit adapt`.

    querit adapt handbook/ --model hub_card/querit-reranker-nano --output my-reranker

Writes a recipe for one's own documents into `<output>.work`, a YAML a stage, and runs it as recipes.run does: queries
are written (1_mine) and the model judged as it is (2_evaluate_before), the teacher scores candidates (3_score), the
model is trained on its soft labels (4_adapt), merged with what it was (5_merge) and judged again, on the same queries
of documents held aside (6_evaluate_after). A run that was stopped goes on; to change something, edit the YAMLs and run
the command again: what depends on it is made anew.
"""

import json
import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer
from transformers.utils import logging

from hub_card.build import build
from querit.files import write_json, write_text
from querit.text import joined
from recipes.lib import verdict as words_of
from recipes.lib.adaptation import AdaptArguments, Roles, generator_entry, located, recipe, roles_of
from recipes.lib.budget import FEWEST, FEWEST_JUDGED, Corpus, Pace, Size, best_time, choose, seconds_of
from recipes.lib.documents import detect_language, read_documents
from recipes.lib.generators import QueryWriter
from recipes.lib.progress import Bar, Steps
from recipes.lib.retrieval import BM25
from recipes.lib.stages import Stage, read_stages
from recipes.lib.teachers import Teacher, load_cross_encoder, load_querit
from recipes.run import launch_here, run_stage, state_of

SAMPLE = 16  # documents that tell how long they are, and how fast the models
TIMED = 3  # of them, those on which a generator is timed: a language model takes seconds for each
TIMED_TOKENS = 128
PLAN, VERDICT, PROGRESS, LOG = "plan.json", "adaptation.json", "progress.json", "log.txt"
STEPS = {  # stage -> what it does, as the plan's seconds are named
    "1_mine": ("mine", "Writing queries"),
    "2_evaluate_before": ("before", "Judging the model as it is"),
    "3_score": ("score", "Scoring candidates"),
    "4_adapt": ("adapt", "Training"),
    "5_merge": ("merge", "Merging with the model as it was"),
    "6_evaluate_after": ("after", "Judging what came of it"),
}


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


def measure_pace(args: AdaptArguments, roles: Roles, generator: dict[str, Any], sample: list[dict]) -> Pace:
    """The pace here, by a sample of the documents. Raises what writing_time does."""
    written = writing_time(args, generator, sample)
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision or "main")
    texts = [joined(document)[: 4 * TIMED_TOKENS] for document in sample]
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) or 1

    def reading(model: Teacher) -> float:
        score = load_querit(model, 32) if model.kind == "querit" else load_cross_encoder(model, 32)
        return best_time(lambda: score([texts[0][:60]], [texts])) / tokens

    own = Teacher(located(args.model), args.revision, "querit")
    model, teaching = reading(own), 0.0
    for teacher in roles.teachers:
        if teacher.kind in ("querit", "cross-encoder"):
            same = (teacher.model, teacher.revision) == (own.model, own.revision)
            teaching += model if same else reading(teacher)
    encoders = {(teacher.model, teacher.revision) for teacher in roles.teachers if teacher.kind == "bi-encoder"}
    if roles.first_stage != BM25:
        encoders.add((roles.first_stage, roles.first_stage_revision))
    encoding = 0.0
    for name, revision in sorted(encoders, key=str):
        encoder = SentenceTransformer(name, revision=revision)
        encoding += best_time(partial(encoder.encode, texts)) / tokens
    return Pace(model, teaching, encoding, written)


def read_sample(args: AdaptArguments) -> tuple[list[dict], int]:
    """-> some of the documents, spread over all of them, and how many there are."""
    documents = list(enumerate(read_documents(args.documents, column=args.column)))
    if len(documents) < FEWEST:
        raise ValueError(f"{args.documents} has {len(documents)} documents; an adaptation needs some hundreds.")
    step = max(1, len(documents) // SAMPLE)
    return [document for place, document in documents if place % step == 0][:SAMPLE], len(documents)


def make_plan(args: AdaptArguments, work: Path) -> None:
    """Measure, choose, and write the YAMLs and the plan. Raises ValueError for what cannot be adapted."""
    generator, roles = generator_entry(args.generator), roles_of(args)
    sample, documents = read_sample(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision or "main")
    ids = tokenizer([joined(document) for document in sample], add_special_tokens=False, verbose=False)["input_ids"]
    corpus = Corpus(tuple(map(len, ids)), documents, args.queries_per_document)
    pace = measure_pace(args, roles, generator, sample)
    size, queries = choose(args.budget_minutes, pace, corpus)
    size = Size(**asdict(size) | {"max_length": min(size.max_length, tokenizer.model_max_length)})
    seconds = seconds_of(size, queries, pace, corpus)
    stages = recipe(args, roles, generator, size, queries, documents, work)
    for name, config in stages.items():
        write_text(work / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    minutes = math.ceil(sum(seconds.values()) / 60)
    name = Path(args.documents).resolve().name
    words = (
        f"{documents:,} documents in {name}. About {queries + size.judged:,} queries are written "
        f"for {stages['1_mine']['sample']:,} of them; {roles.words} score {size.top_k} candidates for each of "
        f"{queries:,}, the model is trained on that, and up to {size.judged} queries of documents held aside judge it "
        f"before and after. {len(stages)} steps, about {minutes} minutes."
    )
    plan = {"request": request_of(args), "words": words, "seconds": seconds}
    write_json(work / PLAN, plan | {"teacher": roles.words, "system": roles.system})


def request_of(args: AdaptArguments) -> dict[str, Any]:
    """What a run that goes on must be asked for again. Contents are watched over by the stages' records."""
    paths = {"documents": str(Path(args.documents).resolve()), "model": located(args.model), "output": ""}
    return asdict(args) | paths


def read_plan(args: AdaptArguments, work: Path) -> dict[str, Any]:
    plan = json.loads((work / PLAN).read_text(encoding="utf-8"))
    if changed := [key for key, value in request_of(args).items() if plan["request"].get(key) != value]:
        raise ValueError(
            f"{work} was planned with other options ({', '.join(changed)} changed). Give those as before and edit the "
            "YAMLs there, or remove it, or name another --output."
        )
    return plan


def check_queries(mined: Path) -> None:
    counts = json.loads((mined / "mine.json").read_text(encoding="utf-8"))
    for split, fewest in (("train", FEWEST), ("test", FEWEST_JUDGED)):
        if (found := counts["queries"].get(split, 0)) < fewest:
            raise ValueError(
                f"Only {found} {split} queries came of {counts['documents']} documents; {fewest} are needed. Give more "
                f"documents, more --queries-per-document, or another --generator, and remove {mined.parent}; "
                "mined/mine.json there tells what the filters left out."
            )


def results_in(work: Path, when: str) -> dict:
    return json.loads((work / f"evaluation_{when}" / "results.json").read_text(encoding="utf-8"))


def run_steps(stages: list[Stage], plan: dict, work: Path, seed: int) -> dict[str, Any]:
    """Run the stages under one bar. -> the verdict, early where what was judged before says that training is no use."""
    steps = Steps({stage.name: plan["seconds"].get(STEPS.get(stage.name, ("",))[0], 1.0) for stage in stages})
    bar = Bar(steps, {name: title for name, (_, title) in STEPS.items()}, work / PROGRESS)
    with bar.shown():
        for stage in stages:
            with bar.step(stage.name, work / LOG):
                ran = run_stage(stage, stages, launch_here)
            steps.end(time.monotonic(), taken_over=not ran)
            if stage.name == "1_mine":
                check_queries(work / "mined")
            if stage.name == "2_evaluate_before":
                before = results_in(work, "before")
                if why := words_of.no_use(before, plan["system"], seed):
                    queries = len(words_of.values(before, "general"))
                    return {"queries": queries, "better": False, "not_tried": why}
    return words_of.judge(results_in(work, "before"), results_in(work, "after"), seed)


def write_output(args: AdaptArguments, plan: dict, verdict: dict, work: Path, out: Path) -> None:
    """Build the better of the two models, with a card that says which it is."""
    counts = json.loads((work / "mined" / "mine.json").read_text(encoding="utf-8"))
    how = (
        f"{counts['documents']:,} documents without labels, {sum(counts['queries'].values()):,} queries written by "
        f"`{args.generator}`, candidates scored by {plan['teacher']}."
    )
    found = [work / f"evaluation_{when}" / "results.md" for when in ("before", "after")]
    tables = [path.read_text(encoding="utf-8") for path in found if path.exists()]
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision or "main")
    chosen, revision = (str(work / "merged"), None) if verdict["better"] else (args.model, args.revision)
    readme = words_of.card(args.model, args.output, how, verdict, tables)
    built = work / "built"
    build(chosen, built, readme, max_length=tokenizer.model_max_length, revision=revision)
    write_json(work / VERDICT, {"request": plan["request"], "verdict": verdict})
    built.rename(out)
    for name in (
        "adapted",
        "merged",
    ):  # large, and the better one is in `out`; what was mined and scored may serve again
        rmtree(work / name, ignore_errors=True)


def adapt(args: AdaptArguments) -> dict[str, Any]:
    """Write the better of the adapted and the given model to `args.output`. -> the verdict.

    It stands in `<output>.work/adaptation.json` too, beside the YAMLs, the queries and the scores.

    Raises ValueError for documents, models and budgets that cannot be used, FileExistsError if the output is there.
    """
    out = Path(args.output)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another output, or move it away.")
    if Path(args.documents).resolve() in out.resolve().parents:
        raise ValueError(
            f"{out} is inside {args.documents}: what is written there would be read as documents. Name an --output "
            "outside."
        )
    work = out.with_name(f"{out.name}.work").resolve()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    goes_on = (work / PLAN).exists()
    if not goes_on:
        make_plan(args, work)
    plan = read_plan(args, work)
    print(plan["words"])
    stages = read_stages(work)
    if goes_on:
        kept = [STEPS[stage.name][1].lower() for stage in stages if stage.name in STEPS and not state_of(stage)[0]]
        print(f"Going on in {work}. Taken over from before: {', '.join(kept) or 'the plan'}.")
    else:
        print(f"Each step is a YAML in {work}; to change something, edit it and give the same command again.")
    try:
        verdict = run_steps(stages, plan, work, args.seed)
        write_output(args, plan, verdict, work, out)
    except KeyboardInterrupt:
        print(f"\nStopped. What was done is kept in {work}: the same command goes on from there.", file=sys.stderr)
        raise
    words = words_of.in_words(verdict, args.output)
    print(words)
    return verdict
