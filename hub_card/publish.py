"""A verified release folder -> a repo on the Hub: what would change, then one commit, then the version's tag.

Only huggingface_hub reads the token; it goes into no text, log or exception here.
"""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from hub_card.verify import verify
from querit.download import MAIN, plain_hub_errors

PACKAGE = "querit-reranker"
KEPT = ".gitattributes"  # the Hub's own, which says what Git LFS keeps


@dataclass
class Plan:
    """What publishing `folder` would change on the Hub. Sizes are in bytes."""

    folder: Path
    repo: str
    branch: str
    private: bool
    create_pr: bool
    tag: str | None  # None: a branch or a pull request is no release yet
    head: str | None = None  # the commit compared with; None: there is no such repo yet
    new_branch: bool = False
    tagged: bool = False
    added: dict[str, int] = field(default_factory=dict)
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)  # there, here
    deleted: dict[str, int] = field(default_factory=dict)
    unchanged: int = 0

    @property
    def changes(self) -> bool:
        return bool(self.added or self.changed or self.deleted)

    @property
    def overwrites(self) -> bool:
        """Whether files that others may use would be changed or deleted: a pull request asks its reader."""
        return bool(self.changed or self.deleted) and not self.create_pr

    def __str__(self) -> str:
        here = f"{self.repo}, branch {self.branch}"
        if self.head is None:
            lines = [f"{self.repo}: a new {'private ' if self.private else ''}repo"]
        elif self.new_branch:
            lines = [f"{here}: a new branch, from {self.head[:8]}"]
        else:
            lines = [f"{'Pull request to ' if self.create_pr else ''}{here}, at {self.head[:8]}"]
        lines += [f"  + {path}  {show_size(size)}" for path, size in self.added.items()]
        lines += [f"  ~ {path}  {show_size(old)} -> {show_size(new)}" for path, (old, new) in self.changed.items()]
        lines += [f"  - {path}  {show_size(size)}" for path, size in self.deleted.items()]
        size = sum(self.added.values()) + sum(new for _, new in self.changed.values())
        counts = f"{len(self.added)} added, {len(self.changed)} changed, {len(self.deleted)} deleted"
        lines.append(f"{counts}, {self.unchanged} unchanged; {show_size(size)} at most to upload")
        if self.tag:
            lines.append(f"tag {self.tag}" + (" (is there already)" if self.tagged else ""))
        return "\n".join(lines)


