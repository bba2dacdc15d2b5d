"""A Hub on 127.0.0.1: enough of huggingface.co's protocol for the real clients, and faults on demand.

    with LoopbackHub() as hub:
        commit = hub.push("querit/nano", folder)
        subprocess.run(["hf", "download", "querit/nano"], env=hub.environment(tmp_path / "home"))

Paths, headers and JSON are what huggingface_hub sends and reads (hf_api.py, file_download.py, _commit_api.py, lfs.py);
uploads of large files follow https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md. As on huggingface.co, they
come from, and go to, another host: here `localhost`, which must never be sent a token. There is no Xet.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DATE = "2026-01-01T00:00:00.000Z"
LARGE = (".safetensors", ".bin", ".onnx", ".gguf")  # kept by Git LFS, and all files over 10 MiB
GITATTRIBUTES = b"".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n".encode() for suffix in LARGE)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > 10 * 2**20


@dataclass
class File:
    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.content)}")
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        return git_oid(self.pointer if self.large else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def describe(self, path: str) -> dict:
        about: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.large:
            about["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return about


Tree = dict[str, File]


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> commit

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((self.refs[name] for name in names if name in self.refs), None)

    def add(self, tree: Tree, message: str, ref: str, parent: str | None) -> str:
        what = [parent, message, sorted((path, file.oid) for path, file in tree.items())]
        commit = hashlib.sha1(json.dumps(what).encode(), usedforsecurity=False).hexdigest()
        self.commits[commit], self.messages[commit], self.refs[ref] = tree, message, commit
        return commit


@dataclass
class User:
    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"


@dataclass
class Request:
    method: str
    path: str
    host: str
    token: str | None
    headers: dict[str, str]
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Response:
    body: Any = b""  # bytes, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after so many bytes of the body


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        self.response = Response({"error": message}, status, {"X-Error-Message": message, **headers})
        if code:
            self.response.headers["X-Error-Code"] = code


class LoopbackHub:
    """`requests` is all that was asked, in order. Faults, by the path of a file in its repo:

    instead: the body that is sent, under the headers of the right one.
    cuts: for each download in turn, the bytes after which the connection breaks; later ones are whole.
    moved: the commit that X-Repo-Commit names.
    before: called with each request before it is answered, for instance to move a branch.
    """

    def __init__(self, page_size: int = 5):
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.instead: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.moved: dict[str, str] = {}
        self.before: Callable[[Request], None] = lambda request: None
        self.lock = threading.RLock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self) -> None:
                hub.answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self.server.server_address[1]
        self.url, self.store = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def push(self, name: str, folder: Path | Tree, ref: str = "refs/heads/main", private: bool = False) -> str:
        """Commit the files of a folder as they are, and return the commit's 40 hex digits."""
        repo = self.repos.setdefault(name, Repo(private))
        return repo.add(read_tree(folder), "push", ref, repo.refs.get(ref))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a client that knows only this Hub, its caches empty at first and under `home`."""
        proxies = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and name.upper() not in proxies
        }
        names = ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")
        switched_off = {f"HF_HUB_DISABLE_{name}": "1" for name in names}
        given = {"HF_TOKEN": token} if token else {}
        return {**kept, **switched_off, **given, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "*"}

    def contents(self, name: str) -> list[Request]:
        """The requests so far that name a repo and a revision: what of which commit was read."""
        return [request for request in self.requests if re.search(rf"/{name}/(resolve|tree|revision)/", request.path)]

    def writes(self) -> list[Request]:
        """The requests so far that asked for a change."""
        asking = ("/paths-info/", "/validate-yaml")
        return [r for r in self.requests if r.method in ("POST", "PUT") and not any(part in r.path for part in asking)]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        scheme, _, token = headers.get("authorization", "").partition(" ")
        size = int(headers.get("content-length", 0))
        body = handler.rfile.read(size) if "transfer-encoding" not in headers else b"".join(read_chunks(handler))
        request = Request(
            handler.command, url.path, headers.get("host", ""), token if scheme == "Bearer" else None, headers,
            parse_qs(url.query), body,
        )  # fmt: skip
        with self.lock:
            try:
                self.before(request)
                self.requests.append(request)
                response = self.route(request)
            except HubError as error:
                response = error.response
        content = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        handler.send_response(response.status)
        sent = {"Content-Type": "application/json" if content is not response.body else "application/octet-stream"}
        for name, value in {**sent, "Content-Length": str(len(content)), **response.headers}.items():
            handler.send_header(name, value)
        with suppress(ConnectionError):
            handler.end_headers()
            if request.method != "HEAD":
                handler.wfile.write(content[: response.cut])
        if response.cut is not None:
            handler.close_connection = True

    def route(self, request: Request) -> Response:
        for methods, pattern, action in ROUTES:
            if request.method in methods and (match := re.fullmatch(pattern, request.path)):
                return action(self, request, **{key: unquote(part or "") for key, part in match.groupdict().items()})
        raise HubError(404, f"The loopback Hub does not know {request.method} {request.path}")

    # Who may do what

    def user(self, request: Request) -> User | None:
        if request.token is None:
            return None
        if request.token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[request.token]

    def repo(self, request: Request, name: str, write: bool = False) -> Repo:
        user, repo = self.user(request), self.repos.get(name)
        mine = user is not None and name.partition("/")[0] in (user.name, *user.organisations)
        if repo is None or (repo.private and not mine):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and (not mine or (user and user.role == "read")):
            raise HubError(403, f"You don't have write access to {name}")
        return repo

    def at(self, repo: Repo, revision: str) -> tuple[str, Tree]:
        commit = repo.resolve(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    # Reading

    def who_am_i(self, request: Request) -> Response:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": user.role}
        organisations = [{"type": "org", "name": name} for name in user.organisations]
        auth = {"type": "access_token", "accessToken": token}
        return Response({"type": "user", "name": user.name, "orgs": organisations, "auth": auth})

    def model(self, request: Request, name: str, revision: str) -> Response:
        repo = self.repo(request, name)
        commit, tree = self.at(repo, revision or "main")
        about = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "gated": False, "disabled": False}
        siblings = [{"rfilename": path} for path in sorted(tree)]
        return Response({**about, "tags": [], "lastModified": DATE, "createdAt": DATE, "siblings": siblings})

    def tree(self, request: Request, name: str, revision: str, folder: str) -> Response:
        _, tree = self.at(self.repo(request, name), revision)
        inside = f"{folder}/" if folder else ""
        paths = sorted(path for path in tree if path.startswith(inside))
        if folder and not paths:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {parent.as_posix() for path in paths for parent in Path(path).parents} - {".", folder}
        entries = [{"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0} for path in folders]
        entries += [tree[path].describe(path) for path in paths]
        if request.query.get("recursive", ["False"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(inside) :]]
        entries.sort(key=lambda entry: entry["path"])
        start = int(request.query.get("cursor", ["0"])[0])
        page, end, headers = entries[start : start + self.page_size], start + self.page_size, {}
        if end < len(entries):
            others = "".join(f"&{key}={value[0]}" for key, value in request.query.items() if key != "cursor")
            headers["Link"] = f'<{self.url}{request.path}?cursor={end}{others}>; rel="next"'
        return Response(page, headers=headers)

    def paths_info(self, request: Request, name: str, revision: str) -> Response:
        _, tree = self.at(self.repo(request, name), revision)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return Response([tree[path].describe(path) for path in wanted if path in tree])

    def refs(self, request: Request, name: str) -> Response:
        repo = self.repo(request, name)

        def under(prefix: str) -> list[dict]:
            refs = sorted((ref, commit) for ref, commit in repo.refs.items() if ref.startswith(prefix))
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit} for ref, commit in refs]

        pulls = [{**ref, "name": ref["ref"]} for ref in under("refs/pr/")]
        branches, tags = under("refs/heads/"), under("refs/tags/")
        return Response({"branches": branches, "converts": [], "tags": tags, "pullRequests": pulls})

    def file(self, request: Request, name: str, revision: str, path: str) -> Response:
        commit, tree = self.at(self.repo(request, name), revision)
        commit = self.moved.get(path, commit)
        if path not in tree:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", **{"X-Repo-Commit": commit})
        file, headers = tree[path], {"X-Repo-Commit": commit, "ETag": f'"{tree[path].etag}"'}
        if not file.large:
            return self.content(request, path, file.content, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return Response(b"", 302, {**headers, "Location": f"{self.store}/store/{file.sha256}/{path}"})

    def large_file(self, request: Request, sha256: str, path: str) -> Response:
        if request.token:
            raise HubError(400, "The store was sent a token.")
        trees = (tree for repo in self.repos.values() for tree in repo.commits.values())
        file = next(tree[path] for tree in trees if path in tree and tree[path].etag == sha256)
        return self.content(request, path, file.content, {"ETag": f'"{sha256}"'})

    def content(self, request: Request, path: str, content: bytes, headers: dict[str, str]) -> Response:
        if request.method == "HEAD":
            return Response(content, headers=headers)
        content = self.instead.get(path, content)
        cut = self.cuts[path].pop(0) if self.cuts.get(path) else None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return Response(content, headers=headers, cut=cut)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return Response(content[first : last + 1], 206, headers, cut)

    # Writing

    def create(self, request: Request) -> Response:
        user, wanted = self.user(request), request.json
        if user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = wanted.get("organization") or user.name
        if user.role == "read" or namespace not in (user.name, *user.organisations):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        name = f"{namespace}/{wanted['name']}"
        if name in self.repos:
            raise HubError(409, "You already created this model repo")
        first = {".gitattributes": File(GITATTRIBUTES, large=False)}
        self.repos[name] = Repo(wanted.get("visibility") == "private")
        self.repos[name].add(first, "initial commit", "refs/heads/main", None)
        return Response({"url": f"{self.url}/{name}", "name": name})

    def validate_yaml(self, request: Request) -> Response:
        front = re.match(r"---\n(.*?)\n---\n", request.json["content"], re.DOTALL)
        if front and not isinstance(yaml.safe_load(front[1]), dict):
            return Response({"errors": [{"message": "metadata must be a mapping"}], "warnings": []}, 400)
        return Response({"errors": [], "warnings": []})

    def upload_modes(self, request: Request, name: str, revision: str) -> Response:
        _, tree = self.at(self.repo(request, name, write=True), revision)
        files = []
        for wanted in request.json["files"]:
            path, mode = wanted["path"], "lfs" if is_large(wanted["path"], wanted["size"]) else "regular"
            oid = tree[path].etag if path in tree else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Response({"files": files})

    def lfs_batch(self, request: Request, name: str) -> Response:
        self.repo(request, name, write=True)
        answers = []
        for wanted in request.json["objects"]:
            oid, answer = wanted["oid"], dict(wanted)
            if oid not in self.uploads:
                verify = {"href": f"{self.url}/lfs-verify"}
                answer["actions"] = {"upload": {"href": f"{self.store}/lfs-upload/{oid}"}, "verify": verify}
            answers.append(answer)
        return Response({"transfer": "basic", "objects": answers})

    def lfs_upload(self, request: Request, oid: str) -> Response:
        if request.token or hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The store was sent a token, or other content than announced.")
        self.uploads[oid] = request.body
        return Response()

    def lfs_verify(self, request: Request) -> Response:
        if len(self.uploads.get(request.json["oid"], b"")) != request.json["size"]:
            raise HubError(404, "No such object")
        return Response({})

    def commit(self, request: Request, name: str, revision: str) -> Response:
        repo = self.repo(request, name, write=True)
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in repo.refs:
            raise HubError(404, f"{revision} is no branch", "RevisionNotFound")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header, parent = lines[0]["value"], repo.refs[ref]
        pull = request.query.get("create_pr") == ["1"]
        if header.get("parentCommit", parent) != parent and not pull:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        parent = header.get("parentCommit", parent)
        tree = dict(repo.commits[parent])
        for line in lines[1:]:
            change = line["value"]
            if line["key"] == "file":
                tree[change["path"]] = File(base64.b64decode(change["content"]), large=False)
            elif line["key"] == "lfsFile":
                if change["oid"] not in self.uploads:
                    raise HubError(400, f"{change['path']} was never uploaded")
                tree[change["path"]] = File(self.uploads[change["oid"]], large=True)
            elif line["key"] == "deletedFile":
                if tree.pop(change["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise HubError(400, f"The loopback Hub does not know {line['key']}")
        number = 1 + sum(other.startswith("refs/pr/") for other in repo.refs)
        commit = repo.add(tree, header["summary"], f"refs/pr/{number}" if pull else ref, parent)
        link = f"{self.url}/{name}/discussions/{number}" if pull else None
        found = {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}
        return Response({**found, "pullRequestUrl": link, "hookOutput": ""})

    def tag(self, request: Request, name: str, revision: str) -> Response:
        repo = self.repo(request, name, write=True)
        commit, _ = self.at(repo, revision)
        return self.new_ref(repo, f"refs/tags/{request.json['tag']}", commit)

    def branch(self, request: Request, name: str, branch: str) -> Response:
        repo = self.repo(request, name, write=True)
        commit, _ = self.at(repo, request.json.get("startingPoint", "main"))
        return self.new_ref(repo, f"refs/heads/{branch}", commit)

    def new_ref(self, repo: Repo, ref: str, commit: str) -> Response:
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = commit
        return Response({})


def read_tree(folder: Path | Tree) -> Tree:
    if isinstance(folder, dict):
        return folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = ((path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths)
    return {name: File(content, is_large(name, len(content))) for name, content in found}


def read_chunks(handler: BaseHTTPRequestHandler) -> Iterator[bytes]:
    """The body of a request with `Transfer-Encoding: chunked`."""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        yield handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
READ = ("GET", "HEAD")
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Response]]] = [
    (READ, r"/api/whoami-v2", LoopbackHub.who_am_i),
    (READ, rf"/api/models/{NAME}(/revision/{REVISION})?", LoopbackHub.model),
    (READ, rf"/api/models/{NAME}/tree/{REVISION}(/(?P<folder>.+))?", LoopbackHub.tree),
    (READ, rf"/api/models/{NAME}/refs", LoopbackHub.refs),
    (READ, rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", LoopbackHub.file),
    (READ, r"/store/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)", LoopbackHub.large_file),
    (("POST",), rf"/api/models/{NAME}/paths-info/{REVISION}", LoopbackHub.paths_info),
    (("POST",), r"/api/validate-yaml", LoopbackHub.validate_yaml),
    (("POST",), r"/api/repos/create", LoopbackHub.create),
    (("POST",), rf"/api/models/{NAME}/preupload/{REVISION}", LoopbackHub.upload_modes),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", LoopbackHub.lfs_batch),
    (("POST",), r"/lfs-verify", LoopbackHub.lfs_verify),
    (("PUT",), r"/lfs-upload/(?P<oid>[0-9a-f]{64})", LoopbackHub.lfs_upload),
    (("POST",), rf"/api/models/{NAME}/commit/{REVISION}", LoopbackHub.commit),
    (("POST",), rf"/api/models/{NAME}/tag/{REVISION}", LoopbackHub.tag),
    (("POST",), rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", LoopbackHub.branch),
]
