"""Servers of model sources in one process: a web server that cuts, stalls, holds and damages its answers, a
hub, S3 and a registry, each with credentials that it checks. Standard library alone.

    server.py FILE [--address 127.0.0.1] [--certificate PEM --key PEM]

prints its port. `FILE` is what all of them serve, under its own name:

    /files/NAME            as it is                 /private/NAME   for the token `t0ken`
    /cut/NAME              each answer ends after CUT_BYTES
    /stall/NAME            the first long answer stops after CUT_BYTES and stays open
    /held/NAME             all transfers together stop at half of the file until POST /release
    /corrupt/NAME          one byte is always another one
    hf://org/tiny          (HF_ENDPOINT) for the token `t0ken`; `org/flaky` damages its first transfer
    s3://bucket/models     (AWS_ENDPOINT_URL) signed with `key` and `secret`
    oci://HOST/org/model:v1  for the user `user` with the password `pass`
    GET /counts            requests and bytes of bodies by path
"""

import argparse
import base64
import collections
import hashlib
import hmac
import http.server
import json
import pathlib
import ssl
import threading
import urllib.parse

CUT_BYTES = 8 << 20
# Answers at least this long are transfers; shorter ones ask for the length.
TRANSFER_BYTES = 64 << 10
BLOCK_BYTES = 256 << 10
TOKEN = "t0ken"
S3_KEY, S3_SECRET = "key", "secret"
REGISTRY_USER, REGISTRY_PASSWORD = "user", "pass"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Shared:
    """What the connections of one server share."""

    def __init__(self, file):
        self.file = file
        self.size = file.stat().st_size
        with file.open("rb") as opened:
            self.sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.counts = collections.defaultdict(lambda: {"requests": 0, "bytes": 0})
        self.is_held = True
        self.done_once = set()

    def sent(self, path):
        with self.lock:
            return self.counts[path]["bytes"]

    def once(self, name):
        """True for the first that asks with this name."""
        with self.lock:
            is_first = name not in self.done_once
            self.done_once.add(name)
            return is_first


