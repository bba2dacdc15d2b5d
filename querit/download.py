"""A release on the Hub -> its folder in the cache: one commit, safetensors, no foreign code, every hash checked.

Over HTTP, huggingface_hub checks the size of what it downloads and not its content; transformers takes pickled weights
where there are no others, and asks a service on the net to convert them. `querit` loads what passed here, with the code
installed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx

from modeling_querit.modeling_querit import REMOTE_CODE

# Of the folder itself, not of folders in it: `querit` reads no more.
NEEDED = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
HASHES = {40: "sha1", 64: "sha256"}  # digits -> what git, or Git LFS, names a file by
CAUGHT = (OSError, ValueError, RuntimeError, httpx.TransportError, EntryNotFoundError, RevisionResolutionError)
UNREACHABLE = (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError, RevisionResolutionError)
MAIN = "main"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def download(repo: str, revision: str | None = None) -> Path:
    """The folder of the Hub repo at one commit: `revision`, or where main is now. Without network, what the cache has.

    Raises OSError or ValueError, naming the fix, for a repo or revision that cannot be had, weights that are no
    safetensors, code that is not Querit's, and files that are not what the Hub says they are; these are removed.
    """
    with plain_hub_errors(repo, revision):
        api = HfApi()
        # Once: a branch may move while files are fetched.
        commit = api.resolve_revision(repo, revision=revision).resolved
        config = Path(api.hf_hub_download(repo, "config.json", revision=commit))
        check_hash(config)
        check_code(config)
        folder = Path(api.snapshot_download(repo, revision=commit, allow_patterns=NEEDED, ignore_patterns=["*/*"]))
        for path in sorted(folder.iterdir()):
            if path.is_file():
                check_hash(path)
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"commit {commit} has no *.safetensors. Other weights, like pytorch_model.bin, can hold code and are "
                "not loaded: ask the authors for safetensors."
            )
    return folder


def check_code(path: Path) -> None:
    """Raise ValueError where a config.json names code other than Querit's own files."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        references = [*config.get("auto_map", {}).values()]
        references += [task["impl"] for task in config.get("custom_pipelines", {}).values()]
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ValueError("its config.json is none of a model.") from None
    own = {Path(file).stem for file in REMOTE_CODE}
    # A tokenizer's entry is a list, of which one may be null.
    named = {str(name) for entry in references for name in (entry if isinstance(entry, list) else [entry]) if name}
    foreign = sorted(name for name in named if name.rpartition(".")[0] not in own)
    if foreign:
        raise ValueError(
            f"its config.json names code that is not Querit's: {', '.join(foreign)}. It was not run, and no weights "
            "were downloaded. Check the repo's name; a model with code of its own is loaded with transformers, by "
            "those who have read that code."
        )


def check_hash(path: Path) -> None:
    """Remove a file of the Hub's cache whose content is not what the Hub's ETag said, and raise OSError.

    The cache names a file's content by that ETag, `path` being a link to it. Where there are no links there is no name
    to compare with (Windows without developer mode).
    """
    if not path.is_symlink():
        return
    stored = path.parent / os.readlink(path)
    expected = stored.name
    if len(expected) not in HASHES or not re.fullmatch("[0-9a-f]+", expected):
        return
    digest = hashlib.new(HASHES[len(expected)], usedforsecurity=len(expected) == 64)
    if len(expected) == 40:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() == expected:
        return
    for name in (path.resolve(), stored, path):  # the cache may link once more, to content shared between repos
        name.unlink(missing_ok=True)
    raise OSError(
        f"{path.name} is not what the Hub says it is: its hash is {digest.hexdigest()}, not {expected}. It was "
        "removed: run again to download it anew. If that fails too, what lies between you and the Hub changes files."
    )


@contextmanager
def plain_hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Raise what huggingface_hub raises as OSError or ValueError with a text that names the fix and holds no token."""
    try:
        yield
    except HFValidationError:
        raise ValueError(f"{repo} is neither a folder here nor the name of a Hub repo (namespace/name).") from None
    except CAUGHT as error:
        kind = ValueError if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError) else OSError
        text, token = explain(error, repo, revision), get_token()
        raise kind(text.replace(token, "***") if token else text) from None


def explain(error: Exception, repo: str, revision: str | None = None) -> str:
    host = constants.ENDPOINT
    if isinstance(error, LocalTokenNotFoundError):
        return f"There is no token for {host}: {LOGIN}."
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: ask for access at {host}/{repo}, then {LOGIN}."
    if isinstance(error, RepositoryNotFoundError):
        return f"{host} has no repo {repo} that you may see. Check its name; for a private repo {LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision or MAIN}: its commits are at {host}/{repo}/commits/{MAIN}."
    if isinstance(error, HfHubHTTPError):
        return f"{repo}: {explain_status(error, repo)}"
    if isinstance(error, UNREACHABLE):
        return (
            f"{host} cannot be reached ({type(error).__name__}), and what is needed of {repo} is not in this machine's "
            "cache. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        )
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of a file that is uploaded
        return f"{error} {explain(error.__cause__, repo)}"
    return f"{repo}: {error}"


def explain_status(error: HfHubHTTPError, repo: str) -> str:
    status, said = error.response.status_code, error.server_message or str(error)
    if isinstance(error, EntryNotFoundError):
        return "it has no such file, so it is no model that `querit` loads."
    if status == 401:
        return f"the token was refused ({said}): {LOGIN}."
    if status == 403:
        return (
            f"your token may not write there ({said}). Use one of role write, of an account of {repo.split('/')[0]}: "
            f"{constants.ENDPOINT}/settings/tokens."
        )
    if status in (409, 412):
        return f"it changed while this ran ({said}). Nothing of it was overwritten: run again to see what is there now."
    return f"the Hub answered {status} ({said})."
