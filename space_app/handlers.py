"""How every handler of the page speaks: what it is doing, what it refuses, that it failed; and how it is stopped."""

import functools
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import gradio as gr

from space_app import views
from space_app.limits import RefusedError

T = TypeVar("T")
QUICK: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
# Where the page is one column, as on a phone, what appears is scrolled to: once, not at every step.
GO_TO_NEWS = """
let last = '';
watch('value', () => {
  const kinds = ['.q-progress', '.q-error', '.q-list', '.q-headline', '.q-done'];
  const kind = kinds.find(kind => element.querySelector(kind)) || '';
  const {left, top} = element.getBoundingClientRect();
  if (kind && kind !== last && left < innerWidth / 4 && top > innerHeight / 8) element.scrollIntoView({block: 'start'});
  last = kind;
});
"""

logger = logging.getLogger(__name__)


def shown(steps: Generator[float, None, T], words: str, where: gr.HTML) -> Generator[dict, None, T]:
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
            yield {where: views.refused("Something went wrong on our side. Please try again; the log has the details.")}

    return guarded


class StopButton:
    """Ends what runs for its visitor, and can be pressed while something does."""

    def __init__(self, elem_id: str):
        self.button = gr.Button("Stop", scale=1, min_width=80, interactive=False, elem_id=elem_id)
        self.running = gr.State(0)  # how many of this visitor's events run or wait
        self.events: list[Any] = []

    def begin(self, *triggers: Any) -> Any:
        """The first step of what can be stopped: `.then` goes on with it."""
        return gr.on(list(triggers), self.one_more, self.running, [self.running, self.button], **QUICK)

    def until(self, *events: Any) -> None:
        """These are what is stopped, and the ends of what was begun."""
        self.events += events
        for event in events:
            event.then(lambda count: self._state(count - 1), self.running, [self.running, self.button], **QUICK)

    def one_more(self, count: int) -> tuple[int, Any]:
        return self._state(count + 1)

    def _state(self, count: int) -> tuple[int, Any]:
        return max(count, 0), gr.Button(interactive=count > 0)

    def stops(self, *where: gr.HTML) -> None:
        """Say there that it was stopped. To be called last."""
        # Afterwards: what was still under way may not write over it.
        stopped = self.button.click(None, None, None, cancels=self.events, **QUICK)
        stopped.then(
            lambda: [views.note("Stopped.")] * len(where) + [*self._state(0)],
            None,
            [*where, self.running, self.button],
            **QUICK,
        )
