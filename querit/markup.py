"""Markdown and HTML become a title and running text: what a reader sees, without what only a program reads."""

import itertools
import re
import tomllib
from html.parser import HTMLParser

import yaml
from markdown_it import MarkdownIt

FRONT_MATTER = re.compile(r"\s*^(---|\+\+\+)[ \t]*\n(.*?)^(?:\1|\.\.\.)[ \t]*$\n?", re.DOTALL | re.MULTILINE)
WORD = r"""[\w"'.$@/-]+"""
FIELD = re.compile(rf"({WORD}(?:[ \t]+{WORD}){{0,3}})[ \t]*[:=][ \t]*(.*)")  # of front matter: its name and value
NO_TEXT = {"<!--": "-->", "<style": r"</style\s*>", "<script": r"</script\s*>"}
# A tag, whatever its quoted attributes hold; else a `<` that begins none, as nothing closes it.
TAG = re.compile(r"""</?[a-z](?:[^<>"']|"[^"]*"|'[^']*')*+>|<(?=[^<>]*(?:<|\Z))""", re.IGNORECASE)
# Inline marks are read of headings alone: of brackets, say, it takes the square of their number.
BLOCKS, INLINE, LONGEST_HEADING = MarkdownIt().disable("inline"), MarkdownIt(), 1000


def read_markdown(text: str) -> dict[str, str]:
    """-> {"title", "text"}: the front matter's title or the first heading, and all but front matter and style blocks.

    A heading that opens the text and is its title is left out of the text.
    """
    title, text = split_front_matter(re.sub(r"\r\n?", "\n", text))
    lines = text.split("\n")
    for token in reversed(BLOCKS.parse(text)):
        if token.type == "html_block" and token.map:  # in a block of code it is no HTML
            start, end = token.map
            lines[start:end] = without_no_text("\n".join(lines[start:end])).split("\n")
    text = "\n".join(lines)
    if found := markdown_headings(text):
        heading, start, end = found[0]
        title = title or heading
        lines = text.split("\n")
        if heading == title and not "".join(lines[:start]).strip():
            text = "\n".join(lines[end:])
    return {"title": title, "text": text.strip()}


def without_no_text(text: str) -> str:
    """Without comments, styles and scripts; one that is not closed stays. In one pass: within one no other begins."""
    pieces, kept, place, kinds = [], 0, 0, dict(NO_TEXT)
    while kinds and (start := re.compile(rf"({'|'.join(kinds)})(?:(?<=-)|\b)", re.IGNORECASE).search(text, place)):
        kind, place = start[0].lower(), start.end()
        if end := re.compile(kinds[kind], re.IGNORECASE).search(text, place):
            pieces.append(text[kept : start.start()])
            kept = place = end.end()
        else:
            del kinds[kind]  # nothing after it closes another one either
    return "".join([*pieces, text[kept:]])


def split_front_matter(text: str) -> tuple[str, str]:
    """-> the title that YAML (`---`) or TOML (`+++`) front matter gives, or "", and the text after it."""
    found = FRONT_MATTER.match(text)
    if not found:
        return "", text
    try:
        # The base loader makes nothing but strings, lists and mappings: a title 1917 stays as it is written.
        fields = yaml.load(found[2], yaml.BaseLoader) if found[1] == "---" else tomllib.loads(found[2])  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        # Titles that hold a colon, unquoted, are no YAML, and common.
        matches = [FIELD.match(line) for line in re.findall(r"^[^\s#\]}-].*", found[2], re.MULTILINE)]
        if not all(matches):
            return "", text
        fields = {match[1]: match[2].strip(" \t\"'") for match in matches if match}
    if isinstance(fields, dict):
        fields = {str(name).lower(): value for name, value in fields.items()}  # some write `Title:`
    if fields and not (isinstance(fields, dict) and ("title" in fields or is_field(next(iter(fields)), len(fields)))):
        return "", text  # paragraphs between rules
    title = (fields or {}).get("title")
    return (" ".join(title.split()) if isinstance(title, str) else ""), text[found.end() :]


def is_field(name: str, fields: int) -> bool:
    """Whether it names the first of so many fields. A single `One rule: be kind.` is a sentence between rules."""
    name = f"{name}:"
    return bool(FIELD.match(name) if fields > 1 else re.match(f"{WORD}[ \t]*:", name))


def markdown_headings(text: str) -> list[tuple[str, int, int]]:
    """(heading without its marks, first line, line after it) of every heading of a Markdown text."""
    headings = []
    links: dict = {}  # the targets that the text gives for `[name]`
    for token, content in itertools.pairwise(BLOCKS.parse(text, links)):
        if token.type == "heading_open" and token.map:
            plain = content.content
            if len(plain) <= LONGEST_HEADING:
                breaks = ("softbreak", "hardbreak")  # a heading may stand over two lines
                (inline,) = INLINE.parseInline(plain, links)
                plain = "".join(" " if child.type in breaks else child.content for child in inline.children or ())
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
        self.skipped, self.depth = "", 0  # the open element whose text is none, and how many of it are open
        self.inside = ""  # the element of `titles` that is open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in self.SKIPPED and self.skipped in ("", tag):
            self.skipped, self.depth = tag, self.depth + 1
        elif tag in self.titles and not self.skipped and not self.titles[tag]:
            self.inside = tag
        self.mark(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.mark(tag)  # `<script/>` opens nothing

    def handle_endtag(self, tag: str) -> None:
        if tag == self.skipped:
            self.depth -= 1
            self.skipped = tag if self.depth else ""
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
    page.feed(TAG.sub(lambda found: "&lt;" if found[0] == "<" else found[0], without_no_text(text)))
    page.close()
    found = (" ".join("".join(pieces).split()) for pieces in page.titles.values())
    title = next((title for title in found if title), "")
    lines = [line for line in (" ".join(line.split()) for line in "".join(page.pieces).split("\n")) if line]
    return {"title": title, "text": "\n".join(lines[1:] if lines[:1] == [title] else lines)}
