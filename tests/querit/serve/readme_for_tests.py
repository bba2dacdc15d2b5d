"""The snippets of querit/serve/README.md, run as they stand there against what a test serves."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

README = Path(__file__).parents[3] / "querit" / "serve" / "README.md"


def snippets(language: str, section: str) -> dict[str, str]:
    """The paragraph before each snippet of a section, up to its first comma, colon or bracket -> the snippet."""
    text = README.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    found = re.findall(rf"([^\n]*)\n\n?```{language}\n(.*?)```", text, re.S)
    return {re.split(r"[,:(]", words)[0].strip(): code for words, code in found}


def clients(section: str) -> dict[str, str]:
    """Name -> its snippet, after the one that all of them share."""
    (_, common), *others = snippets("python", section).items()
    return {name: f"{common}\nchange()\n{code}" for name, code in others}


def run_snippet(code: str, **changes: object) -> list[str]:
    """What it prints, some of the names that all share changed."""
    names: dict = {}
    names["change"] = lambda: names.update(changes)
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, names)  # noqa: S102 - the page's own code
    return printed.getvalue().splitlines()
