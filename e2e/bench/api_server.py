"""A client of the API server for measurements: requests, watches, its metrics; and what processes take."""

import base64
import collections
import contextlib
import http.client
import json
import os
import pathlib
import re
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PARTIAL = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class ApiServer:
    """Requests with the credentials of a kubeconfig. Each connection is one thread's."""

    def __init__(self, kubectl, kubeconfig):
        raw = subprocess.run(
            [kubectl, "--kubeconfig", kubeconfig, "config", "view", "--raw", "--minify", "-o", "json"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        config = json.loads(raw)
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        address = urllib.parse.urlsplit(cluster["server"])
        self.host, self.port = address.hostname, address.port
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self.tls = ssl.create_default_context(cadata=authority)
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for name in ("client-certificate-data", "client-key-data"):
                file = pathlib.Path(folder) / name
                file.write_bytes(base64.b64decode(user[name]))
                files.append(str(file))
            self.tls.load_cert_chain(*files)

    def connect(self):
        return http.client.HTTPSConnection(self.host, self.port, context=self.tls, timeout=900)

    def get(self, path):
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"GET {path}: {response.status} {body[:300]!r}")
        return body

    def watch(self, path, on_event, accept=None):
        """Calls `on_event(object, time)` for every change, in a thread; returns what ends it."""
        connection = self.connect()
        connection.request("GET", path, headers={"Accept": accept or "application/json"})
        # The response takes the connection's socket, which is needed to end a read that waits.
        socket_of_watch = connection.sock
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"watch {path}: {response.status} {response.read()[:300]!r}")

        def follow():
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                while line := response.readline():
                    now = time.time()
                    event = json.loads(line)
                    if event["type"] in ("ADDED", "MODIFIED"):
                        on_event(event["object"], now)

        def end():
            with contextlib.suppress(OSError):
                socket_of_watch.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=follow, daemon=True).start()
        return end

    def service_account_requests(self):
        """Requests of ServiceAccounts outside kube-system so far: those of the controller under test, with
        its watches and the renewals of its Lease, since nothing else has such an account here.
        """
        name = "apiserver_flowcontrol_dispatched_requests_total"
        text = self.get("/metrics").decode()
        counts = collections.Counter()
        for labels, value in re.findall(rf"^{name}\{{([^}}]*)\}} (\S+)$", text, re.MULTILINE):
            schema = re.search(r'flow_schema="([^"]*)"', labels)
            counts[schema.group(1)] += float(value)
        return counts["service-accounts"]


def counter(url, name, label):
    """The values of a counter of a process, by one of its labels."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^{name}\{{([^}}]*)\}} (\S+)$", text, re.MULTILINE)
    return {re.search(rf'{label}="([^"]*)"', labels).group(1): float(value) for labels, value in found}


def cpu_s(pid):
    """Processor time that a process has taken."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def memory_mib(pid, key):
    """`VmRSS` or `VmHWM` (the peak) of a process."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(key + r":\s+(\d+)", text).group(1)) / 1024
