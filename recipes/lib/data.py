"""Reading BEIR folders: `corpus.jsonl`, `queries.jsonl` (either may be gzipped) and `qrels/<split>.tsv`."""

from collections.abc import Iterator
from pathlib import Path

from querit.text import as_text, is_litter, joined, of_one_value, read_json_lines, read_judgements, read_lines

# What every row must say.
KEYS = {"corpus": ("_id", "text"), "queries": ("_id", "text"), "top_ranked": ("query-id", "corpus-ids")}
TEXTS = ("_id", "title", "text", "query-id")  # of these, numbers become their text


def read_jsonl(folder: str | Path, name: str) -> Iterator[dict]:
    """Rows of `<folder>/<name>.jsonl` or `.jsonl.gz`. ValueError for one that lacks its id or its text."""
    path = Path(folder) / f"{name}.jsonl"
    packed = Path(f"{path}.gz")
    if not path.parent.exists():
        raise FileNotFoundError(f"{folder} does not exist.")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(f"{folder} is no BEIR folder: it has neither {name}.jsonl nor {name}.jsonl.gz.")
    path = path if path.exists() else packed
    for number, row in read_json_lines(path):
        for key in KEYS[name]:
            if not isinstance(row, dict) or row.get(key) is None:
                raise ValueError(f"{path}:{number}: no text under `{key}`; every row needs one.")
        yield row | {key: as_text(row[key], f"{path}:{number}", key) for key in TEXTS if key in row}


def read_corpus(folder: str | Path) -> dict[str, str]:
    """Document id -> its title and text, joined as they are for a model that ranks them."""
    return of_one_value(((row["_id"], joined(row)) for row in read_jsonl(folder, "corpus")), f"{folder}/corpus.jsonl")


def read_queries(folder: str | Path) -> dict[str, str]:
    return of_one_value(((row["_id"], row["text"]) for row in read_jsonl(folder, "queries")), f"{folder}/queries.jsonl")


def qrels_files(folder: str | Path) -> list[Path]:
    """One a split. Other systems' files (`._test.tsv`) are none."""
    return sorted(file for file in (Path(folder) / "qrels").glob("*.tsv") if not is_litter(file.name))


def read_qrels(folder: str | Path, split: str | None = None) -> dict[str, dict[str, int]]:
    """Query id -> {document id: relevance} of one split, or of the only one."""
    files = [file for file in qrels_files(folder) if split in (None, file.stem)]
    if len(files) != 1:
        raise FileNotFoundError(f"{folder}/qrels has {[f.name for f in files]}; name the split to read.")
    with files[0].open("rb") as file:
        return read_judgements(read_lines(file, str(files[0])), str(files[0]))


def read_top_ranked(folder: str | Path) -> dict[str, list[str]] | None:
    """Query id -> candidate ids where the folder lists them, else None."""
    if not (Path(folder) / "top_ranked.jsonl").exists():
        return None
    place = f"{folder}/top_ranked.jsonl"
    ranked = []
    for row in read_jsonl(folder, "top_ranked"):
        if not isinstance(row["corpus-ids"], list):
            raise ValueError(f"{place}, query {row['query-id']}: corpus-ids must be a list of ids.")
        ranked.append((row["query-id"], [as_text(key, place, "corpus-ids") for key in row["corpus-ids"]]))
    return of_one_value(ranked, place)
