"""The part of Google Cloud Storage's JSON API that gcsfs, TensorStore and google-cloud-storage use, in memory.

    with FakeGcs("bucket") as server:     # on a free port, in threads of this process
        os.environ |= server.environment

Reads with ranges and conditions, lists with prefix, delimiter and pages, uploads in their three kinds, deletes, moves
and copies; a generation for every write, and preconditions on it, as checkpoints rely on them.
https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import dataclasses
import datetime
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

PAGE = 100  # objects of a listing in one answer; small, so that tests see pages


@dataclasses.dataclass(frozen=True)
class Stored:
    data: bytes
    generation: int
    time: str


class Refused(Exception):
    """(HTTP status, message)"""


class FakeGcs:
    """buckets[name][object] is what is stored."""

    def __init__(self, *buckets: str, authorized: bool = False):
        """authorized: refuse requests that carry no token."""
        self.buckets: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
        self.authorized = authorized
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}  # those that come in pieces: bucket, object, so far
        self._generations = itertools.count(1)
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes the libraries come here: gcsfs and google-cloud-storage, then TensorStore."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

    def __enter__(self) -> "FakeGcs":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def objects(self, bucket: str) -> dict[str, Stored]:
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def get(self, bucket: str, name: str, query: dict[str, str]) -> Stored:
        stored = self.objects(bucket).get(name)
        self.check(stored, query)
        if stored is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return stored

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> Stored:
        self.check(self.objects(bucket).get(name), query)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        stored = self.buckets[bucket][name] = Stored(bytes(data), next(self._generations), now)
        return stored

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        self.get(bucket, name, query)
        del self.buckets[bucket][name]

    @staticmethod
    def check(stored: Stored | None, query: dict[str, str]) -> None:
        """Preconditions; generation 0 is that of an object that does not exist."""
        generation = stored.generation if stored else 0
        if "ifGenerationMatch" in query and generation != int(query["ifGenerationMatch"]):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and generation == int(query["ifGenerationNotMatch"]):
            raise Refused(304, "Not modified")

    def list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, behind = query.get("startOffset", ""), query.get("endOffset", "")
        after, most = query.get("pageToken", ""), min(int(query.get("maxResults", PAGE)), PAGE)
        items: list[dict] = []
        prefixes: list[str] = []
        for name, stored in sorted(self.objects(bucket).items()):
            if not name.startswith(prefix) or name < first or (behind and name >= behind):
                continue
            cut = name.find(delimiter, len(prefix)) + len(delimiter) if delimiter else 0
            entry = name[:cut] if delimiter and cut >= len(prefix) + len(delimiter) else name
            if entry <= after or entry in prefixes:
                continue
            if len(items) + len(prefixes) == most:
                last = max([*prefixes, *(item["name"] for item in items)])
                return {
                    "kind": "storage#objects",
                    "items": items,
                    "prefixes": prefixes,
                    "nextPageToken": base64.b64encode(last.encode()).decode(),
                }
            if entry == name:
                items.append(resource(bucket, name, stored))
            else:
                prefixes.append(entry)
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


def resource(bucket: str, name: str, stored: Stored) -> dict:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "id": f"{bucket}/{name}/{stored.generation}",
        "generation": str(stored.generation),
        "metageneration": "1",
        "size": str(len(stored.data)),
        "contentType": "application/octet-stream",
        "timeCreated": stored.time,
        "updated": stored.time,
        "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
    }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeGcs

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        parameters = {k: v[-1] for k, v in urllib.parse.parse_qs(query).items()}
        if "pageToken" in parameters:
            parameters["pageToken"] = base64.b64decode(parameters["pageToken"]).decode()
        try:
            if self.fake.authorized and "Authorization" not in self.headers:
                raise Refused(401, "Anonymous caller does not have storage.objects.list access to the bucket.")
            with self.fake.lock:
                self.route(path, parameters, body)
        except Refused as e:
            status, message = e.args
            error = json.dumps({"error": {"code": status, "message": message}}).encode()
            self.answer(status, b"" if status == 304 else error)

    do_GET = do_POST = do_PUT = do_DELETE = do

    def route(self, path: str, query: dict[str, str], body: bytes) -> None:
        fake, method = self.fake, self.command
        if method in ("POST", "PUT") and "upload_id" in query:
            return self.piece(query["upload_id"], body)
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/([^/]+)(?:/(.+))?)?)?", path)
        if not found:
            raise Refused(501, f"the fake has no {method} {path}")
        bucket = found[2]
        name, action = (urllib.parse.unquote(found[i] or "") for i in (4, 5))
        if not found[3]:
            fake.objects(bucket)
            return self.json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})
        if found[1] == "/upload":
            return self.upload(bucket, query, body)
        if not name:
            return self.json(fake.list(bucket, query))
        if method == "GET":
            stored = fake.get(bucket, name, query)
            whole = resource(bucket, name, stored)
            return self.media(stored) if query.get("alt") == "media" else self.json(whole)
        if method == "DELETE":
            fake.delete(bucket, name, query)
            return self.answer(204)
        if moved := re.fullmatch(r"moveTo/o/(.+)", action):
            stored = fake.put(bucket, moved[1], fake.get(bucket, name, {}).data, {})
            fake.delete(bucket, name, {})
            return self.json(resource(bucket, moved[1], stored))
        if copied := re.fullmatch(r"rewriteTo/b/([^/]+)/o/(.+)", action):
            stored = fake.put(copied[1], copied[2], fake.get(bucket, name, {}).data, {})
            return self.json({"done": True, "resource": resource(copied[1], copied[2], stored)})
        raise Refused(501, f"the fake has no {method} {path}")

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        fake, kind = self.fake, query["uploadType"]
        if kind == "media":
            return self.json(resource(bucket, query["name"], fake.put(bucket, query["name"], body, query)))
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + boundary)[1:3])
            data = data.removesuffix(b"\r\n" if b"--" + boundary + b"\r\n" in body else b"\n")
            name = json.loads(about)["name"]
            return self.json(resource(bucket, name, fake.put(bucket, name, data, query)))
        name = query.get("name") or json.loads(body)["name"]
        fake.objects(bucket)
        identity = str(len(fake.uploads))
        fake.uploads[identity] = (bucket, name, bytearray())
        return self.answer(200, b"{}", {"Location": f"{fake.url}/upload/storage/v1/b/{bucket}/o?upload_id={identity}"})

    def piece(self, identity: str, body: bytes) -> None:
        bucket, name, so_far = self.fake.uploads[identity]
        span, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*":
            begin = int(span.split("-")[0])
            so_far[begin:] = body
        if total == "*" or len(so_far) < int(total):
            return self.answer(308, headers={"Range": f"bytes=0-{len(so_far) - 1}"} if so_far else {})
        return self.json(resource(bucket, name, self.fake.put(bucket, name, bytes(so_far), {})))

    def media(self, stored: Stored) -> None:
        data, status, headers = stored.data, 200, {"x-goog-generation": str(stored.generation)}
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(data)
            begin = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
            if begin >= size:
                raise Refused(416, "The requested range cannot be satisfied.")
            data, status = data[begin:end], 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self.answer(status, data, {"Content-Type": "application/octet-stream", **headers})

    def json(self, content: dict) -> None:
        self.answer(200, json.dumps(content).encode())

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """A client has hung up; gcsfs does before it has read all, and so does one that is killed."""
