"""The models that may be chosen: those of the configuration, by name. A visitor can name no other."""

import logging
import os
import threading
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import querit
from space_app.limits import RefusedError

MODELS = "QUERIT_SPACE_MODELS"  # NAME=SOURCE,...; a source is a folder, a Hub repo, or REPO@COMMIT

logger = logging.getLogger(__name__)


def configured(entries: list[str] | None = None) -> dict[str, str]:
    """Name -> folder or Hub repo, of entries `NAME=SOURCE` or `SOURCE`; of the environment if there are none.

    Raises ValueError for an entry of another form, and for a source that is neither a model's folder nor a repo's name.
    """
    place = "--model" if entries else MODELS
    entries = entries or [entry.strip() for entry in os.environ.get(MODELS, "").split(",") if entry.strip()]
    if not entries:
        return {"Nano": querit.named(None)}
    sources: dict[str, str] = {}
    for entry in entries:
        name, equals, source = entry.partition("=")
        name, source = (name.strip(), source.strip()) if equals else (entry.rstrip("/").rpartition("/")[2], entry)
        if not name or not source or name in sources:
            raise ValueError(f"{place}: {entry!r} is no NAME=SOURCE, or its name is taken by another model.")
        sources[name] = querit.named(source)
        check_source(sources[name])
    return sources


def check_source(source: str) -> None:
    """What can be known at once, before anything is loaded."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} is no model's folder: it has no config.json.")
        return
    try:
        validate_repo_id(source.partition("@")[0])
        if "/" not in source:
            raise HFValidationError
    except HFValidationError:
        raise ValueError(f"There is no folder {source}, and a Hub repo is named NAMESPACE/NAME.") from None


class Models:
    """Loads each model when it is first asked for, with the code installed here: no code of a repo is run.

    `turn` is held while a model computes: two at a time would only slow each other down.
    """

    def __init__(self, sources: dict[str, str], at_home: bool = False):
        """at_home: the page is served to this machine alone, so that its own folders may be named."""
        self.sources, self.at_home = sources, at_home
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
                source, revision = self.source(name)
                try:
                    self._rankers[name] = querit.load(source, revision)
                except (OSError, ValueError) as error:
                    logger.error("The model %s cannot be loaded: %s", name, error)
                    raise RefusedError(
                        f"{name} could not be loaded; whoever runs this page finds why in its log."
                    ) from None
            return self._rankers[name]

    def source(self, name: str) -> tuple[str, str | None]:
        """-> folder or Hub repo, and the commit where one is pinned."""
        whole = self.sources[name]
        source, _, revision = whole.partition("@")
        return (whole, None) if Path(whole).exists() else (source, revision or None)

    def takes_instruction(self, name: str) -> bool:
        """A chat template has a place for it; who reads a pair template was trained on query and document alone."""
        return self.ranker(name).tokenizer.chat_template is not None

    def repo(self, name: str) -> str | None:
        """The Hub repo that has the model and its card; None for a folder that is not the release."""
        source, _ = self.source(name)
        if not Path(source).exists():
            return source
        return querit.HUB_ID if Path(source).resolve() == querit.RELEASED.resolve() else None

    def python_arguments(self, name: str) -> str:
        """How a model is named in someone's own code. A folder's path is told to nobody but who runs the page."""
        source, revision = self.source(name)
        if Path(source).exists():
            if self.at_home:
                return repr(str(Path(source).resolve()))
            return repr(self.repo(name) or f"path/to/{Path(source).name}")
        return repr(source) + (f", revision={revision!r}" if revision else "")

    def warm_up(self) -> threading.Thread:
        """Load the first model aside, while the page is already there."""

        def load() -> None:
            try:
                self.ranker(self.names[0])("warm", ["up", "up to speed"])
            except RefusedError:
                pass  # it is in the log
            except Exception:
                logger.exception("The model %s cannot be used.", self.names[0])

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        return thread
