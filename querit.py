"""The `querit` command. Each verb imports what it needs when it runs: `querit --help` answers at once."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

HUB_ID = "querit/querit-reranker-nano"
RELEASED = Path(__file__).parent / "hub_card" / "querit-reranker-nano"
SNIPPET = 160  # characters of a document shown in a table

app = typer.Typer(help="Multilingual rerankers on your own text.", no_args_is_help=True, add_completion=False)


@app.callback()
def querit() -> None:
    """Rerank documents, adapt rerankers to your own, measure them, convert checkpoints."""


def fail(message: str) -> typer.Exit:
    typer.echo(f"querit: {message}", err=True)
    return typer.Exit(1)


def read_documents(files: list[str], column: str) -> Iterator[tuple[str, Any]]:
    """(place, document) of every row: lines of text, objects or strings of JSONL, rows of CSV or TSV."""
    for name in files:
        if name == "-":
            yield from read_rows(sys.stdin, "-", ".txt", column)
            continue
        if Path(name).is_dir():
            raise typer.BadParameter(f"{name} is a folder; name its files.")
        try:
            with open(name, encoding="utf-8-sig", newline="") as file:
                yield from read_rows(file, name, Path(name).suffix.lower(), column)
        except OSError as error:
            raise typer.BadParameter(f"{name}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise fail(f"{name} is not UTF-8 text.") from None


def read_rows(file: TextIO, name: str, suffix: str, column: str) -> Iterator[tuple[str, Any]]:
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)  # a field may hold a whole document
        reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        if column not in (reader.fieldnames or []):
            raise fail(f"{name} has no column {column!r}; it has {reader.fieldnames}. Choose one with --column.")
        for row in reader:
            yield f"{name}:{reader.line_num}", {**row, "text": row[column] or ""}
        return
    for number, line in enumerate(file, 1):
        if not (line := line.strip()):
            continue
        place = f"{name}:{number}"
        if suffix not in (".jsonl", ".ndjson"):
            yield place, line
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise fail(f"{place}: {error}") from None
        if isinstance(row, str):
            yield place, row
        elif isinstance(row, dict) and isinstance(row.get(column), str):
            yield place, {**row, "text": row[column]}
        else:
            raise fail(f"{place}: neither a string nor an object with a text under {column!r}; see --column.")


def load_ranker(model: str, revision: str | None):
    """The pipeline over a folder or Hub repo, with the code installed here: no remote code is run."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from modeling_querit.modeling_querit import QueritForSequenceClassification
    from modeling_querit.pipeline_querit import TextRankingPipeline

    logging.disable_progress_bar()
    try:
        network = QueritForSequenceClassification.from_pretrained(model, revision=revision or "main", dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    return TextRankingPipeline(network, tokenizer=tokenizer)


@app.command()
def rank(
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    files: Annotated[list[str], typer.Argument(help="Text (a document per line), JSONL, CSV, TSV; - reads lines.")],
    top_k: Annotated[int | None, typer.Option(min=1, help="Show only the first so many.")] = None,
    as_json: Annotated[
        bool | None, typer.Option("--json/--table", help="JSON lines or a table; a table on a terminal if not given.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub repo; Nano if not given.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What relevance means here.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hub repo.")] = None,
    column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
) -> None:
    """Order documents by how well they answer a query."""
    rows = list(read_documents(files, column))
    if not rows:
        raise fail("no documents: the input is empty.")
    ranker = load_ranker(model or (str(RELEASED) if RELEASED.exists() else HUB_ID), revision)
    try:
        results = ranker(query, [document for _, document in rows], top_k=top_k, instruction=instruction)
    except (TypeError, ValueError, MemoryError) as error:
        raise fail(str(error)) from None
    for result in results:
        result["source"] = rows[result["index"]][0]
    if as_json is None:
        as_json = not sys.stdout.isatty()
    if as_json:
        for result in results:
            print(json.dumps(result, ensure_ascii=False))
    else:
        show(query, results)


def show(query: str, results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(query), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("", "score", "probability"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    table.add_column("document", ratio=1)
    table.add_column("source", no_wrap=True, max_width=24)
    for place, result in enumerate(results, 1):
        document = result["document"]
        text = " ".join((document if isinstance(document, str) else document["text"]).split())
        shown = text[:SNIPPET] + ("…" if len(text) > SNIPPET else "")
        mark = " (cut to fit the model)" if result["truncated"] else ""
        # Text, not str: brackets in a document are no markup.
        numbers = (f"{place}", f"{result['score']:+.3f}", f"{result['probability']:.3f}")
        source = result["source"].rpartition("/")[2]
        table.add_row(*numbers, Text(shown + mark), Text(source))
    Console().print(table)


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
    retriever: Annotated[str, typer.Option(help="First stage: folder or Hub repo.")] = "Qwen/Qwen3-Embedding-0.6B",
    output: Annotated[Path, typer.Option(help="Folder of the results; a stopped run goes on there.")] = Path(
        "evaluation"
    ),
    top_k: Annotated[int, typer.Option(min=1, help="Candidates reranked per query.")] = 100,
    max_queries: Annotated[
        int | None, typer.Option(min=1, help="Judge only a sample of so many queries a set.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest pair in tokens.")] = None,
) -> None:
    """Measure rerankers on tasks of mteb and judged folders, beside their first stage."""
    try:
        from recipes.evaluate import EvaluateArguments
        from recipes.evaluate import evaluate as measure
    except ImportError as error:
        raise fail(f"{error}. `querit evaluate` needs the extra: pip install querit-reranker[recipes]") from None

    revisions: dict[str, str] = {}

    def unpinned(model: str) -> str:
        name, at, commit = model.rpartition("@")
        if not at or Path(model).exists():
            return model
        revisions[name] = commit
        return name

    paths = [unpinned(model) for model in models]
    names = [Path(path).resolve().name for path in paths]
    try:
        arguments = EvaluateArguments(
            models=dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True)),
            output_dir=str(output),
            data=data or [],
            # The comma of "MTEB(Multilingual, v2)" is part of the name.
            tasks=[name.strip() for name in re.split(r",(?![^(]*\))", tasks or "") if name.strip()],
            retriever=unpinned(retriever),
            revisions=revisions,
            top_k=top_k,
            max_queries=max_queries,
            max_length=max_length,
        )
        measure(arguments)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    typer.echo((output / "results.md").read_text(encoding="utf-8"))


