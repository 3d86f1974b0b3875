"""A stand-in for the Hugging Face hub on localhost: repositories are kept in memory, of one commit each."""
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

REVISION = "0" * 40


class Hub(BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, bytes]] = {}

    def log_message(self, *_):
        pass

    def answer(self, content: bytes | dict | list, code: int = 200, **headers) -> None:
        if isinstance(content, dict | list):
            content = json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": REVISION, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        parts = [unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.repositories.get(name)
        if files is None:
            self.answer({"error": "no such repository"}, 404, **{"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and "tree" not in parts:
            self.answer({"id": name, "sha": REVISION, "private": False, "downloads": 0, "likes": 0, "tags": [],
                         "siblings": [{"rfilename": file} for file in files]})
        elif parts[0] == "api":
            self.answer([{"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                         for file, content in files.items()])
        elif parts[2] == "resolve" and parts[4] in files:
            content = files[parts[4]]
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            self.answer({"error": "no such file"}, 404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[1:3] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        elif "preupload" in parts:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer({"files": files})
        elif "commit" in parts:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories["/".join(parts[2:4])][line["value"]["path"]] = content
            self.answer({"commitUrl": f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{REVISION}",
                         "commitOid": REVISION, "hookOutput": ""})
        else:
            self.answer({})


def serve() -> tuple[ThreadingHTTPServer, str]:
    """Start it; returns the server, to be shut down, and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
