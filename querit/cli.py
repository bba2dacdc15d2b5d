"""The `querit` command. Each verb imports what it needs when it runs: `querit --help` answers at once."""

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from querit.loading import load, named

app = typer.Typer(
    help="Multilingual rerankers on your own text.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # its default takes the [onnx] of an extra's name for markup
)


@app.callback()
def querit() -> None:
    """Rerank documents, adapt rerankers to your own, measure them, convert checkpoints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal has not must not end a run half-way
            stream.reconfigure(errors="backslashreplace")


def fail(message: str, code: int = 1) -> typer.Exit:
    typer.echo(f"querit: {message}", err=True)
    return typer.Exit(code)


def read_files(names: list[str], column: str) -> list[dict]:
    """The documents of files, folders and `-`, standard input; what is left out is told."""
    from querit.text import document_of, left_out, read_documents, read_rows

    documents: list[dict] = []
    counts: Counter[str] = Counter()
    try:
        for name in names:
            if name == "-":
                lines = io.BytesIO(sys.stdin.buffer.read())
                documents += [document_of(row, place) for place, row in read_rows(lines, "-")]
            else:
                documents += read_documents(name, column, counts)
    except FileNotFoundError as error:
        raise fail(str(error), 2) from None
    except OSError as error:
        raise fail(f"{error.filename}: {error.strerror}", 2) from None
    except ValueError as error:
        raise fail(str(error)) from None
    if left := left_out(counts):
        typer.echo(f"querit: left out: {left}.", err=True)
    if not documents:
        raise fail("no documents: the input is empty.")
    return documents


def load_ranker(model: str, revision: str | None, devices: str | None = None):
    """`querit.load`, its errors in a sentence."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return load(model, revision, devices=devices.split(",") if devices else None)
    except ImportError as error:
        raise fail(f"{error}. An .onnx file needs the extra: pip install querit-reranker[onnx]") from None
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


