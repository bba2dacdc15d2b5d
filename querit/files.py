"""Files that are whole or not there, hashes that tell contents apart, and the record of what an output was made from.

A record stands beside its output, `<output>.run.json`:

    {"state": "started" or "done", "config": {...}, "inputs": {path: hash}, "code": {file: hash}, "output": hash, ...}

Why not DVC or the fingerprints of `datasets`, which were looked at first: DVC compares whole files of code, so that a
comment would train a model anew; before a stage runs it deletes what stands of its output, and a stopped training could
not go on; and it wants a repository and a command of its own. `datasets` hashes a pickled function with its arguments:
that tells equal from other within one version of Python and of each library, and never what has changed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's names, sizes and files.

    A trainer's checkpoints do not count: they may be deleted once training is over.
    """
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith("checkpoint-") or part == "__pycache__" for part in name.parts):
            digest.update(f"{name.as_posix()}\0{file.stat().st_size}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def appears_whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path`, to write a file or folder to; it takes the name of `path` when the block has ended well.

    Nothing stands there at first, whatever a run that was killed has left; an error removes it. A file at `path` is
    replaced; a folder must not stand there, or be empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.writing")
    remove(aside)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        remove(aside)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text that appears only when it is whole."""
    with appears_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file that appears only when it is whole."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def record_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.run.json")


def read_record(output: Path) -> dict[str, Any] | None:
    path = record_path(output)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_record(output: Path, record: dict[str, Any]) -> None:
    write_json(record_path(output), record)
