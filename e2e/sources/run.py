"""Sources against servers, with the program of a pod: prints a line for each and ends with 1 where one is not
as it must be. Started by e2e/tasks/test-sources.sh.

    run.py PROGRAM MODEL [--moto PYTHON_WITH_MOTO] [--only WORD]

Each line starts `trustformers-runtime` with a source and an own cache, waits until its model is ready or has
failed, and compares state, reason and the bytes that the server has sent.
"""

import argparse
import concurrent.futures
import dataclasses
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import server as sources

# A load takes seconds, a stall 30 s until it is noticed, a host that is away 16 s of attempts.
LIMIT_SECONDS = 120
# Two processors: more programs at a time only wait for each other.
AT_A_TIME = 3
MIB = 1 << 20
# The store asks for the first byte to learn the length, at most once each time it starts.
PROBE_BYTES = 1
# Each of the 8 connections of a killed process may have one more block sent into it.
UNREAD_BYTES = 8 * sources.BLOCK_BYTES


class Failed(Exception):
    """A line is not as it must be."""


@dataclasses.dataclass
class World:
    """What the lines share."""

    program: str
    model: pathlib.Path
    folder: pathlib.Path
    plain: sources.Server
    tls: sources.Server
    authority: pathlib.Path
    moto: str | None

    @property
    def size(self):
        return self.model.stat().st_size

    def plain_url(self, path=""):
        return f"http://127.0.0.1:{self.plain.server_address[1]}{path}"

    def tls_host(self):
        return f"localhost:{self.tls.server_address[1]}"

    def sent(self, path):
        return self.plain.shared.sent(path)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Pod:
    """A `trustformers-runtime` that loads one source."""

    def __init__(self, world, uri, environment=None, secret=None, cache=None, **model):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=world.folder))
        fetch = {"cacheDir": str(cache or self.folder / "cache")}
        if "maxCacheBytes" in model:
            fetch["maxCacheBytes"] = model.pop("maxCacheBytes")
        if secret:
            fetch["secretDir"] = str(self.folder / "secret")
            (self.folder / "secret").mkdir()
            for name, value in secret.items():
                (self.folder / "secret" / name).write_text(value)
        # JSON is YAML.
        config = {
            "model": {"names": ["m"], "revision": "r1", "path": uri, "fetch": fetch, **model},
            "engine": {"contextTokens": 128, "maxBatchSize": 2},
        }
        (self.folder / "pod.yaml").write_text(json.dumps(config))
        self.port = free_port()
        inherited = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
        self.log = self.folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    world.program,
                    "--config",
                    self.folder / "pod.yaml",
                    "--http-address",
                    f"127.0.0.1:{self.port}",
                    "--grpc-address",
                    f"127.0.0.1:{free_port()}",
                    "--threads",
                    "2",
                ],
                env={**inherited, **(environment or {})},
                stdout=log,
                stderr=log,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Ends it as a crash does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def ask(self, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=LIMIT_SECONDS) as answer:
            return json.load(answer)

    def status(self):
        """The model's status; none before the program listens."""
        if self.process.poll() is not None:
            raise Failed(f"the program ended: {self.log.read_text()[-500:]}")
        try:
            return self.ask("/v1/models")["data"][0]
        except (urllib.error.URLError, ConnectionError, http.client.HTTPException):
            return None

    def until(self, what, condition):
        """The status for which a condition holds."""
        end = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < end:
            status = self.status()
            if status and condition(status):
                return status
            time.sleep(0.05)
        raise Failed(f"{what} did not happen within {LIMIT_SECONDS} s: {self.log.read_text()[-500:]}")

    def ready(self):
        status = self.until("ready", lambda status: status["state"] == "ready" or status["reason"])
        if status["state"] != "ready":
            raise Failed(f"{status['reason']}: {status['message']}")
        answer = self.ask("/v1/generate", {"prompt": "Water boils at", "max_tokens": 2, "temperature": 0})
        if not answer:
            raise Failed("it answers nothing")
        return status

    def fails(self, reason):
        status = self.until("a reason", lambda status: status["reason"] or status["state"] == "ready")
        if status["reason"] != reason:
            raise Failed(f"{status['state']} {status['reason']} instead of {reason}: {status['message']}")
        return f"{reason}: {status['message'][:70]}"


def ready(world, uri, **options):
    with Pod(world, uri, **options) as pod:
        digest = pod.ready()["digest"]
    if digest != world.plain.shared.sha256:
        raise Failed(f"the digest is {digest}")
    return "ready, and it answers"


def fails(world, reason, uri, **options):
    with Pod(world, uri, **options) as pod:
        return pod.fails(reason)


def pinned(world):
    return {"sha256": world.plain.shared.sha256}