@app.command()
def rank(
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    files: Annotated[
        list[str],
        typer.Argument(
            help="Text (a document a line), Markdown, HTML, JSON, JSONL, CSV, TSV, each also as .gz; folders of them; "
            "- reads lines of text."
        ),
    ],
    top_k: Annotated[int | None, typer.Option(min=1, help="Show only the first so many.")] = None,
    as_json: Annotated[
        bool | None, typer.Option("--json/--table", help="JSON lines or a table; a table on a terminal if not given.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, Hub repo or .onnx file of an export; Nano if not given.")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="What relevance means here.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hub repo.")] = None,
    column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    long_documents: Annotated[
        Literal["truncate", "max_passage"],
        typer.Option(help="Documents that do not fit: cut, or scored by their best passage."),
    ] = "truncate",
    first_stage: Annotated[
        str | None,
        typer.Option(help="Fuse the order with that of a retriever: the column of its scores, or bm25, computed here."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="Devices that share the work, with commas between: cuda:0,cuda:1.")
    ] = None,
) -> None:
    """Order documents by how well they answer a query."""
    if not query.strip():
        raise fail("the query is empty: say what is looked for.")
    from querit.text import clean, column_of_numbers, joined

    documents = read_files(files, column)
    try:
        scores = column_of_numbers(documents, first_stage) if first_stage not in (None, "bm25") else None
    except ValueError as error:
        raise fail(f"{error} --first-stage names a column of numbers, or is bm25.") from None
    ranker = load_ranker(named(model), revision, devices)
    if first_stage == "bm25":
        from querit.bm25 import BM25

        scores = BM25(ranker.tokenizer, map(joined, documents)).scores(query).tolist()
    try:
        results = ranker(
            query,
            documents,
            top_k=top_k,
            instruction=instruction,
            long_documents=long_documents,
            first_stage_scores=scores,
        )
    except (TypeError, ValueError, MemoryError, RuntimeError) as error:
        raise fail(str(error)) from None
    if as_json is None:
        as_json = not sys.stdout.isatty()
    if not as_json:
        from querit.table import show_ranking

        show_ranking(query, results, documents)
        return
    for result in results:
        document = result["document"]
        row = document["row"]
        # As it came; where the text stood in a column of another name, it can be found under `text` too.
        result["document"] = {"text": document["text"], **row} if isinstance(row, dict) else row
        result["source"] = document["source"]
        line = clean(json.dumps(result, ensure_ascii=False, allow_nan=False)) + "\n"
        typer.echo(line.encode(), nl=False)  # bytes: UTF-8, whatever the locale


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder as published.")],
    output: Annotated[Path, typer.Argument(help="Hub folder to write; must not exist.")],
) -> None:
    """Turn a checkpoint as published into a folder that every engine loads."""
    from hub_card.convert import convert as convert_checkpoint

    try:
        convert_checkpoint(source, output)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    typer.echo(f'{output}: load it with pipeline("text-ranking", model="{output}", trust_remote_code=True)')


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Rerankers: folders or Hub repos; REPO@COMMIT pins one.")],
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or benchmarks of mteb, with commas between: SciFact,BEIR.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="BEIR folder with qrels; may be given many times.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the folders' qrels; the only one, or test, if not given.")
    ] = None,
    retriever: Annotated[
        str, typer.Option(help="First stage: folder or Hub repo; REPO@COMMIT pins one.")
    ] = "Qwen/Qwen3-Embedding-0.6B",
    output: Annotated[Path, typer.Option(help="Folder of the results; a stopped run goes on there.")] = Path(
        "evaluation"
    ),
    top_k: Annotated[int, typer.Option(min=1, help="Candidates reranked per query.")] = 100,
    max_queries: Annotated[
        int | None, typer.Option(min=1, help="Judge only a sample of so many queries a set.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest pair in tokens.")] = None,
) -> None:
    """Measure rerankers on tasks of mteb and judged folders, beside their first stage.

    Of a folder whose qrels have several splits, test is measured unless --split names another.
    """
    try:
        from recipes.evaluate import EvaluateArguments
        from recipes.evaluate import evaluate as measure
    except ImportError as error:
        raise fail(f"{error}. `querit evaluate` needs the extra: pip install querit-reranker[recipes]") from None

    def name_of(path: str) -> str:
        return Path(path if Path(path).exists() else path.partition("@")[0]).resolve().name

    paths = [named(model) for model in models]
    names = [name_of(path) for path in paths]
    try:
        arguments = EvaluateArguments(
            # Two that are called the same, as two commits of a repo, are told apart by what was typed.
            models=dict(zip(names if len(set(names)) == len(names) else models, paths, strict=True)),
            output_dir=str(output),
            data=data or [],
            # The comma of "MTEB(Multilingual, v2)" is part of the name.
            tasks=[name.strip() for name in re.split(r",(?![^(]*\))", tasks or "") if name.strip()],
            split=split,
            retriever=retriever,
            top_k=top_k,
            max_queries=max_queries,
            max_length=max_length,
        )
        measure(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise fail(str(error)) from None
    table = (output / "results.md").read_text(encoding="utf-8")
    if sys.stdout.isatty():
        from querit.table import show_results

        show_results(table)
    else:
        typer.echo(table.encode(), nl=False)


@app.command()
def adapt(
    documents: Annotated[Path, typer.Argument(help="Folder or file: text, Markdown, HTML, JSON, JSONL, CSV, TSV.")],
    output: Annotated[Path, typer.Option(help="Folder of the new reranker; must not exist.")],
    model: Annotated[str | None, typer.Option(help="Reranker to adapt: folder or Hub repo; Nano if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hub repo.")] = None,
    generator: Annotated[
        str,
        typer.Option(
            help="Who writes queries: crop (cut from documents), a causal LM's folder, .gguf file or Hub repo, "
            "or URL#MODEL of an OpenAI-compatible server."
        ),
    ] = "crop",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Who scores candidates: sentence-transformers or Querit model; the larger, the better. "
            "The reranker and its first stage together if not given."
        ),
    ] = None,
    teacher_revision: Annotated[str | None, typer.Option(help="Commit of a teacher from the Hub.")] = None,
    column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    first_stage: Annotated[
        str | None,
        typer.Option(help="Embedding model that finds candidates. A teacher that is one, else BM25, if not given."),
    ] = None,
    queries_per_document: Annotated[int, typer.Option(min=1, help="Most queries written for a document.")] = 3,
    budget_minutes: Annotated[float, typer.Option(min=0, max=100_000, help="About how long all of it may take.")] = 30,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every choice.")] = 0,
) -> None:
    """Adapt a reranker to your own documents, without labels, and say whether it is better."""
    try:
        from recipes.adapt import AdaptArguments
        from recipes.adapt import adapt as run
    except ImportError as error:
        raise fail(f"{error}. `querit adapt` needs the extra: pip install querit-reranker[recipes]") from None

    arguments = AdaptArguments(
        documents=str(documents),
        model=named(model),
        output=str(output),
        revision=revision,
        generator=generator,
        teacher=teacher,
        teacher_revision=teacher_revision,
        column=column,
        first_stage=first_stage,
        queries_per_document=queries_per_document,
        budget_minutes=budget_minutes,
        seed=seed,
    )
    try:
        run(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise fail(str(error)) from None


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Release folder, as `querit build` makes it.")],
    repo: Annotated[str, typer.Argument(help="Hub repo: NAMESPACE/NAME. Made if there is none.")],
    private: Annotated[bool, typer.Option(help="Make a new repo private; refuse one that is public.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if new; main if not given.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request to main instead.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only show what would change.")] = False,
    yes: Annotated[bool, typer.Option(help="Change and delete files there without asking.")] = False,
) -> None:
    """Verify a release folder, show what would change on the Hub, upload it, and tag main with the version."""
    from hub_card.publish import plan_release, upload

    try:
        plan = plan_release(folder, repo, private, revision, create_pr, dry_run)
        typer.echo(plan)
        if dry_run:
            typer.echo("Dry run: nothing was changed.")
            return
        if plan.overwrites and not yes and not typer.confirm(f"Change what {repo} has there?"):
            raise fail("nothing was published.")
        typer.echo(upload(plan))
    except typer.Abort:
        raise fail("nobody answered, and nothing was published. --yes publishes without asking.") from None
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Folder of a Querit reranker.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    to: Annotated[Literal["vllm", "onnx"], typer.Option(help="The engine.")],
) -> None:
    """Write a reranker for another engine, once its scores there are checked against the model's.

    vllm: a causal member (qwen3, deepseek_v3) as a classifier with one label. Order and probability are kept; Querit's
    score is 2 * probability - 1. In transformers' own class, which has no bias, the order alone is kept, until
    score_bias of config.json is added to its logits.

    onnx: a bidirectional member (bert, as Nano), head included. onnx/model.onnx keeps order, score and probability;
    onnx/model_int8.onnx is smaller and keeps them nearly. Needs the extra: pip install querit-reranker[onnx]
    """
    from hub_card.export import export as write

    try:
        write(source, output, to)
    except ImportError as error:
        raise fail(f"{error}. `--to onnx` needs the extra: pip install querit-reranker[onnx]") from None
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    typer.echo(f"{output}: README.md there says how to run it and what it keeps.")


