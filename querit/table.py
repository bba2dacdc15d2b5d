"""Rankings and results as tables, for a terminal: what does not fit is folded, never cut."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from querit.text import joined

SNIPPET = 160  # characters of a document that are shown


def show_ranking(query: str, results: list[dict], documents: list[dict]) -> None:
    """Print the results of one query, whose `index` is a place among these documents of `querit.text`."""
    # Text, not str: brackets in what people write are no markup.
    table = Table(title=Text(query), title_justify="left", box=None, padding=(0, 2, 0, 0))
    fused = any("fused_score" in result for result in results)
    for name in ("", "score", "probability", *(["fused"] if fused else [])):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    table.add_column("document", ratio=1, overflow="fold")  # text without blanks, as Chinese, is folded, not cut
    table.add_column("source", overflow="fold", max_width=24)
    for place, result in enumerate(results, 1):
        document = documents[result["index"]]
        numbers = [f"{place}", f"{result['score']:+.3f}", f"{result['probability']:.3f}"]
        if fused:
            numbers.append(f"{result['fused_score']:.4f}")
        source = document["source"].rpartition("/")[2]
        table.add_row(*numbers, Text(snippet(joined(document), result)), Text(source))
    Console().print(table)


def snippet(text: str, result: dict) -> str:
    """The beginning of a document, or of the passage of it that counted."""
    start, end = result.get("passage") or (0, len(text))
    words = " ".join(text[start:end].split())
    mark = " (cut to fit the model)" if result["truncated"] else ""
    more = "…" if len(words) > SNIPPET or end < len(text) else ""
    return f"{'…' if start else ''}{words[:SNIPPET]}{more}{mark}"


def show_results(markdown: str) -> None:
    """Print the Markdown table of `querit evaluate`, whose first two lines are its head."""
    head, _, *rows = ([cell.strip(" *") for cell in line[1:-1].split("|")] for line in markdown.splitlines())
    table = Table(box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(head):
        table.add_column(Text(name), overflow="fold", justify="left" if place < 2 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
