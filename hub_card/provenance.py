"""What a model's folder tells of how it came: the record of its merges, and how far its probabilities hold.

A model that is made from a merged one keeps the record, and the next merge's holds those before it:

    {"method": "linear", "models": [...], ..., "earlier": [{"method": "slerp", "models": [...], ...}]}
"""

import json
from pathlib import Path
from typing import Any

from querit.files import write_json

MERGE_RECORD, RELIABILITY = "merge.json", "reliability.json"


def merges_of(*folders: str | Path) -> list[dict[str, Any]]:
    """Every merge that the models of these folders came by, once, in the order in which they were made."""
    merges: list[dict[str, Any]] = []
    for path in (Path(folder) / MERGE_RECORD for folder in folders):
        if path.is_file():
            last = json.loads(path.read_text(encoding="utf-8"))
            merges += [merge for merge in (*last.pop("earlier", []), last) if merge not in merges]
    return merges


def write_merges(folder: Path, merges: list[dict[str, Any]]) -> None:
    """Put the record of these merges beside a model; nothing if there were none."""
    if merges:
        *earlier, last = merges
        write_json(folder / MERGE_RECORD, last | ({"earlier": earlier} if earlier else {}))
