"""Hostile text comes out as text."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_app import views
from space_app.evaluation import Evaluation, QueryOutcome
from space_app.limits import Limits
from space_app.measured import Measured
from space_app.ranking import Explanation, Ranking, Request, Result, first_stage_beside

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    '"><svg onload=window.hacked=1>',
    "{{constructor.constructor('window.hacked = 1')()}} {{#each value}}x{{/each}} @children",
    "${window.hacked = 1} `${window.hacked = 1}`",
    "{% raw %}{{ 7 * 7 }}",
    "[click](javascript:window.hacked=1) **bold** # head | a | b |\n---",
    "&lt;b&gt; &amp;amp; &#60;b&#62;",
    "nul \x00 bell \x07 escape \x1b[31m backspace \x08 \x9b \x7f",
    "\u202etxet desrever\u202c \u2066isolated",
    "x" * 1_000_000,
    "السلام عليكم",
    "\ud800 alone",
    "</section></div></li></ol></template><style>*{display:none}</style>",
]


class Reader(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def pages(texts):
    name = texts[-1][:60]
    request = Request(texts[0], texts, None, "truncate", name)
    results = [Result(n, n + 1, len(texts) - n, 0.5, 0.75, True, None, True) for n in range(len(texts))]
    ranked = Ranking(request, results, list(range(len(texts)))[::-1], 0.1)
    explained = Explanation(0, 0, len(texts[0]), 1, [(text, 0.5) for text in texts], 0, 2)
    outcomes = [QueryOutcome(text, 0.5, 1.0) for text in texts]
    return [
        views.ranking(ranked, explained),
        views.comparison(first_stage_beside(ranked)),
        views.evaluation(Evaluation(name, 0.5, 0.6, outcomes, 9, 9, 9, 0.5)),
        views.progress(0.5, texts[0]),
        views.refused(texts[0]),
        views.about(Limits(), [name], [(name, "https://huggingface.co/org/name")], Measured([(name, 50.0)], 1, 1, 1)),
    ]


HARMLESS = [Reader(page) for page in pages(["plain", "text"])]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_adds_no_tag_no_attribute_and_no_template(text):
    for page, harmless in zip(pages([text, text]), HARMLESS, strict=True):
        read = Reader(page)
        assert read.tags == harmless.tags and read.attributes == harmless.attributes
        assert not set("{}$`") & set(page) and page.encode()
        assert not any(ord(c) < 32 and c not in "\n\t\r" for c in page) and len(page) < 100_000


@given(st.text(max_size=80))
def test_any_text_can_be_read_as_it_is(text):
    shown = " ".join(views.visible(text).split())
    for page in pages([text, "other"])[:2]:
        assert shown in " ".join(Reader(page).text.split())


def test_what_cannot_be_seen_is_shown_by_its_sign():
    assert views.visible("a\x00b\x1bc\x7f\td\n") == "a␀b␛c␡\td\n"


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(0, "<1%"), (0.004, "<1%"), (0.006, "1%"), (0.123, "12%"), (0.994, "99%"), (0.9999, ">99%")],
)
def test_no_probability_is_shown_as_certain(probability, shown):
    assert views.percent(probability) == shown


def test_signs():
    assert [views.signed(x, 1) for x in (1.25, -1.25, 0.0, -0.01)] == ["+1.2", "−1.2", "0.0", "0.0"]
