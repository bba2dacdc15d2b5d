"""What an output was made from: its stage's config, code and inputs, kept beside it in `<output>.run.json`.

A record says `started` while its stage runs and `done` once the output is whole, with the output's own hash. Some
outputs tell by themselves what settings made them: see `already_made`.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from modulefinder import ModuleFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from querit.files import appears_whole, content_hash, file_hash

if TYPE_CHECKING:
    from datasets import Dataset

ROOT = Path(__file__).parents[2]
PACKAGES = {"hub_card", "modeling_querit", "querit", "recipes", "space_app"}
# Files that a module reads by itself, without being told by a config.
CODE_DATA = {
    "recipes/backbone.py": "modeling_querit/chat_template.jinja",
    "recipes/lib/generators.py": "recipes/lib/prompts/*.txt",
}
# Code that says how fast scores are found, or for whom, and never which: its change makes no output stale.
FOR_SPEED = ("querit/devices.py", "querit/cli.py", "modeling_querit/scoring_querit.py")
# Settings that say where an output goes and how the work on it is done: whatever they are, the output is the same.
OF_NO_ACCOUNT = {
    "output", "output_dir", "engine", "workers",
    # of a server that writes queries
    "base_url", "api_key_env", "concurrency", "requests_per_minute", "max_retries", "timeout",
}  # fmt: skip
ROWS = 1024  # written at once


class ProjectFinder(ModuleFinder):
    """Follows imports of the project alone: once installed it shares its folder with all other libraries."""

    def find_module(self, name, path, parent=None):
        if path is None and name not in PACKAGES:  # where path is given, it is that of a package of ours
            raise ImportError(name)
        return super().find_module(name, path, parent)


def code_hashes(script: Path) -> dict[str, str]:
    """Project file -> hash, for a script, the project modules that it imports and the prompts that they read.

    Modules are hashed as parsed: comments and layout do not count.
    """
    finder = ProjectFinder(path=[str(ROOT)])
    finder.run_script(str(script))
    hashes = {}
    files = {getattr(module, "__file__", None) for module in finder.modules.values()}
    for file in sorted(Path(file) for file in files if file):
        name = file.relative_to(ROOT).as_posix()
        if name.startswith(FOR_SPEED):
            continue
        text = ast.unparse(ast.parse(file.read_text(encoding="utf-8")))
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        if name in CODE_DATA:
            hashes |= {
                read.relative_to(ROOT).as_posix(): file_hash(read) for read in sorted(ROOT.glob(CODE_DATA[name]))
            }
    return hashes


def fingerprint(config: dict, script: Path, inputs: Iterable[str]) -> dict[str, dict]:
    """All that an output depends on: equal fingerprints, equal outputs. Inputs that are not there are left out."""
    return {
        "config": json.loads(json.dumps(config)),
        "inputs": {path: content_hash(path) for path in inputs if Path(path).exists()},
        "code": code_hashes(script),
    }


def what_counts(config: Any) -> Any:
    """A config without the settings of no account, and without those of its lists' entries (generators, teachers)."""
    if not isinstance(config, dict):
        return config
    kept = {
        key: [what_counts(entry) for entry in value] if isinstance(value, list) else value
        for key, value in config.items()
        if key not in OF_NO_ACCOUNT
    }
    # A teacher behind a server is another than one that is loaded; where it is served does not matter.
    return kept | {"url": "given"} if kept.get("url") else kept


def changed_keys(old: dict, new: dict) -> list[str]:
    # As text: the order of a list's or a mapping's entries may matter to a stage.
    return [key for key in {**old, **new} if json.dumps(old.get(key)) != json.dumps(new.get(key))]


def difference(old: dict, new: dict) -> str | None:
    """The first part in which two fingerprints differ, in words, or None."""
    for part, word in (("config", "config"), ("inputs", "input"), ("code", "code")):
        if keys := changed_keys(*((what_counts(x[part]) if part == "config" else x[part]) for x in (old, new))):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            return f"{word} changed: {', '.join(keys[:3])}{more}"
    return None


def already_made(output: Path, settings: dict, report: str | None = None) -> bool:
    """Whether an output is there, made with these settings.

    They stand in a folder's file `report`, under `settings` or among its other keys, or in a Parquet file's schema, as
    `write_parquet` puts them there. Raises FileExistsError if the output was made with others, or nothing tells how it
    was made.
    """
    if not output.exists():
        return False
    stored = None
    if report is None:
        stored = json.loads((pq.read_schema(output).metadata or {}).get(b"settings", b"null"))
    elif (output / report).exists():
        found = json.loads((output / report).read_text(encoding="utf-8"))
        stored = found.get("settings", {key: found.get(key) for key in settings})
    why = "nothing tells how it was made"
    if stored is not None:
        keys = changed_keys(what_counts(stored), what_counts(settings))
        if not keys:
            print(f"{output} is there already; delete it to make it again.")
            return True
        why = f"it was made with other settings ({', '.join(keys[:4])})"
    raise FileExistsError(f"{output} is there already, and {why}. Move it away, or name another output.")


def write_parquet(rows: "Dataset", path: Path, settings: dict) -> None:
    """Write rows, with the settings that made them, into a Parquet file that appears only when it is whole."""
    schema = rows.features.arrow_schema
    noted = {b"settings": json.dumps(what_counts(settings), ensure_ascii=False).encode()}
    schema = schema.with_metadata({**(schema.metadata or {}), **noted})
    with appears_whole(path) as aside, pq.ParquetWriter(aside, schema) as writer:
        for batch in rows.with_format("arrow").iter(ROWS):
            writer.write_table(batch)


def move_aside(output: Path, others: Iterable[Path]) -> Path | None:
    """Move an output, its record and its unfinished pieces into `old/<name>-<n>` beside it. -> that folder.

    Pieces are the files named `<output>.*`; `others` are the other stages' outputs, which may be named so too
    (general.parquet is no piece of general). None if there was nothing to move.
    """
    names = {other.name for other in others if other.parent == output.parent and other != output}

    def is_piece(path: Path) -> bool:
        longer = [name for name in names if len(name) > len(output.name) and path.name.startswith(name)]
        return path.name.startswith(f"{output.name}.") and not longer

    pieces = [path for path in [output, *sorted(output.parent.glob(f"{output.name}.*"))] if path.exists()]
    pieces = [path for path in pieces if path == output or is_piece(path)]
    if not pieces:
        return None
    number = 1
    while (aside := output.parent / "old" / f"{output.name}-{number}").exists():
        number += 1
    aside.mkdir(parents=True)
    for piece in pieces:
        piece.rename(aside / piece.name)
    return aside
