"""A server of this machine that answers as ModelScope does, from folders such as `ROOT/models/me/tiny`."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Server:
    """Serves from a folder until it is closed, and notes what it was asked and with which tokens."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[str]()
        self.tokens = set[str | None]()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/repo" in self.path and "/repos/" not in self.path:
                    outer.asked.append(self.path)
                    outer.tokens.add(self.headers["Authorization"])
                self.send(*outer.answer(self.path))

            def send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str) -> tuple[int, bytes]:
        asked = re.fullmatch(r"/api/v1/(models|datasets)/(\w+/[\w-]+)/repo(/files|/tree)?", urlsplit(path).path)
        query = {key: values[0] for key, values in parse_qs(urlsplit(path).query).items()}
        place = self.root / asked[1] / asked[2] if asked else self.root / "absent"
        if asked is None or not place.is_dir() or query.get("Revision") != "master":
            return 404, json.dumps({"Code": 10010205001, "Success": False, "Message": "record not found"}).encode()
        if asked[3] is None:
            return 200, (place / query["FilePath"]).read_bytes()
        files = [self._about(file, place) for file in sorted(place.rglob("*")) if file.is_file()]
        return 200, json.dumps(
            {"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}}
        ).encode()

    def _about(self, file: Path, place: Path) -> dict[str, object]:
        content = file.read_bytes()
        name = str(file.relative_to(place))
        known = {"Name": file.name, "Path": name, "Type": "blob", "Size": len(content), "Revision": "0123"}
        return {**known, "Sha256": hashlib.sha256(content).hexdigest()}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