@app.command()
def build(
    checkpoint: Annotated[str, typer.Argument(help="Trained checkpoint, or a release: folder or Hub repo.")],
    folder: Annotated[Path, typer.Argument(help="Release folder to write; a model that stands there is replaced.")],
    card: Annotated[
        str | None, typer.Option(help="Member whose card it gets; by the names of the folders if not given.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Results for the card: output_dir of recipes.evaluate.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest pair in tokens; the tokenizer's if not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16, fp16 or fp32.")] = "bf16",
    revision: Annotated[str | None, typer.Option(help="Commit of a Hub repo.")] = None,
) -> None:
    """Make the exact folder that is uploaded: weights, code, prompt, card, results, checksums."""
    from hub_card.build import DTYPES
    from hub_card.build import build as write
    from hub_card.card import member_of, render

    if dtype not in DTYPES:
        raise fail(f"--dtype is one of {', '.join(DTYPES)}, not {dtype}.")
    member = card or member_of(checkpoint, folder)
    try:
        write(
            checkpoint,
            folder,
            lambda built: render(built, member, results),
            max_length=max_length,
            revision=revision,
            dtype=DTYPES[dtype],
        )
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    typer.echo(f"{folder}: {f'the card of {member}' if member else 'a plain card'}. Check it: querit verify {folder}")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Release folder.")]) -> None:
    """Check a release folder: hashes, tensors, code, card, and that every engine scores the same."""
    from transformers.utils import logging

    from hub_card.verify import report

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that another engine leaves our head out is no news
    found = 0
    for name, problems in report(folder):
        typer.echo(f"{'wrong' if problems else 'ok':6}{name}")
        for problem in problems:
            typer.echo(f"      {problem}", err=True)
        found += len(problems)
    if found:
        raise fail(f"{folder} has {found} problem{'s' if found > 1 else ''}.")


