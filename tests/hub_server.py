"""A small Hub on loopback, over real HTTP: enough of its API to make a repository, push to it and load from it.

huggingface_hub reads `HF_ENDPOINT` when it is imported: what talks to this Hub runs in a process of its own, with
`HubServer.environment`, or in this one, inside `HubServer.here`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session


@dataclass
class Request:
    """What a client sent; `path` is without the query, and names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class HubServer:
    """A Hub with one user, on a free port of loopback, for the time of a `with`.

    Args:
        user: the user whom the token belongs to.
        token: the user's token, which may write.
        read_token: another one of the same user, which may only read.
        echo_token: whether errors repeat the token that came, as a careless proxy might.
    """

    def __init__(self, user: str, token: str, read_token: str | None = None, echo_token: bool = False):
        self.user, self.token, self.read_token, self.echo_token = user, token, read_token, echo_token
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: dict[str, list[str]] = {}
        self.requests: list[Request] = []
        self.failures: dict[str, int] = {}  # part of a path -> the status that it answers

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables of a process that knows this Hub alone, with caches of its own and perhaps a token.

        Args:
            home: folder of all caches of the Hub and of diffusers' modules.
            token: the token of the environment; no token of the caller's own is passed on.

        Returns:
            All variables of the process.
        """
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        hub = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return inherited | proxies | hub | ({} if token is None else {"HF_TOKEN": token})

    @contextmanager
    def here(self, home: Path, token: str | None = None) -> Iterator[None]:
        """Inside, this process knows this Hub alone; as `environment` otherwise."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
                patch.delenv(name, raising=False)
            for name in ("NO_PROXY", "no_proxy"):
                patch.setenv(name, "127.0.0.1")
            if token is not None:
                patch.setenv("HF_TOKEN", token)
            values = {
                "ENDPOINT": self.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
                "HF_HUB_CACHE": str(home / "hub"),
                "HF_TOKEN_PATH": str(home / "token"),
                "HF_HUB_DISABLE_XET": True,
                "HF_HUB_OFFLINE": False,
            }
            for name, value in values.items():
                patch.setattr(constants, name, value)
            close_session()  # it keeps the proxies that it began with
            yield
        close_session()

    def sha(self, repo_id: str) -> str:
        """The newest commit; every repository begins with an empty one."""
        return self.commits[repo_id][-1]

    def add_commit(self, repo_id: str) -> str:
        commits = self.commits.setdefault(repo_id, [])
        commits.append(hashlib.sha1(f"{repo_id} {len(commits)}".encode()).hexdigest())
        return commits[-1]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):  # noqa: A002 (the base class's name)
        """Silence: `HubServer.requests` is the log."""

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.route = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, self.route, headers, self.body))
        for part, status in self.hub.failures.items():
            if part in self.route:
                return self.send_failure(status, "something broke\non this side")
        authorization = self.headers.get("Authorization")
        roles = {f"Bearer {self.hub.token}": "write", f"Bearer {self.hub.read_token}": "read"}
        self.role = roles.get(authorization)
        if authorization and self.role is None:
            return self.send_failure(401, "Invalid credentials in Authorization header")
        for pattern, method, answer in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method.split():
                return answer(self, *match.groups())
        return self.send_failure(404, "no such page")

    do_GET = do_HEAD = do_POST = answer

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_failure(self, status: int, message: str, code: str | None = None) -> None:
        if self.hub.echo_token:
            message += f"\n{self.headers.get('Authorization')}"
        headers = {"X-Error-Message": message.splitlines()[0]} | ({"X-Error-Code": code} if code else {})
        self.send_json({"error": message}, status, headers)

    def may_read(self, repo_id: str) -> bool:
        """Otherwise the request is answered: the real Hub tells a private repository from none at all to nobody."""
        if repo_id in self.hub.repos and (self.role or repo_id not in self.hub.private):
            return True
        self.send_failure(404 if self.role else 401, "Repository not found", "RepoNotFound")
        return False

    def may_write(self) -> bool:
        if self.role == "write":
            return True
        self.send_failure(403 if self.role else 401, "You don't have the rights to write here")
        return False

    # ------------------------------------------------------------------------------------------------- the answers

    def whoami(self) -> None:
        if self.role is None:
            return self.send_failure(401, "Invalid username or password.")
        access = {"accessToken": {"displayName": "test", "role": self.role}}
        self.send_json({"type": "user", "name": self.hub.user, "orgs": [], "auth": access})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.hub.user
        repo_id = f"{owner}/{wanted['name']}"
        if not self.may_write():
            return None
        if owner != self.hub.user:
            return self.send_failure(403, f"You don't have the rights to create a model under {owner}")
        answer = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self.send_json({"error": "You already created this model repo", **answer}, 409)
        self.hub.repos[repo_id] = {}
        self.hub.add_commit(repo_id)
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(repo_id)
        return self.send_json(answer)

    def validate(self) -> None:
        """As the real Hub, rejects a base model that is no id."""
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        base = data.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return self.send_json({"errors": [{"message": message}], "warnings": []}, 400)
        return self.send_json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str) -> None:
        if self.may_read(repo_id) and self.may_write():
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            answers = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self.send_json({"files": answers})

    def commit(self, repo_id: str) -> None:
        if not (self.may_read(repo_id) and self.may_write()):
            return
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.hub.repos[repo_id][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        sha = self.hub.add_commit(repo_id)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def info(self, repo_id: str) -> None:
        if self.may_read(repo_id):
            siblings = [{"rfilename": path} for path in sorted(self.hub.repos[repo_id])]
            private, sha = repo_id in self.hub.private, self.hub.sha(repo_id)
            self.send_json({"id": repo_id, "modelId": repo_id, "private": private, "sha": sha, "siblings": siblings})

    def tree(self, repo_id: str) -> None:
        if self.may_read(repo_id):
            files = self.hub.repos[repo_id].items()
            self.send_json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in sorted(files)
                ]
            )

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if not self.may_read(repo_id):
            return None
        if revision not in ("main", *self.hub.commits[repo_id]):
            return self.send_failure(404, "Invalid rev id", "RevisionNotFound")
        content = self.hub.repos[repo_id].get(path)
        if content is None:
            return self.send_failure(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.hub.sha(repo_id)}
        return self.send(200, content, {"Content-Type": "application/octet-stream", **headers})


_ID = r"([^/]+/[^/]+)"
_ROUTES = (
    ("/api/whoami-v2", "GET", _Handler.whoami),
    ("/api/repos/create", "POST", _Handler.create),
    ("/api/validate-yaml", "POST", _Handler.validate),
    (rf"/api/models/{_ID}/preupload/main", "POST", _Handler.preupload),
    (rf"/api/models/{_ID}/commit/main", "POST", _Handler.commit),
    (rf"/api/models/{_ID}/tree/[^/]+", "GET", _Handler.tree),
    (rf"/api/models/{_ID}(?:/revision/[^/]+)?", "GET", _Handler.info),
    (rf"/{_ID}/resolve/([^/]+)/(.+)", "GET HEAD", _Handler.resolve),
)
