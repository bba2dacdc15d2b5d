"""How every handler of the page speaks: what it is doing, what it refuses, and that it failed."""

import functools
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import gradio as gr

from space_app import views
from space_app.limits import RefusedError

T = TypeVar("T")

logger = logging.getLogger(__name__)


def said(steps: Generator[float, None, T], words: str, where: gr.HTML) -> Generator[dict, None, T]:
    """Run steps and show how far they are. Returns what they return."""
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        yield {where: views.progress(done, words)}


def refusing(where: gr.HTML, function: Callable) -> Callable:
    """What is refused, or fails, is said there; the page goes on."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Iterator[dict]:
        try:
            yield from function(*args)
        except RefusedError as error:
            yield {where: views.refused(str(error))}
        except Exception:
            logger.exception("A request failed.")
            yield {where: views.refused("This failed on our side. It is in the log; please try again.")}

    return guarded