def at_most(what, bytes_, limit):
    if bytes_ > limit:
        raise Failed(f"{what}: {bytes_} bytes were sent, at most {limit} are needed")
    return f"{bytes_ / MIB:.1f} MiB were sent, the file has {(limit - PROBE_BYTES) / MIB:.1f}"


# The lines. Each takes the world and returns what it saw, or raises `Failed`.


def web_cut(world):
    path = f"/cut/{world.model.name}"
    ready(world, world.plain_url(path), **pinned(world))
    return at_most("cut", world.sent(path), world.size + PROBE_BYTES)


def web_stall(world):
    path = f"/stall/{world.model.name}"
    ready(world, world.plain_url(path), **pinned(world))
    return at_most("stalled", world.sent(path), world.size + PROBE_BYTES)


def web_corrupt(world):
    return fails(world, "DigestMismatch", world.plain_url(f"/corrupt/{world.model.name}"), **pinned(world))


def web_missing(world):
    return fails(world, "SourceNotFound", world.plain_url("/files/none.gguf"), **pinned(world))


def web_unauthorized(world):
    return fails(world, "Unauthorized", world.plain_url(f"/private/{world.model.name}"), **pinned(world))


def web_token(world):
    uri = world.plain_url(f"/private/{world.model.name}")
    return ready(world, uri, secret={"SOURCE_TOKEN": sources.TOKEN + "\n"}, **pinned(world))


def web_away(world):
    return fails(world, "SourceUnreachable", f"http://127.0.0.1:{free_port()}/m.gguf", **pinned(world))


def web_tls(world):
    uri = f"https://{world.tls_host()}/files/{world.model.name}"
    return ready(world, uri, environment={"SSL_CERT_FILE": str(world.authority)})


def web_tls_untrusted(world):
    return fails(world, "TlsFailed", f"https://{world.tls_host()}/files/{world.model.name}")


def disk_full(world):
    uri = world.plain_url(f"/files/{world.model.name}?full")
    return fails(world, "DiskFull", uri, maxCacheBytes=MIB, **pinned(world))


def hub_environment(world):
    return {"HF_ENDPOINT": world.plain_url()}


def hub(world):
    secret = {"HF_TOKEN": sources.TOKEN}
    return ready(world, "hf://org/tiny", environment=hub_environment(world), secret=secret)


def hub_without_token(world):
    return fails(world, "Unauthorized", "hf://org/tiny", environment=hub_environment(world))


def hub_missing(world):
    secret = {"HF_TOKEN": sources.TOKEN}
    return fails(world, "SourceNotFound", "hf://org/none", environment=hub_environment(world), secret=secret)


def hub_flaky(world):
    secret = {"HF_TOKEN": sources.TOKEN}
    ready(world, "hf://org/flaky", environment=hub_environment(world), secret=secret)
    sent = world.sent(f"/flaky/{world.model.name}")
    if sent != 2 * world.size:
        raise Failed(f"{sent} bytes were sent, and two transfers have {2 * world.size}")
    return "ready after a second transfer, the first was damaged"


def s3_secret(value):
    return {"AWS_ACCESS_KEY_ID": sources.S3_KEY, "AWS_SECRET_ACCESS_KEY": value}


def s3(world):
    environment = {"AWS_ENDPOINT_URL": world.plain_url()}
    return ready(world, "s3://bucket/models", environment=environment, secret=s3_secret(sources.S3_SECRET))


def s3_wrong_secret(world):
    environment = {"AWS_ENDPOINT_URL": world.plain_url()}
    return fails(
        world, "AccessDenied", "s3://bucket/models", environment=environment, secret=s3_secret("wrong")
    )


MOTO = """
import sys, boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
    aws_access_key_id="key", aws_secret_access_key="secret")
client.create_bucket(Bucket="bucket")
# In pieces of 8 MiB, as the AWS tools do it.
client.upload_file(sys.argv[1], "bucket", "models/" + sys.argv[1].rsplit("/", 1)[-1])
client.put_object(Bucket="bucket", Key="models/README.md", Body=b"text", ChecksumAlgorithm="SHA256")
print(port, flush=True)
sys.stdin.read()
"""