@app.command()
def demo(
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or NAME=REPO@COMMIT; several to compare; Nano if not given.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; only this machine if not given.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; a free one from 7860 on if not given.")
    ] = None,
) -> None:
    """Open the page: rank, explain, compare and measure in a browser."""
    try:
        from space_app.app import start
        from space_app.models import configured
    except ImportError as error:
        raise fail(f"{error}. `querit demo` needs the extra: pip install querit-reranker[space]") from None
    try:
        start(configured(model), host, port)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


@app.command()
def space(folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")]) -> None:
    """Write the folder that is uploaded as a Hugging Face Space."""
    from space_app.export import export

    try:
        export(folder)
    except OSError as error:
        raise fail(str(error)) from None
    typer.echo(f"{folder}: upload it with hf upload USER/SPACE {folder} . --repo-type space")


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="Folder, Hub repo or .onnx file; Nano if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hub repo.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    devices: Annotated[
        str | None, typer.Option(help="Devices that share the work, with commas between: cuda:0,cuda:1.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="File with a key a line; of QUERIT_API_KEYS, or none, if not given.")
    ] = None,
    max_documents: Annotated[int, typer.Option(min=1, help="Most documents of a request.")] = 1000,
    max_characters: Annotated[int, typer.Option(min=1, help="Most characters of a request.")] = 2_000_000,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 10_000_000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests taken at once; more are told to come back.")] = 128,
    timeout: Annotated[float, typer.Option(min=0.1, max=86400, help="Seconds until a request is given up.")] = 60,
) -> None:
    """Serve the rerank APIs of Jina, Cohere, text-embeddings-inference and vLLM."""
    try:
        from querit.serve.admission import Limits
        from querit.serve.server import check_address, read_keys
        from querit.serve.server import serve as run
    except ImportError as error:
        raise fail(f"{error}. `querit serve` needs the extra: pip install querit-reranker[serve]") from None
    try:
        keys = read_keys(api_keys)
        check_address(host, port)  # before a model is loaded for it
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    source = named(model)
    limits = Limits(max_documents, max_characters, max_body_bytes, timeout, max_waiting)
    name = Path(source).resolve().name if Path(source).exists() else source
    ranker = load_ranker(source, revision, devices)
    try:
        run(ranker, name, host, port, limits, keys)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        raise fail(str(error)) from None


if __name__ == "__main__":
    app()
