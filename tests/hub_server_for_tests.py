"""A Hub on loopback: the part of its HTTP API that the client needs, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Fault:
    """A fault of the next requests that match.

    Attributes:
        method: Of the request.
        path: A regular expression that its path must hold.
        kind: A status code, `"drop"` (the connection ends without an answer), `"cut"` (it ends half-way through the
            body) or `"corrupt"` (one byte of the body differs).
        times: Number of requests.
    """

    method: str
    path: str
    kind: int | str
    times: int = 1


@dataclass
class Commit:
    files: dict[str, bytes]
    title: str
    parent: str | None


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> str:
        parent = self.branches.get(branch)
        content = json.dumps([parent, title, {path: _sha256(data) for path, data in sorted(files.items())}])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = Commit(files, title, parent)
        self.branches[branch] = sha
        return sha


class HubServer:
    """The server, its repositories and a log of `(method, path, status)`; a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"
        # Another host, as far as the client can see: redirects to it are not followed by HEAD, and get no token.
        self.storage = f"http://localhost:{self.http.server_address[1]}/storage"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def reset(self) -> None:
        for held in (self.repos, self.objects, self.faults, self.log):
            held.clear()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches.get(revision, revision)].files

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Titles, newest first; the empty commit of the creation is left out."""
        repo, titles = self.repos[repo_id], []
        sha = repo.branches.get(revision)
        while sha is not None and repo.commits[sha].parent is not None:
            titles.append(repo.commits[sha].title)
            sha = repo.commits[sha].parent
        return titles

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.kind
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Write nothing to the tests' output; requests are in `HubServer.log`."""

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self._fault = self.hub.fault(method, self.path)
        body = self._read_body()
        if body is None or self._fault == "drop":
            self.hub.log.append((method, path, 0))
            self.close_connection = True
            return
        if isinstance(self._fault, int):
            return self._error(self._fault, "made by the tests")
        for (wanted, pattern), answer in _ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and wanted in (method, "GET" if method == "HEAD" else method):
                with self.hub.lock:
                    return answer(self, body, **match.groupdict())
        return self._error(404, f"no such address: {path}")

    def _read_body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if self._fault == "cut":
                    return None
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            length = int(self.headers.get("Content-Length") or 0)
            if self._fault == "cut" and length:
                self.rfile.read(length // 2)
                return None
            body = self.rfile.read(length)
        if self._fault == "corrupt" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        return body

    # ------------------------------------------------------------------ answers

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.hub.log.append((self.command, unquote(urlsplit(self.path).path), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self._fault == "corrupt":
            self.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))
        else:
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        if code is not None:
            headers["X-Error-Code"] = code
        body = json.dumps({"error": message}).encode()
        self._send(status, body, Content_Type="application/json", X_Error_Message=message, **headers)

    def _signed_in(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._error(401, "Invalid username or password.")
        return False

    def _find(self, repo: str, revision: str = "main") -> tuple[str, Commit] | None:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._error(401, "Invalid username or password.")
            return None
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return sha, found.commits[sha]

    def _create(self, body: bytes) -> None:
        if not self._signed_in():
            return
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}", "name": repo}
        if repo in self.hub.repos:
            return self._json({**url, "error": "You already created this model repo"}, 409)
        self.hub.repos[repo] = Repo(bool(wanted.get("private")) or wanted.get("visibility") == "private")
        self.hub.repos[repo].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._json(url)

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        found = self._signed_in() and self._find(repo)
        if not found:
            return
        if branch in self.hub.repos[repo].branches:
            return self._error(409, "Reference already exists")
        self.hub.repos[repo].branches[branch] = found[0]
        return self._json({}, 201)

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        found = self._signed_in() and self._find(repo, revision)
        if not found:
            return
        files = []
        for file in json.loads(body)["files"]:
            known = found[1].files.get(file["path"])
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            oid = None if known is None else _oid(file["path"], known)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        if not (self._signed_in() and self._find(repo)):
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.storage}/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if _sha256(body) != oid:
            return self._error(400, "The sha256 of the content is not the one announced")
        self.hub.objects[oid] = body
        return self._send(200)

    def _verify(self, body: bytes, oid: str) -> None:
        size = json.loads(body)["size"]
        if len(self.hub.objects.get(oid, b"")) != size:
            return self._error(422, "The object is not there or of another size")
        return self._json({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._signed_in() and self._find(repo, revision)
        if not found:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files, title = dict(found[1].files), lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, f"The object of {value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        branch = "refs/pr/1" if "create_pr=1" in self.path else revision
        self.hub.repos[repo].branches.setdefault(branch, found[0])
        sha = self.hub.repos[repo].commit(branch, files, title)
        url = f"{self.hub.endpoint}/{repo}"
        self._json(
            {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": f"{url}/discussions/1"},
        )

    def _info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if found := self._find(repo, revision or "main"):
            siblings = [{"rfilename": path} for path in sorted(found[1].files)]
            info = {"id": repo, "sha": found[0], "private": self.hub.repos[repo].private, "siblings": siblings}
            if b"---" in (card := found[1].files.get("README.md", b"")):
                info["cardData"] = yaml.safe_load(card.decode().split("---")[1])
            self._json(info)

    def _tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        found = self._find(repo, revision)
        if not found:
            return
        entries = []
        for path, content in sorted(found[1].files.items()):
            if folder is None or path.startswith(f"{folder}/"):
                entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
                if path.endswith(".safetensors"):
                    entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
                entries.append(entry)
        if folder is not None and not entries:
            return self._error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return self._json(entries)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        found = self._find(repo, revision)
        if not found:
            return
        sha, commit = found
        if path not in commit.files:
            return self._error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        content = commit.files[path]
        etag, headers = f'"{_oid(path, content)}"', {"X_Repo_Commit": sha}
        if path.endswith(".safetensors"):
            headers.update(X_Linked_Etag=f'"{_sha256(content)}"', X_Linked_Size=str(len(content)))
            return self._send(302, b"", Location=f"{self.hub.storage}/{_sha256(content)}", **headers)
        return self._range(content, ETag=etag, **headers)

    def _stored(self, body: bytes, oid: str) -> None:
        if self.headers.get("Authorization"):
            return self._error(400, "The storage is no place for the Hub's token")
        return self._range(self.hub.objects[oid], ETag=f'"{oid}"')

    def _range(self, content: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not wanted:
            return self._send(200, content, Accept_Ranges="bytes", **headers)
        start = int(wanted[1])
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[start:], Content_Range=span, **headers)

    def _nothing(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _who(self, body: bytes) -> None:
        if self._signed_in():
            self._json({"name": "tester", "type": "user", "orgs": []})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    if path.endswith(".safetensors"):
        return _sha256(content)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ROUTES = {
    ("POST", "/api/repos/create"): _Handler._create,
    ("POST", "/api/validate-yaml"): _Handler._nothing,
    ("GET", "/api/whoami-v2"): _Handler._who,
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)"): _Handler._branch,
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)"): _Handler._preupload,
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)"): _Handler._commit,
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch"): _Handler._lfs_batch,
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})"): _Handler._store,
    ("POST", "/storage/(?P<oid>[0-9a-f]{64})/verify"): _Handler._verify,
    ("GET", "/storage/(?P<oid>[0-9a-f]{64})"): _Handler._stored,
    ("GET", rf"/api/models/{_REPO}"): _Handler._info,
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)"): _Handler._info,
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>refs/pr/\d+|[\w.-]+)(/(?P<folder>.+))?"): _Handler._tree,
    ("GET", rf"/{_REPO}/resolve/(?P<revision>refs/pr/\d+|[\w.-]+)/(?P<path>.+)"): _Handler._resolve,
}