def signature(handler, secret):
    """The signature that a request of S3 must have, or none where it has no form of one."""
    value = handler.headers.get("authorization", "")
    if not value.startswith("AWS4-HMAC-SHA256 "):
        return None, None
    fields = dict(part.strip().split("=", 1) for part in value.split(" ", 1)[1].split(","))
    key, day, region, service, end = fields["Credential"].split("/")
    path, _, query = handler.path.partition("?")
    query = "&".join(sorted(query.split("&")))
    names = fields["SignedHeaders"].split(";")
    headers = "".join(f"{name}:{handler.headers[name].strip()}\n" for name in names)
    content = handler.headers["x-amz-content-sha256"]
    canonical = "\n".join([handler.command, path, query, headers, fields["SignedHeaders"], content])
    scope = "/".join([day, region, service, end])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", handler.headers["x-amz-date"], scope, digest])
    found = f"AWS4{secret}".encode()
    for part in (day, region, service, end):
        found = hmac.digest(found, part.encode(), "sha256")
    right = hmac.digest(found, text.encode(), "sha256").hex()
    return key, hmac.compare_digest(right, fields["Signature"])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Counts are asked for instead."""

    @property
    def shared(self):
        return self.server.shared

    def do_POST(self):
        if self.path != "/release":
            return self.refuse(404)
        with self.shared.lock:
            self.shared.is_held = False
            self.shared.changed.notify_all()
        return self.text("")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.counted = path
        with self.shared.lock:
            self.shared.counts[path]["requests"] += 1
        first, _, rest = path.lstrip("/").partition("/")
        routes = {"counts": self.list_counts, "api": self.hub, "org": self.hub_file, "bucket": self.bucket}
        routes |= {"v2": self.registry, "token": self.registry_token}
        if first in routes:
            return routes[first](rest)
        if rest != self.shared.file.name:
            return self.refuse(404)
        if first == "private" and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.refuse(401)
        if first in ("files", "private", "cut", "stall", "held", "corrupt", "large", "flaky"):
            return self.send_model(first)
        return self.refuse(404)

    def list_counts(self, _):
        with self.shared.lock:
            counts = {path: dict(count) for path, count in self.shared.counts.items()}
        self.text(json.dumps(counts))

    # The hub: a list with digests, and files behind a redirect.

    def hub(self, rest):
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, {"x-error-code": "RepoNotFound"})
        parts = rest.split("/")
        if parts[:1] != ["models"] or parts[1:2] != ["org"] or parts[2:3] not in (["tiny"], ["flaky"]):
            return self.refuse(404, {"x-error-code": "RepoNotFound"})
        large = {"sha256": self.shared.sha256, "size": self.shared.size}
        file = {"rfilename": self.shared.file.name, "size": self.shared.size, "blobId": "0", "lfs": large}
        return self.text(json.dumps({"sha": COMMIT, "siblings": [file]}))

    def hub_file(self, rest):
        name, resolve, commit, file = (rest.split("/") + [""] * 4)[:4]
        if (resolve, commit, file) != ("resolve", COMMIT, self.shared.file.name):
            return self.refuse(404, {"x-error-code": "EntryNotFound"})
        folder = "flaky" if name == "flaky" else "large"
        return self.refuse(302, {"location": f"/{folder}/{urllib.parse.quote(file)}"})

    # S3: a list of one object, and the object.

    def bucket(self, rest):
        key, is_right = signature(self, S3_SECRET)
        if key != S3_KEY:
            return self.refuse(403, body="<Error><Code>InvalidAccessKeyId</Code></Error>")
        if not is_right:
            return self.refuse(403, body="<Error><Code>SignatureDoesNotMatch</Code></Error>")
        object_key = f"models/{self.shared.file.name}"
        if rest == object_key:
            return self.send_model("bucket")
        if rest:
            return self.refuse(404, body="<Error><Code>NoSuchKey</Code></Error>")
        prefix = urllib.parse.parse_qs(self.path.partition("?")[2]).get("prefix", [""])[0]
        entry = f"<Contents><Key>{object_key}</Key><Size>{self.shared.size}</Size>"
        entry += f'<ETag>"{self.shared.sha256[:32]}"</ETag></Contents>'
        listed = entry if object_key.startswith(prefix) else ""
        return self.text(f"<ListBucketResult>{listed}</ListBucketResult>")

    # A registry: a token service, one artifact of one layer.

    def registry_token(self, _):
        login = base64.b64encode(f"{REGISTRY_USER}:{REGISTRY_PASSWORD}".encode()).decode()
        if self.headers.get("authorization") != f"Basic {login}":
            return self.refuse(401)
        return self.text(json.dumps({"token": TOKEN}))

    def registry(self, rest):
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            scheme = "https" if self.server.is_tls else "http"
            realm = f"{scheme}://{self.headers['host']}/token"
            return self.refuse(401, {"www-authenticate": f'Bearer realm="{realm}",service="registry"'})
        if rest == f"org/model/blobs/sha256:{self.shared.sha256}":
            return self.send_model("blob")
        if rest != "org/model/manifests/v1":
            return self.refuse(404)
        layer = {
            "mediaType": "application/vnd.cncf.model.weight.v1.raw",
            "digest": f"sha256:{self.shared.sha256}",
            "size": self.shared.size,
            "annotations": {"org.cncf.model.filepath": self.shared.file.name},
        }
        return self.text(json.dumps({"schemaVersion": 2, "layers": [layer]}))

    # Answers.

    def text(self, body, status=200, headers=None):
        content = body.encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, headers=None, body=""):
        self.text(body, status, headers)

    def wanted_range(self):
        """Start and end of the bytes that are asked for, and whether they are a range."""
        value = self.headers.get("range", "")
        if not value.startswith("bytes="):
            return 0, self.shared.size, False
        start, last = value.removeprefix("bytes=").split("-")
        return int(start), min(int(last) + 1, self.shared.size), True

    def send_model(self, folder):
        start, end, is_range = self.wanted_range()
        self.send_response(206 if is_range else 200)
        if is_range:
            self.send_header("content-range", f"bytes {start}-{end - 1}/{self.shared.size}")
        self.send_header("etag", f'"{self.shared.sha256[:32]}"')
        self.send_header("content-length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        is_long = end - start >= TRANSFER_BYTES
        stalls = folder == "stall" and is_long and self.shared.once("stall")
        damages = folder == "corrupt" or (folder == "flaky" and is_long and self.shared.once("flaky"))
        if folder == "cut" or stalls:
            end = min(end, start + CUT_BYTES)
        with self.shared.file.open("rb") as file:
            file.seek(start)
            at = start
            while at < end:
                block = bytearray(file.read(min(BLOCK_BYTES, end - at)))
                if damages:
                    block[-1] ^= 1
                if folder == "held" and is_long:
                    self.wait_for_release()
                self.wfile.write(block)
                at += len(block)
                with self.shared.lock:
                    self.shared.counts[self.counted]["bytes"] += len(block)
        if stalls:
            # The other side gives up, and closes the connection.
            self.connection.recv(1)
        if folder == "cut" or stalls:
            self.close_connection = True

    def wait_for_release(self):
        with self.shared.lock:
            counts = self.shared.counts[self.counted]
            self.shared.changed.wait_for(
                lambda: not self.shared.is_held or counts["bytes"] < self.shared.size // 2
            )


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        """A connection that the other side ends is what the tests are about."""


def start(file, address="127.0.0.1", certificate=None, key=None):
    """A server that answers on threads of its own. Its `shared` has the counts."""
    server = Server((address, 0), Handler)
    server.shared = Shared(pathlib.Path(file))
    server.is_tls = certificate is not None
    if server.is_tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        # The handshake belongs to the thread of its connection, which the first read begins.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", help="what is served")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--certificate")
    parser.add_argument("--key")
    flags = parser.parse_args()
    server = start(flags.file, flags.address, flags.certificate, flags.key)
    print(server.server_address[1], flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
