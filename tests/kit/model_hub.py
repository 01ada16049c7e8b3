"""A model hub on this machine: the part of the Hugging Face API that a push uses, with Git's and LFS's own digests."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "a" * 34


class Hub:
    """Repositories by name: private, and the files of the newest commit as (kind, content). refuse: (method, pattern of
    the path) -> status, asked first. rot: LFS content that the hub keeps differently."""

    def __init__(self):
        self.repos, self.lfs, self.private, self.commits = {}, {}, {}, 0
        self.refuse, self.requests, self.rot = {}, [], False


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.answer("POST")

    def do_GET(self):
        self.answer("GET")

    def do_PUT(self):
        self.answer("PUT")

    def send(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer(self, method):
        hub, path = self.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub.requests.append(f"{method} {path}")
        for (verb, pattern), status in hub.refuse.items():
            if verb == method and re.search(pattern, path):
                return self.send(status, {"error": "told to"})
        if method == "PUT":
            hub.lfs[path.rpartition("/")[2]] = body
            return self.send(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials"})
        for pattern, do in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                if match.groups() and match[1] not in hub.repos:
                    return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return do(self, hub, body, *match.groups())
        return self.send(404, {"error": f"no {path}"})

    def create(self, hub, body):
        told = json.loads(body)
        name = "/".join(filter(None, [told.get("organization"), told["name"]]))
        exists = name in hub.repos
        hub.repos.setdefault(name, {})
        hub.private.setdefault(name, told.get("private", told.get("visibility") == "private"))
        self.send(409 if exists else 200, {"url": f"/{name}", "id": name, "name": name})

    def yaml(self, hub, body):
        front = json.loads(body)["content"]
        bad = re.search(r"base_model: (?!\S+/\S+$)", front, re.M) or "base_model: /" in front
        errors = [{"message": '"base_model" is not valid'}] if bad else []
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, hub, body, repo):
        known, files = hub.repos[repo], []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith((".png", ".safetensors", ".bin")) else "regular"
            kind, content = known.get(file["path"], (None, b""))
            oid = {"lfs": hashlib.sha256(content).hexdigest(), "regular": git_id(content)}.get(kind)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": files})

    def batch(self, hub, body, repo):
        host, objects = f"http://{self.headers['Host']}", []
        for file in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{host}/lfs/{file['oid']}"}}}
            objects.append({**file, **({} if file["oid"] in hub.lfs else upload)})
        self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, hub, body, repo):
        new = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                content = hub.lfs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                new[value["path"]] = ("lfs", content)
        hub.repos[repo].update(new)
        hub.commits += 1
        oid = f"{hub.commits:040d}"
        self.send(200, {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{oid}", "commitOid": oid})

    def paths(self, hub, body, repo, revision):
        from urllib.parse import parse_qs

        text = body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        found = []
        for path in wanted:
            if path in hub.repos[repo]:
                kind, content = hub.repos[repo][path]
                content += b"rot" if hub.rot else b""
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                row = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
                found.append({**row, **({"lfs": lfs} if kind == "lfs" else {})})
        self.send(200, found)

    def info(self, hub, body, repo):
        self.send(200, {"id": repo, "modelId": repo, "sha": f"{hub.commits:040d}", "siblings": [], "tags": []})


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.yaml,
    rf"/api/models/{REPO}/preupload/main": Handler.preupload,
    rf"/{REPO}\.git/info/lfs/objects/batch": Handler.batch,
    rf"/api/models/{REPO}/commit/main": Handler.commit,
    rf"/api/models/{REPO}/paths-info/(\w+)": Handler.paths,
    rf"/api/models/{REPO}(?:/revision/main)?": Handler.info,
}


@contextmanager
def model_hub():
    """A hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
