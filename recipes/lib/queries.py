"""Queries as they come from a generator: reading them out of its answer, and the filters that need no other query."""

import json
import re
import unicodedata

from querit.text import joined
from recipes.lib.documents import is_other_language

CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff々"
TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
MAX_WORDS = 64
MAX_COPIED_WORDS = 6  # a longer query that stands in its document as it is needs no reading, only matching

THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
MARK = re.compile(r"^(?:[-*•–—·>#]+\s+|[-*•–—·>#]+(?=\D)|\(?\d{1,2}[.):、）．]\s*|\(?[a-c][.)]\s+)+")
LABEL = re.compile(
    r"^[\s*_]*(?:search |long |longer |example )?(?:query|queries|keywords?|question|request|"
    r"suchanfrage|anfrage|stichwörter|stichworte|schlüsselwörter|frage|bitte|"
    r"requête|mots[- ]clés|question|demande|consulta|palabras clave|pregunta|petición|solicitud|"
    r"запрос|ключевые слова|вопрос|просьба|查询|关键词|问题|请求|需求|"
    r"検索語|キーワード|質問|依頼|要望|検索クエリ|검색어|키워드|질문|요청)\s*\d{0,2}[\s*_]*[:：]\s*",
    re.IGNORECASE,
)
QUOTES = "\"'“”„«»‘’「」『』`*_ "


def normalise(text: str) -> str:
    """NFKC, case folded, nothing but letters and digits, one space between words."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def word_count(text: str) -> float:
    """Words of a text; a character of a script without spaces counts for half a word."""
    tokens = TOKEN.findall(text)
    return sum(0.5 if re.match(f"[{CJK}]", token) else 1.0 for token in tokens)


def kind_of(query: str) -> str:
    """What a query looks like: a question, a few keywords, or a longer request."""
    if query.rstrip(QUOTES).endswith(("?", "？")) or re.search(r"(ですか|ますか|ませんか)[。]?$", query):
        return "question"
    return "request" if word_count(query) > 7 or query.endswith((".", "。", "!", "！")) else "keywords"


def answer_lines(answer: str) -> list[str]:
    """The lines of an answer, without numbering, bullets, labels and quotes; JSON's strings where it is JSON."""
    # A server may have put the opening <think> into the prompt: what stands before a lone closing one is reasoning too.
    answer = THINKING.sub("", answer).rpartition("</think>")[2]
    answer = re.sub(r"^\s*```\w*\s*$", "", answer, flags=re.MULTILINE)
    try:
        lines = strings_of(json.loads(answer))
    except (json.JSONDecodeError, RecursionError):
        # one JSON string or list a line, as small models write it, loses its brackets and commas here
        lines = [line.strip(" \t[]{},") for line in answer.splitlines()]
    cleaned = []
    for line in lines:
        line = re.sub(r'^"\w+"\s*:\s*', "", line.strip())
        line = LABEL.sub("", MARK.sub("", line).strip(QUOTES)).strip(QUOTES)
        cleaned.append(re.sub(r"\s+", " ", MARK.sub("", line)))
    return [line for line in cleaned if line]


def strings_of(value: object) -> list[str]:
    """Every string in a JSON value, but not the keys."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for part in value for text in strings_of(part)] if isinstance(value, list) else []


def read_answer(answer: str, prompt: str, finished: bool = True) -> list[tuple[str, str]]:
    """(query, why it is dropped or "") of each line of an answer.

    `prompt` is what was asked, without the document: a line that says it again is an `echo`, and so is one that only
    announces a list. The last line of an answer that is not `finished` is `cut`.
    """
    asked = f" {normalise(prompt)} "
    lines = answer_lines(answer)
    queries = []
    for number, line in enumerate(lines, 1):
        plain = normalise(line)
        echo = line.endswith((":", "：")) or (word_count(plain) >= 3 and plain in asked)
        cut = not finished and number == len(lines)
        queries.append((line, "echo" if echo else "cut" if cut else ""))
    return queries


def why_dropped(query: str, item: dict, crop: bool) -> str:
    """The first filter that a query of a document falls into, or "".

    too_short, too_long; copy: the whole document, or, unless it is a crop, more than MAX_COPIED_WORDS words of it as
    they stand; language: surely another one than the document's.
    """
    plain, words = normalise(query), word_count(query)
    if words < 1 or (words == 1 and len(plain) < 3):
        return "too_short"
    if words > MAX_WORDS:
        return "too_long"
    text = normalise(joined(item))
    if plain in (text, normalise(item["text"])) or (not crop and words > MAX_COPIED_WORDS and plain in text):
        return "copy"
    if is_other_language(query, item["language"]):
        return "language"
    return ""