def moto(world):
    command = [world.moto, "-c", MOTO, str(world.model)]
    log = (world.folder / "moto.log").open("w")
    with (
        log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        port = server.stdout.readline().strip()
        if not port:
            raise Failed(f"moto did not start: {(world.folder / 'moto.log').read_text()[-500:]}")
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        options = {"environment": environment, "secret": s3_secret(sources.S3_SECRET)}
        seen = ready(world, "s3://bucket/models", **options)
        seen += "; " + fails(world, "SourceNotFound", "s3://bucket/none", **options)
        # Its process ends at the end of its input.
        server.stdin.close()
    return seen


def oci(world, password):
    login = {"SOURCE_USERNAME": sources.REGISTRY_USER, "SOURCE_PASSWORD": password}
    uri = f"oci://127.0.0.1:{world.plain.server_address[1]}/org/model:v1"
    return {"uri": uri, "secret": login}


def oci_login(world):
    return ready(world, **oci(world, sources.REGISTRY_PASSWORD))


def oci_wrong_login(world):
    return fails(world, "Unauthorized", **oci(world, "wrong"))


def one_cache(world):
    """Two processes, one cache: one transfer."""
    # Counts are by path, and other lines ask for this one: a server of its own.
    server = sources.start(world.model)
    uri = f"http://127.0.0.1:{server.server_address[1]}/files/{world.model.name}"
    cache = world.folder / "one-cache"
    options = {"cache": cache, **pinned(world)}
    with Pod(world, uri, **options) as one, Pod(world, uri, **options) as two:
        one.ready()
        two.ready()
    sent = server.shared.sent(f"/files/{world.model.name}")
    server.shutdown()
    return at_most("two processes", sent, world.size + 2 * PROBE_BYTES)


def killed(world):
    """A process that is killed in the middle of a transfer leaves its chunks to the next one."""
    path, cache = f"/held/{world.model.name}", world.folder / "killed"
    uri, shared = world.plain_url(path), world.plain.shared
    end = time.monotonic() + LIMIT_SECONDS
    with Pod(world, uri, cache=cache, **pinned(world)) as first:
        # The server stops at half of the file, and the journal has the chunks that are complete.
        while shared.sent(path) < world.size // 2 or not journalled(cache):
            if time.monotonic() > end:
                raise Failed(f"the first half did not come: {first.log.read_text()[-500:]}")
            time.sleep(0.05)
        first.kill()
    before, there = shared.sent(path), journalled(cache)
    with shared.lock:
        shared.is_held = False
        shared.changed.notify_all()
    with Pod(world, uri, cache=cache, **pinned(world)) as second:
        second.ready()
    again, missing = shared.sent(path) - before, world.size - there
    if again > missing + PROBE_BYTES + UNREAD_BYTES:
        raise Failed(f"{missing} bytes were missing after the kill, and {again} were sent")
    return f"{there / MIB:.0f} of {world.size / MIB:.0f} MiB were kept, {again / MIB:.0f} came afterwards"


def journalled(cache):
    """Bytes of complete chunks; the journal has a header of 16 bytes, then a byte for each chunk."""
    journals = list((cache / "partial").glob("*.journal")) if cache.exists() else []
    if not journals:
        return 0
    content = journals[0].read_bytes()
    return content[16:].count(1) * int.from_bytes(content[8:16], "little")


LINES = {
    "http: answers cut every 8 MiB, no byte twice": web_cut,
    "http: an answer stalls, no byte twice": web_stall,
    "http: one byte is wrong": web_corrupt,
    "http: 404": web_missing,
    "http: 401": web_unauthorized,
    "http: with its token": web_token,
    "http: nothing listens": web_away,
    "https: private authority, SSL_CERT_FILE": web_tls,
    "https: authority not trusted": web_tls_untrusted,
    "cache: smaller than the model": disk_full,
    "cache: two processes, one transfer": one_cache,
    "cache: kill -9 in the middle, resumed": killed,
    "hub: with its token": hub,
    "hub: without the token": hub_without_token,
    "hub: no such repository": hub_missing,
    "hub: a damaged transfer is fetched again": hub_flaky,
    "s3: right secret": s3,
    "s3: wrong secret": s3_wrong_secret,
    "s3: moto, upload in pieces; no such key": moto,
    "oci: with its login": oci_login,
    "oci: wrong login": oci_wrong_login,
}


def certificate(folder):
    """A certificate of localhost that is its own authority."""
    paths = folder / "tls.crt", folder / "tls.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-keyout", paths[1], "-out", paths[0]),
        ],
        check=True,
        capture_output=True,
    )
    return paths


def run(world, name, line):
    began = time.monotonic()
    try:
        seen, is_right = line(world), True
    except Failed as why:
        seen, is_right = str(why).replace("\n", " "), False
    seconds = time.monotonic() - began
    print(f"{'ok' if is_right else 'MISS':4}  {seconds:5.1f} s  {name:46} {seen}", flush=True)
    return is_right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--moto", help="a Python with moto[s3] and flask; without it moto's line is a miss")
    parser.add_argument("--only", default="", help="lines with this word")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        crt, key = certificate(folder)
        world = World(
            program=flags.program,
            model=flags.model.resolve(),
            folder=folder,
            plain=sources.start(flags.model),
            tls=sources.start(flags.model, certificate=crt, key=key),
            authority=crt,
            moto=flags.moto,
        )
        lines = {name: line for name, line in LINES.items() if flags.only in name}
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            results = list(pool.map(lambda item: run(world, *item), lines.items()))
    print(f"{sum(results)} of {len(results)} lines are as they must be")
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