def plan_release(
    folder: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Verify `folder` and compare it, hash by hash, with the branch `revision` (main) of the Hub repo. Nothing changes.

    Raises OSError or ValueError, naming the fix, for a folder with problems, a repo that cannot be seen or written to,
    a version whose tag names something else, and options that do not go together.
    """
    folder = Path(folder)
    check_request(folder, repo, revision, create_pr)
    branch = revision or MAIN
    release = branch == MAIN and not create_pr
    plan = Plan(folder, repo, branch, private, create_pr, f"v{version(PACKAGE)}" if release else None)
    with plain_hub_errors(repo, revision):
        api = HfApi()
        check_token(api, needed=not dry_run)
        find_head(api, plan)
    if problems := verify(folder):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{folder} is not ready to be published:\n{listed}")
    with plain_hub_errors(repo, revision):
        compare(api, plan)
        if plan.tag and plan.head:
            check_tag(api, plan)
    return plan


def upload(plan: Plan) -> str:
    """Do as planned, in one commit on the one that the plan was made for, and say what was done.

    Raises OSError or ValueError, naming the fix, where the Hub refuses, or the branch has moved since: then nothing is
    overwritten.
    """
    if not plan.changes and (plan.tagged or not plan.tag):
        return f"{plan.repo}, branch {plan.branch}, is this folder already: nothing to publish."
    with plain_hub_errors(plan.repo, plan.branch):
        api = HfApi()
        head = plan.head
        if head is None:
            # No exist_ok: a repo made meanwhile is not ours to fill. None leaves it to the organisation's default.
            api.create_repo(plan.repo, private=plan.private or None)
            head = api.model_info(plan.repo).sha
        if plan.new_branch:
            api.create_branch(plan.repo, branch=plan.branch, revision=head)
        done = f"{plan.repo} at {head}"
        if plan.changes:
            head, done = commit(api, plan, head)
        if plan.tag:
            api.create_tag(plan.repo, tag=plan.tag, revision=head)
            done += f", tagged {plan.tag}"
    return done


def commit(api: HfApi, plan: Plan, head: str | None) -> tuple[str, str]:
    """Add, change and delete in one commit -> it and its address, once the Hub's hashes say that it is the folder."""
    operations: list = [CommitOperationAdd(path, plan.folder / path) for path in [*plan.added, *plan.changed]]
    operations += [CommitOperationDelete(path) for path in plan.deleted]
    done = api.create_commit(
        plan.repo,
        operations,
        commit_message=f"Release {plan.tag}" if plan.tag else f"querit-reranker {version(PACKAGE)}",
        revision=plan.branch,
        create_pr=plan.create_pr,
        parent_commit=head,
    )
    there = api.verify_repo_checksums(plan.repo, revision=done.pr_revision or done.oid, local_dir=plan.folder)
    wrong = [file["path"] for file in there.mismatches] + there.extra_paths
    wrong += [path for path in there.missing_paths if path != KEPT]
    if wrong:
        raise OSError(
            f"commit {done.oid} is not the folder: {', '.join(sorted(wrong))} differ. Did files change while they were "
            "uploaded? It is not tagged; run again."
        )
    return done.oid, str(done.pr_url or done.commit_url)


def check_request(folder: Path, repo: str, revision: str | None, create_pr: bool) -> None:
    with plain_hub_errors(repo):
        validate_repo_id(repo)
    if "/" not in repo:
        raise ValueError(f"{repo} has no namespace: name the repo as you-or-your-organisation/{repo}.")
    if create_pr and revision not in (None, MAIN):
        raise ValueError("A pull request goes to main: leave --revision out, or --create-pr.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. `querit build` makes one to publish.")


def check_token(api: HfApi, needed: bool) -> None:
    """Before files are hashed and questions asked: the Hub knows the token, and it may write."""
    if not needed and get_token() is None:
        return
    role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    if needed and role == "read":
        raise ValueError("your token can only read: make one of role write, and log in with `hf auth login`.")


def find_head(api: HfApi, plan: Plan) -> None:
    try:
        info = api.model_info(plan.repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if plan.create_pr:
            raise
        plan.new_branch = plan.branch != MAIN
        return
    if plan.private and not info.private:
        raise ValueError("it is public already: make it private in its settings on the Hub, or leave --private out.")
    plan.head = info.sha
    if plan.branch != MAIN:
        try:
            plan.head = api.model_info(plan.repo, revision=plan.branch).sha
        except RevisionNotFoundError:
            plan.new_branch = True


def compare(api: HfApi, plan: Plan) -> None:
    """Fill in what differs, by the hashes that the Hub keeps of every file."""
    paths = {
        path.relative_to(plan.folder).as_posix(): path for path in sorted(plan.folder.rglob("*")) if path.is_file()
    }
    here = {
        path: paths[path].stat().st_size for path in filter_repo_objects(paths, ignore_patterns=DEFAULT_IGNORE_PATTERNS)
    }
    if plan.head is None:
        plan.added = here
        return
    entries = api.list_repo_tree(plan.repo, recursive=True, revision=plan.head)
    there = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    found = api.verify_repo_checksums(plan.repo, revision=plan.head, local_dir=plan.folder)
    plan.added = {path: here[path] for path in found.extra_paths}
    plan.changed = {path: (there[path], here[path]) for path in (file["path"] for file in found.mismatches)}
    plan.deleted = {path: there[path] for path in found.missing_paths if path != KEPT}
    plan.unchanged = found.checked_count - len(plan.changed)


def check_tag(api: HfApi, plan: Plan) -> None:
    try:
        tagged = api.model_info(plan.repo, revision=plan.tag).sha
    except RevisionNotFoundError:
        return
    if plan.changes or tagged != plan.head:
        raise ValueError(
            f"its tag {plan.tag} names commit {tagged}, which is not this folder. Raise the version in pyproject.toml, "
            "or publish with --create-pr or to a branch (--revision), which are not tagged."
        )
    plan.tagged = True


def show_size(size: float) -> str:
    units = iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while size >= 1000 and unit != "GB":
        size, unit = size / 1000, next(units)
    return f"{size} B" if unit == "B" else f"{size:.1f} {unit}"
