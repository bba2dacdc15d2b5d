"""The `querit` command. Each verb imports what it needs when it runs: `querit --help` answers at once."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

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
        separator = "\t" if suffix == ".tsv" else ","
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        begin = 1  # where a row begins: a quote that is not closed runs on to the end
        try:
            if column not in (reader.fieldnames or []):
                raise fail(f"{name} has no column {column!r}; it has {reader.fieldnames}. Choose one with --column.")
            begin = reader.line_num + 1
            for row in reader:
                place, begin = f"{name}:{reader.line_num}", reader.line_num + 1
                if None in row:
                    raise fail(
                        f"{place}: more fields than columns. Put text that holds {separator!r} in double quotes."
                    )
                yield place, {**row, "text": row[column] or ""}
        except csv.Error as error:
            raise fail(
                f"{name}:{begin}: {error}. A field that begins with a quote must end with one, and quotes "
                "inside it must be doubled."
            ) from None
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


def named(model: str | None) -> str:
    """The folder or Hub repo that a name stands for; the released Nano's own name, or none, is Nano."""
    if model is None or (model == RELEASED.name and not Path(model).exists()):
        return str(RELEASED) if RELEASED.exists() else HUB_ID
    return model


def load_ranker(model: str, revision: str | None, devices: str | None = None):
    """The pipeline over a folder or Hub repo, with the code installed here: no remote code is run."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from hub_card.download import download
    from modeling_querit.modeling_querit import QueritForSequenceClassification
    from modeling_querit.pipeline_querit import TextRankingPipeline

    logging.disable_progress_bar()
    if model.endswith(".onnx"):
        if devices:
            raise fail("--devices is not for .onnx files, which use every core by themselves.")
        try:
            from hub_card.exported_onnx import load_onnx_ranker

            return load_onnx_ranker(model)
        except ImportError as error:
            raise fail(f"{error}. An .onnx file needs the extra: pip install querit-reranker[onnx]") from None
        except (OSError, ValueError) as error:
            raise fail(str(error)) from None
    try:
        folder = Path(model) if Path(model).exists() else download(model, revision)
        network = QueritForSequenceClassification.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TextRankingPipeline(network, tokenizer=tokenizer, devices=devices.split(",") if devices else None)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


@app.command()
def rank(
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    files: Annotated[list[str], typer.Argument(help="Text (a document per line), JSONL, CSV, TSV; - reads lines.")],
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
    devices: Annotated[
        str | None, typer.Option(help="Devices that share the work, with commas between: cuda:0,cuda:1.")
    ] = None,
) -> None:
    """Order documents by how well they answer a query."""
    rows = list(read_documents(files, column))
    if not rows:
        raise fail("no documents: the input is empty.")
    ranker = load_ranker(named(model), revision, devices)
    try:
        results = ranker(query, [document for _, document in rows], top_k=top_k, instruction=instruction)
    except (TypeError, ValueError, MemoryError, RuntimeError) as error:
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
        model=named(model),
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
    port: Annotated[int | None, typer.Option(help="Port; a free one from 7860 on if not given.")] = None,
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


if __name__ == "__main__":
    app()
