"""The folder that is uploaded as a Hugging Face Space: this page, and the code of the models that it runs."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "requirements.txt", "app.py")  # where a Space looks for them
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", *TOP)


def export(folder: Path) -> None:
    """Raises FileExistsError if the folder is there."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name another folder, or move it away.")
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(ROOT / "space_app", aside / "space_app", ignore=IGNORED)
    shutil.copytree(ROOT / "modeling_querit", aside / "modeling_querit", ignore=IGNORED)
    for name in TOP:
        shutil.copy(ROOT / "space_app" / name, aside / name)
    shutil.copy(ROOT / "querit.py", aside / "querit.py")
    aside.rename(folder)
