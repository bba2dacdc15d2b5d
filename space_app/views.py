"""Results as HTML. Jinja escapes all that is put in; what cannot be seen is shown by its sign."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from space_app.adaptation import Adapted, Progress
from space_app.evaluation import Evaluation
from space_app.limits import Limits
from space_app.measured import Measured
from space_app.ranking import Comparison, Explanation, Ranking

SHOWN = 420  # characters of a document in a list
SHOWN_BRIEFLY = 140  # side by side
SIGNS = {number: 0x2400 + number for number in range(32) if number not in (9, 10, 13)} | {127: 0x2421}
SIGNS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Control characters as their pictures (U+2400 and on); lone surrogates, which cannot be sent, as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text).translate(SIGNS)


def shorten(text: str, length: int = SHOWN) -> str:
    flat = " ".join(text[: 4 * length].split())
    return flat if len(flat) <= length and len(text) <= 4 * length else flat[:length].rstrip() + "…"


def percent(probability: float) -> str:
    """Whole per cent; nothing is shown as certain."""
    value = round(100 * probability)
    return f"{value}%" if 1 <= value <= 99 else "<1%" if value < 1 else ">99%"


def signed(value: float, digits: int) -> str:
    """With a true minus, as wide as the plus; a zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "\u2212")


environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
environment.filters |= {"visible": visible, "shorten": shorten, "percent": percent, "signed": signed}
environment.globals |= {"shown": SHOWN, "brief": SHOWN_BRIEFLY}


def show(template: str, **values) -> str:
    """Braces and dollars become entities: the page's own templates must not take them for theirs."""
    html = environment.get_template(template).render(**values)
    return html.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def ranking(found: Ranking, explained: Explanation | None = None, explaining: int | None = None) -> str:
    return show("ranking.html", ranking=found, explained=explained, explaining=explaining)


def comparison(found: Comparison) -> str:
    return show("comparison.html", found=found)


def evaluation(found: Evaluation, own_examples: bool = False) -> str:
    """own_examples: the page's, chosen to be answered well, whose gain measures nothing."""
    return show("evaluation.html", found=found, own_examples=own_examples)


def progress(share: float, words: str) -> str:
    return show("progress.html", share=share, words=words)


def adapting(step: Progress) -> str:
    minutes, seconds = divmod(int(step.seconds), 60)
    return progress(step.share, f"{step.stage} … {minutes}:{seconds:02d}")


def adapted(found: Adapted) -> str:
    return show("message.html", kind="done", title="Adapted", words=found.words)


def refused(words: str) -> str:
    return show("message.html", kind="error", title="", words=words)


def note(words: str) -> str:
    return show("message.html", kind="note", title="", words=words)


def header() -> str:
    return show("header.html")


def about(limits: Limits, names: list[str], cards: list[tuple[str, str]], measured: Measured | None) -> str:
    """cards: (name, address) of the models that have a card on the Hub; measured: of the first of these."""
    return show("about.html", limits=limits, names=names, cards=cards, measured=measured)
