"""The models that may be chosen: those of the configuration, by name. A visitor can name no other."""

import logging
import os
import threading
from pathlib import Path

import typer

import querit
from space_app.limits import RefusedError

MODELS = "QUERIT_SPACE_MODELS"  # NAME=SOURCE,...; a source is a folder, a Hub repo, or REPO@COMMIT

logger = logging.getLogger(__name__)


def configured(entries: list[str] | None = None) -> dict[str, str]:
    """Name -> folder or Hub repo, of entries `NAME=SOURCE` or `SOURCE`; of the environment if there are none."""
    entries = entries or [entry.strip() for entry in os.environ.get(MODELS, "").split(",") if entry.strip()]
    if not entries:
        return {"Nano": str(querit.RELEASED) if querit.RELEASED.exists() else querit.HUB_ID}
    sources: dict[str, str] = {}
    for entry in entries:
        name, equals, source = entry.partition("=")
        name, source = (name.strip(), source.strip()) if equals else (entry.rstrip("/").rpartition("/")[2], entry)
        if not name or not source or name in sources:
            raise ValueError(f"{MODELS}: {entry!r} is no NAME=SOURCE, or its name is taken by another one.")
        sources[name] = source
    return sources


class Models:
    """Loads each model when it is first asked for, with the code installed here: no code of a repo is run.

    `turn` is held while a model computes: two at a time would only slow each other down.
    """

    def __init__(self, sources: dict[str, str]):
        self.sources = sources
        self.turn = threading.Lock()
        self._loading = threading.Lock()
        self._rankers: dict = {}

    @property
    def names(self) -> list[str]:
        return list(self.sources)

    def name(self, name: object) -> str:
        """The name itself, or the first one for None. Raises RefusedError for what is not configured."""
        if name is None or name == "":
            return self.names[0]
        if not isinstance(name, str) or name not in self.sources:
            raise RefusedError(f"There is no such model here; choose one of {', '.join(self.names)}.")
        return name

    def ranker(self, name: str):
        with self._loading:
            if name not in self._rankers:
                source, _, revision = self.sources[name].partition("@")
                if Path(self.sources[name]).exists():
                    source, revision = self.sources[name], ""
                try:
                    self._rankers[name] = querit.load_ranker(source, revision or None)
                except typer.Exit:  # load_ranker has said why, in the log
                    raise RefusedError(
                        f"{name} could not be loaded; whoever runs this page finds why in its log."
                    ) from None
            return self._rankers[name]

    def python_arguments(self, name: str) -> str:
        """How a model is named in someone's own code: no folder outside the project is told."""
        source, _, revision = self.sources[name].partition("@")
        folder, root = Path(self.sources[name]), Path(querit.__file__).parent
        if folder.exists():
            within = folder.resolve().is_relative_to(root)
            return repr(folder.resolve().relative_to(root).as_posix() if within else f"path/to/{folder.name}")
        return repr(source) + (f", revision={revision!r}" if revision else "")

    def warm_up(self) -> threading.Thread:
        """Load the first model aside, while the page is already there."""

        def load() -> None:
            try:
                self.ranker(self.names[0])("warm", ["up", "up to speed"])
            except Exception:
                logger.exception("The model %s cannot be used.", self.names[0])

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        return thread
