"""The folder that is uploaded as a Hugging Face Space: the page, and the code here that it runs on.

A Space installs its requirements.txt before it sees the rest of its folder, and this package is in no index: so the
folder carries the packages themselves, and requirements.txt names what those import.
"""

import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from space_app.measured import KEPT, as_json, measured

PACKAGES = ("space_app", "querit", "modeling_querit", "hub_card")  # hub_card checks the files of a model to load
TOP = ("README.md", "requirements.txt", "app.py")  # where a Space looks for them
LEFT_OUT = {"hub_card": ("querit-reranker-*",), "space_app": TOP}  # a model's weights; what stands beside the packages


def ignored_of(package: str, source: Path) -> Callable[[str, list[str]], set[str]]:
    """What of a package is not copied: caches anywhere, and at its top the patterns of LEFT_OUT."""
    everywhere = shutil.ignore_patterns("__pycache__", "*.pyc")
    at_top = shutil.ignore_patterns(*LEFT_OUT.get(package, ()))

    def ignored(folder: str, names: list[str]) -> set[str]:
        return everywhere(folder, names) | (at_top(folder, names) if Path(folder) == source else set())

    return ignored


def export(folder: Path) -> None:
    """Raises FileExistsError if the folder is there."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name another folder, or move it away.")
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    for package in PACKAGES:
        with resources.as_file(resources.files(package)) as source:
            shutil.copytree(source, aside / package, ignore=ignored_of(package, source))
    for name in TOP:
        (aside / name).write_bytes((resources.files("space_app") / name).read_bytes())
    if found := measured():
        (aside / "space_app" / KEPT).write_text(as_json(found), encoding="utf-8")
    aside.rename(folder)
