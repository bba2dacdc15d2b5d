"""One bar for a run of several stages, with the time that is left; what the stages print goes into a file."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from querit.files import write_json

EVERY = 1.0  # seconds between two looks
NEVER_DONE = 0.95  # of a step's planned seconds: until it has ended, that much of it has passed at most


class Steps:
    """Where a run is: steps with planned seconds, of which some have ended and one is under way."""

    def __init__(self, planned: dict[str, float]):
        self.planned = planned
        self.ended: dict[str, float] = {}  # step -> the seconds that it took
        self.taken_over: set[str] = set()  # of an earlier run
        self.current = ""
        self.began = 0.0

    def begin(self, step: str, now: float) -> None:
        self.current, self.began = step, now

    def end(self, now: float, taken_over: bool = False) -> None:
        self.ended[self.current] = now - self.began
        if taken_over:
            self.taken_over.add(self.current)
        self.current = ""

    def pace(self) -> float:
        """How many times the planned seconds those steps took that have ended; 1 before any has."""
        steps = [step for step in self.ended if step not in self.taken_over]
        planned = sum(self.planned[step] for step in steps)
        return sum(self.ended[step] for step in steps) / planned if planned else 1.0

    def passed(self, now: float) -> float:
        """Planned seconds of the current step that have passed."""
        if not self.current:
            return 0.0
        return min((now - self.began) / self.pace(), NEVER_DONE * self.planned[self.current])

    def share(self, now: float) -> float:
        done = sum(self.planned[step] for step in self.ended) + self.passed(now)
        return done / sum(self.planned.values())

    def seconds_left(self, now: float) -> float:
        waiting = sum(seconds for step, seconds in self.planned.items() if step not in self.ended)
        return self.pace() * (waiting - self.passed(now))


def in_minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {max(1, round(seconds / 10)) * 10} s left"


class Bar:
    """A bar on a terminal; elsewhere a line for each step. `file` tells the same to who does not see either."""

    def __init__(self, steps: Steps, words: dict[str, str], file: Path):
        self.steps, self.words, self.file = steps, words, file
        self.console = Console(file=sys.stderr)  # this one: while a step runs, sys.stderr is the log
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=1.0, left="")
        self.stopped = threading.Event()

    def show(self) -> None:
        now = time.monotonic()
        step = self.steps.current
        share, left = self.steps.share(now), self.steps.seconds_left(now)
        place = len(self.steps.ended) + bool(step)
        self.progress.update(
            self.task, completed=share, description=self.words.get(step, ""), left=in_minutes(left), refresh=True
        )
        state = {"step": step, "words": self.words.get(step, ""), "place": place, "of": len(self.steps.planned)}
        write_json(self.file, state | {"share": round(share, 4), "seconds_left": round(left)})

    def watch(self) -> None:
        while not self.stopped.wait(EVERY):
            self.show()

    @contextmanager
    def step(self, name: str, log: Path) -> Iterator[None]:
        """One step under way: what is printed inside goes into `log`."""
        self.steps.begin(name, time.monotonic())
        if not self.console.is_terminal:
            place, left = len(self.steps.ended) + 1, self.steps.seconds_left(time.monotonic())
            print(f"{place}/{len(self.steps.planned)} {self.words[name]} ({in_minutes(left)})", file=sys.stderr)
        with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            yield

    @contextmanager
    def shown(self) -> Iterator[None]:
        thread = threading.Thread(target=self.watch, daemon=True)
        with self.progress:
            thread.start()
            try:
                yield
            finally:
                self.stopped.set()
                thread.join()
