"""Markdown and HTML become a title and running text: what a reader sees, without what only a program reads."""

import itertools
import re
import tomllib
from html.parser import HTMLParser

import yaml
from markdown_it import MarkdownIt

FRONT_MATTER = re.compile(r"\s*^(---|\+\+\+)[ \t]*\n(.*?)^(?:\1|\.\.\.)[ \t]*$\n?", re.DOTALL | re.MULTILINE)
COMMENT = ("<!--", "-->")
NO_TEXT = (COMMENT, (r"<style\b", r"</style\s*>"), (r"<script\b", r"</script\s*>"))


def read_markdown(text: str) -> dict[str, str]:
    """-> {"title", "text"}: the front matter's title or the first heading, and all but front matter and style blocks.

    A heading that opens the text and is its title is left out of the text.
    """
    title, text = split_front_matter(re.sub(r"\r\n?", "\n", text))
    lines = text.split("\n")
    for token in reversed(MarkdownIt().parse(text)):
        if token.type == "html_block" and token.map:  # in a block of code it is no HTML
            start, end = token.map
            lines[start:end] = without("\n".join(lines[start:end]), *NO_TEXT).split("\n")
    text = "\n".join(lines)
    if found := markdown_headings(text):
        heading, start, end = found[0]
        title = title or heading
        lines = text.split("\n")
        if heading == title and not "".join(lines[:start]).strip():
            text = "\n".join(lines[end:])
    return {"title": title, "text": text.strip()}


def without(text: str, *blocks: tuple[str, str]) -> str:
    """Without the blocks between these openings and closings; one that is not closed stays. Each in a single pass."""
    for opening, closing in blocks:
        opened, closed = re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE)
        pieces, place = [], 0
        while (start := opened.search(text, place)) and (end := closed.search(text, start.end())):
            pieces.append(text[place : start.start()])
            place = end.end()
        text = "".join([*pieces, text[place:]])
    return text


def split_front_matter(text: str) -> tuple[str, str]:
    """-> the title that YAML (`---`) or TOML (`+++`) front matter gives, or "", and the text after it."""
    found = FRONT_MATTER.match(text)
    if not found or not re.match(r"\s*(#.*\n\s*)*[\w\"'-]+\s*[:=]|\s*$", found[2]):
        return "", text  # a rule between paragraphs
    try:
        # The base loader makes nothing but strings, lists and mappings: a title 1917 stays as it is written.
        fields = yaml.load(found[2], yaml.BaseLoader) if found[1] == "---" else tomllib.loads(found[2])  # noqa: S506
        title = fields["title"]
    except (yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError):
        # Titles that hold a colon, unquoted, are no YAML, and common.
        line = re.search(r"^title\s*[:=]\s*(.*?)\s*$", found[2], re.MULTILINE)
        title = line[1].strip("\"'") if line else ""
    return (" ".join(title.split()) if isinstance(title, str) else ""), text[found.end() :]


def markdown_headings(text: str) -> list[tuple[str, int, int]]:
    """(heading without its marks, first line, line after it) of every heading of a Markdown text."""
    headings = []
    for token, content in itertools.pairwise(MarkdownIt().parse(text)):
        if token.type == "heading_open" and token.map:
            breaks = ("softbreak", "hardbreak")  # a heading may stand over two lines
            plain = "".join(" " if child.type in breaks else child.content for child in content.children or ())
            if plain.strip():
                headings.append((plain.strip(), token.map[0], token.map[1]))
    return headings


class _Page(HTMLParser):
    """Collects the text of a page, a line a block."""

    SKIPPED = frozenset({"script", "style", "noscript", "template", "svg"})
    INLINE = frozenset(
        re.findall(
            r"\w+",
            "a abbr b bdi bdo cite code data del dfn em font i img input ins kbd label mark q rb ruby s samp small "
            "span strong sub sup time tt u var wbr",
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.titles: dict[str, list[str]] = {"title": [], "h1": []}
        self.skipped: list[str] = []  # open elements whose text is none
        self.inside = ""  # the element of `titles` that is open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in self.SKIPPED:
            self.skipped.append(tag)
        elif tag in self.titles and not self.skipped and not self.titles[tag]:
            self.inside = tag
        self.mark(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.mark(tag)  # `<script/>` opens nothing

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipped:
            while self.skipped.pop() != tag:
                pass
        if tag == self.inside:
            self.inside = ""
        self.mark(tag)

    def handle_data(self, data: str) -> None:
        if self.skipped:
            return
        if self.inside:
            self.titles[self.inside].append(data)
        if self.inside != "title":
            self.pieces.append(re.sub(r"\s+", " ", data))

    def mark(self, tag: str) -> None:
        if not self.skipped and tag not in self.INLINE:
            self.pieces.append(" " if tag in ("td", "th") else "\n")


def read_html(text: str) -> dict[str, str]:
    """-> {"title", "text"}: `<title>` or the first `<h1>`, and the text without scripts and styles, a line a block."""
    page = _Page()
    # For each tag without an end the parser looks through all the rest of the text: here they become plain text.
    page.feed(re.sub(r"<(?=[^<>]*(?:<|\Z))", "&lt;", without(text, COMMENT)))
    page.close()
    found = (" ".join("".join(pieces).split()) for pieces in page.titles.values())
    title = next((title for title in found if title), "")
    lines = [line for line in (" ".join(line.split()) for line in "".join(page.pieces).split("\n")) if line]
    return {"title": title, "text": "\n".join(lines[1:] if lines[:1] == [title] else lines)}