@app.command()
def adapt(
    documents: Annotated[Path, typer.Argument(help="JSONL, CSV, TSV, BEIR folder, or folder of text and Markdown.")],
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
            "The reranker itself if not given."
        ),
    ] = None,
    teacher_revision: Annotated[str | None, typer.Option(help="Commit of a teacher from the Hub.")] = None,
    queries_per_document: Annotated[int, typer.Option(min=1, help="Most queries written for a document.")] = 3,
    budget_minutes: Annotated[float, typer.Option(min=0, help="About how long all of it may take.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of every choice.")] = 0,
) -> None:
    """Adapt a reranker to your own documents, without labels, and say whether it is better."""
    try:
        from recipes.adapt import AdaptArguments
        from recipes.adapt import adapt as run
    except ImportError as error:
        raise fail(f"{error}. `querit adapt` needs the extra: pip install querit-reranker[recipes]") from None

    arguments = AdaptArguments(
        documents=str(documents),
        model=model or (str(RELEASED) if RELEASED.exists() else HUB_ID),
        output=str(output),
        revision=revision,
        generator=generator,
        teacher=teacher,
        teacher_revision=teacher_revision,
        queries_per_document=queries_per_document,
        budget_minutes=budget_minutes,
        seed=seed,
    )
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


if __name__ == "__main__":
    app()
