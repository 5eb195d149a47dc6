"""A bucket in memory behind the JSON API of Google Cloud Storage, on a port of this machine.

It knows what gcsfs, TensorStore and google-cloud-storage ask for here: objects with generations and preconditions,
listings with a delimiter, whole, multipart and resumable uploads, copies. It is no proof that a real bucket works.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"
WHEN = "2026-01-01T00:00:00.000Z"


class Object(NamedTuple):
    """One version of an object."""

    data: bytes
    generation: int


class Bucket:
    """The objects by name.

    Args:
      url: of the server.
    """

    def __init__(self, url: str):
        self.url, self.objects, self.uploads, self.requests = url, {}, {}, []
        self.refuse: re.Pattern | None = None  # uploads to these names fail
        self._lock, self._count = threading.RLock(), 0

    def names(self, prefix: str = "") -> list[str]:
        """The names that start with a prefix, without it."""
        return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def environment(self) -> dict[str, str]:
        """What leads the three clients here."""
        alone = {"NO_GCE_CHECK": "true", "FSSPEC_GCS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, **alone}

    def about(self, name: str) -> dict[str, Any]:
        """The metadata of an object."""
        found = self.objects[name]
        digest = base64.b64encode(hashlib.md5(found.data).digest()).decode()
        numbers = {"size": str(len(found.data)), "generation": str(found.generation), "metageneration": "1"}
        times = {"updated": WHEN, "timeCreated": WHEN}
        return {"kind": "storage#object", "name": name, "bucket": NAME, "md5Hash": digest, **numbers, **times}

    def put(self, name: str, data: bytes, wanted: str | None) -> int:
        """Writes an object if its generation is the wanted one (0: there is none); an HTTP status."""
        with self._lock:
            there = self.objects.get(name)
            if wanted is not None and int(wanted) != (there.generation if there else 0):
                return 412
            if self.refuse and self.refuse.search(name):
                return 403
            self._count += 1
            self.objects[name] = Object(data, self._count)
            return 200

    def remove(self, name: str, wanted: str | None) -> int:
        """Removes an object; an HTTP status."""
        with self._lock:
            if name not in self.objects:
                return 404
            if wanted is not None and int(wanted) != self.objects[name].generation:
                return 412
            del self.objects[name]
            return 204

    def listing(self, prefix: str, delimiter: str, first: str, past: str) -> dict[str, Any]:
        """Objects and, with a delimiter, the folders right below a prefix."""
        items, folders = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or name < first or (past and name >= past):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed, or had enough
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_):
        """Says nothing."""

    def _answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, why: str) -> None:
        self._answer(status, {"error": {"code": status, "message": why}})

    def _asked(self) -> tuple[str, dict[str, str], bytes]:
        """Path, query and body."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.bucket.requests.append((self.command, self.path))
        return url.path, query, body

    def do_GET(self):
        path, query, _ = self._asked()
        name = _object(path)
        if path.endswith("/o"):
            names = ("prefix", "delimiter", "startOffset", "endOffset")
            self._answer(200, self.bucket.listing(*(query.get(name, "") for name in names)))
        elif name is None:
            self._answer(200, {"kind": "storage#bucket", "name": NAME, "location": "HERE", "locationType": "region"})
        elif name not in self.bucket.objects:
            self._refuse(404, f"No such object: {NAME}/{name}")
        elif query.get("alt") == "media":
            self._send(self.bucket.objects[name], query)
        else:
            self._answer(200, self.bucket.about(name))

    def _send(self, found: Object, query: dict[str, str]) -> None:
        if query.get("ifGenerationNotMatch") == str(found.generation):
            self._answer(304)
            return
        headers = {"X_Goog_Generation": str(found.generation), "Content_Type": "application/octet-stream"}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span:
            self._answer(200, found.data, **headers)
            return
        size = len(found.data)
        start = int(span[1]) if span[1] else size - int(span[2])
        stop = min(size, int(span[2]) + 1) if span[1] and span[2] else size
        if start >= size:
            self._refuse(416, "Requested range not satisfiable")
            return
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._answer(206, found.data[start:stop], **headers)

    def do_POST(self):
        path, query, body = self._asked()
        copy = re.fullmatch(r".*/b/[^/]+/o/([^/]+)/(rewriteTo/b/[^/]+|moveTo)/o/([^/]+)", path)
        if copy:
            self._copy(unquote(copy[1]), unquote(copy[3]), copy[2] == "moveTo")
        elif "upload_id" in query:
            self._resume(query, body)
        elif query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            number = str(len(self.bucket.uploads))
            self.bucket.uploads[number] = (name, query.get("ifGenerationMatch"), bytearray())
            self._answer(200, {}, Location=f"{self.bucket.url}{path}?upload_id={number}")
        elif query["uploadType"] == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\"]+)", self.headers["Content-Type"])[1].encode()
            _, about, rest = body.split(b"--" + boundary, 2)
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            data = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
            data = data[: data.rindex(b"--" + boundary)]
            self._put(name, data.removesuffix(b"\n").removesuffix(b"\r"), query)
        else:
            self._put(query["name"], body, query)

    do_PUT = do_POST

    def _copy(self, source: str, target: str, moved: bool) -> None:
        if source not in self.bucket.objects:
            self._refuse(404, f"No such object: {NAME}/{source}")
            return
        self.bucket.put(target, self.bucket.objects[source].data, None)
        about = self.bucket.about(target)
        if moved:
            self.bucket.remove(source, None)
        self._answer(200, about if moved else {"kind": "storage#rewriteResponse", "done": True, "resource": about})

    def _resume(self, query: dict[str, str], body: bytes) -> None:
        name, wanted, data = self.bucket.uploads[query["upload_id"]]
        data += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(data) < int(total):
            self._answer(308, Range=f"bytes=0-{len(data) - 1}")
        else:
            self._put(name, bytes(data), {"ifGenerationMatch": wanted} if wanted else {})

    def _put(self, name: str, data: bytes, query: dict[str, str]) -> None:
        status = self.bucket.put(name, data, query.get("ifGenerationMatch"))
        if status == 200:
            self._answer(200, self.bucket.about(name))
        else:
            self._refuse(status, "Precondition Failed" if status == 412 else "Forbidden")

    def do_DELETE(self):
        path, query, _ = self._asked()
        status = self.bucket.remove(_object(path) or "", query.get("ifGenerationMatch"))
        if status == 204:
            self._answer(204)
        else:
            self._refuse(status, f"No such object: {path}")


def _object(path: str) -> str | None:
    found = re.fullmatch(r".*/b/[^/]+/o/(.+)", path)
    return unquote(found[1]) if found else None


@contextmanager
def served() -> Iterator[Bucket]:
    """A bucket of the name `NAME`, for as long as the block runs."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("localhost", 0), handler)
    handler.bucket = Bucket(f"http://localhost:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
