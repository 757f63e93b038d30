"""From the start of a pod's program to a model that is ready, and to its first token, with files that are in
the page cache and with files that are not. Prints a line for each, `name median need ok|MISS`, and ends with
1 where one is missed.

    start.py PROGRAM MODEL [ROUNDS]
"""

import ctypes
import http.client
import json
import mmap
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 5
COLD_SECONDS = 3.0
WARM_SECONDS = 0.5
# Longest time of one start, on any machine.
LIMIT_SECONDS = 60
# Pauses between two looks; a figure is too long by half of it, on average.
LOOK_SECONDS = 0.002
MIB = 1 << 20


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def drop(path):
    """Takes a file out of the page cache. Pages that are not written yet would stay, so they are written."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path):
    with open(path, "rb", buffering=0) as file:
        while file.read(MIB):
            pass


def cached_share(path):
    """The share of a file's pages that are in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # Writable, because ctypes takes the address of nothing else; private, so that nothing is written.
        access = {"prot": mmap.PROT_READ | mmap.PROT_WRITE, "flags": mmap.MAP_PRIVATE}
        with mmap.mmap(file.fileno(), size, **access) as area:
            pages = -(-size // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * pages)()
            start = (ctypes.c_char * size).from_buffer(area)
            failed = libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), states)
            # The area can only be closed once nothing points into it.
            del start
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            return sum(state & 1 for state in states) / pages


class Start:
    """One start of the program. Times are seconds since the moment before it."""

    def __init__(self, program, model, folder):
        port = free_port()
        config = folder / "pod.yaml"
        content = {
            "model": {"names": ["m"], "revision": "r1", "path": str(model)},
            "engine": {"contextTokens": 512},
        }
        # JSON is YAML.
        config.write_text(json.dumps(content))
        addresses = ["--http-address", f"127.0.0.1:{port}", "--grpc-address", f"127.0.0.1:{free_port()}"]
        log = folder / "log"
        begin = time.perf_counter()
        with log.open("wb") as to:
            process = subprocess.Popen([program, "--config", config, *addresses], stdout=to, stderr=to)
        try:
            self.listening_seconds = self.ready_seconds = None
            while self.ready_seconds is None:
                status = look(port)
                now = time.perf_counter() - begin
                if status is not None and self.listening_seconds is None:
                    self.listening_seconds = now
                if status == 200:
                    self.ready_seconds = now
                elif process.poll() is not None or now > LIMIT_SECONDS:
                    sys.exit(f"the program is not ready after {now:.1f} s: {log.read_text()[-1000:]}")
                else:
                    time.sleep(LOOK_SECONDS)
            first_token(port)
            self.token_seconds = time.perf_counter() - begin
        finally:
            process.kill()
            process.wait()


def look(port):
    """The status of readiness; none while nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_SECONDS)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def first_token(port):
    """Returns when the first piece of a streamed answer is here."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_SECONDS)
    body = {"model": "m", "prompt": "Water boils at", "max_tokens": 4, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data:") and b'"text"' in line:
            connection.close()
            return
    sys.exit(f"no token came: {answer.status}")


def measure(kind, need_seconds, program, model, rounds, folder):
    starts, shares = [], []
    for _ in range(rounds):
        if kind == "cold":
            drop(model)
            drop(program)
        else:
            read(model)
            read(program)
        shares.append(cached_share(model))
        starts.append(Start(program, model, folder))
    share = statistics.median(shares)
    print(f"{kind}: {100 * share:.0f} % of the model's pages are in the page cache at the start")
    is_met = True
    for name, need in (("listening", None), ("ready", need_seconds), ("token", need_seconds)):
        seconds = [getattr(start, f"{name}_seconds") for start in starts]
        median = statistics.median(seconds)
        verdict = "" if need is None else f"need < {need:.1f} s {'ok' if median < need else 'MISS'}"
        is_met = is_met and (need is None or median < need)
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"start to {name + ', ' + kind:20} {median:6.2f} s {spread:16} {verdict}", flush=True)
    return is_met


def main():
    program, model = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        cold = measure("cold", COLD_SECONDS, program, model, rounds, folder)
        warm = measure("warm", WARM_SECONDS, program, model, rounds, folder)
    sys.exit(0 if cold and warm else 1)


if __name__ == "__main__":
    main()
