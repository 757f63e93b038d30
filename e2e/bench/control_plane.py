#!/usr/bin/env python3
"""Creates many models at once and at a steady rate, for our operator and for KServe's manager, and several
times as many for ours alone, and prints how long each took and what it cost, as ratios. operator.sh prepares
the cluster and calls it.

The two run one after the other on the same cluster, each as a process with the token of its own
ServiceAccount. A model is one pod on a fake node. Times are from the request that creates the model until a
watch shows the Deployment, or the model's condition Ready. Each run begins when a first model has become
Ready and is deleted again: the controller leads, and its caches are filled.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time

from api_server import PARTIAL, ApiServer, counter, cpu_s, memory_mib
from rows import Row

CREATORS = 16
# Objects in one namespace: controllers list the ReplicaSets of a namespace for each Deployment.
PER_NAMESPACE = 500
# Time between two looks at a controller that finishes its work, and how many of them in a row must show at
# most this many requests: some renewals of the Lease.
QUIET_LOOK_S = 5
QUIET_LOOKS = 2
QUIET_REQUESTS = 4
# A controller that never comes to rest is measured all the same.
QUIET_LIMIT_S = 120
STEADY_S = 60
START_LIMIT_S = 120
PROBE = "first"
TOLERATION = {"key": "kwok.x-k8s.io/node", "operator": "Exists", "effect": "NoSchedule"}
NODES = {"type": "kwok"}
AMOUNTS = {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


@dataclasses.dataclass
class Side:
    """One of the two controllers."""

    name: str
    # The collection of its resource, below /apis.
    group: str
    plural: str
    command: list[str]
    environment: dict[str, str]
    # Where its own counters of writes are; none: it has none.
    metrics: str = ""

    def writes(self):
        """How many objects of each kind it has written so far, as it counts them itself."""
        return counter(self.metrics, "trustformers_operator_writes_total", "kind") if self.metrics else {}

    def path(self, namespace):
        return f"/apis/{self.group}/namespaces/{namespace}/{self.plural}"

    def model(self, name, namespace):
        meta = {"name": name, "namespace": namespace}
        if self.name == "ours":
            spec = {
                "source": {"uri": "oci://localhost/bench:1"},
                "runtime": {"resources": AMOUNTS},
                "pod": {"nodeSelector": NODES, "tolerations": [TOLERATION]},
            }
            return {"apiVersion": self.group, "kind": "InferenceModel", "metadata": meta, "spec": spec}
        meta["annotations"] = {"serving.kserve.io/deploymentMode": "Standard"}
        container = {
            "name": "kserve-container",
            "image": "bench",
            "ports": [{"containerPort": 8080, "protocol": "TCP"}],
            "resources": AMOUNTS,
        }
        predictor = {
            "minReplicas": 1,
            "maxReplicas": 1,
            "nodeSelector": NODES,
            "tolerations": [TOLERATION],
            "containers": [container],
        }
        kind = {"apiVersion": self.group, "kind": "InferenceService"}
        return {**kind, "metadata": meta, "spec": {"predictor": predictor}}


@dataclasses.dataclass
class Shape:
    """A run of one or both sides."""

    name: str
    count: int
    # Models a second; 0: at once.
    rate: float = 0.0
    # Ours only.
    alone: bool = False

    def names(self):
        return [f"m{number:05d}" for number in range(self.count)]

    def limit_s(self, per_thousand_s):
        return per_thousand_s * max(1.0, self.count / 1000) + (self.count / self.rate if self.rate else 0.0)


@dataclasses.dataclass
class Times:
    """When each model was created, had its Deployment, and was ready."""

    created: dict[str, float] = dataclasses.field(default_factory=dict)
    deployed: dict[str, float] = dataclasses.field(default_factory=dict)
    ready: dict[str, float] = dataclasses.field(default_factory=dict)
    # Wakes who waits for models that become ready.
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def on_deployment(self, deployment, now):
        for owner in deployment["metadata"].get("ownerReferences", []):
            if owner["name"] in self.created:
                self.deployed.setdefault(owner["name"], now)

    def on_model(self, model, now):
        name = model["metadata"]["name"]
        for condition in model.get("status", {}).get("conditions", []):
            if condition["type"] == "Ready" and condition["status"] == "True" and name in self.created:
                with self.changed:
                    self.ready.setdefault(name, now)
                    self.changed.notify_all()

    def percentile(self, reached, share):
        waits = sorted(reached[name] - self.created[name] for name in self.created if name in reached)
        return waits[min(len(waits) - 1, math.ceil(share * len(waits)) - 1)]


@dataclasses.dataclass
class Spent:
    """What a controller has spent so far."""

    cpu_s: float
    requests: float
    writes: dict[str, float]

    @classmethod
    def of(cls, api, side, pid):
        return cls(cpu_s(pid), api.service_account_requests(), side.writes())


class Bench:
    """The cluster, and what is measured on it."""

    def __init__(self, flags):
        self.flags = flags
        self.kubectl = [flags.kubectl, "--kubeconfig", flags.kubeconfig]
        self.api = ApiServer(flags.kubectl, flags.kubeconfig)
        self.errors = []
        self.times = Times()

    def run_kubectl(self, *arguments, **options):
        return subprocess.run([*self.kubectl, *arguments], check=True, capture_output=True, **options)

    def post(self, connection, side, name, namespace):
        """Creates one model, and notes when it was sent."""
        self.times.created[name] = time.time()
        body = json.dumps(side.model(name, namespace))
        connection.request("POST", side.path(namespace), body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 201:
            self.errors.append(f"POST {name}: {response.status} {text[:300]!r}")

    def create(self, side, shape):
        """Creates the models from several threads: at once, or at a steady rate."""
        work = queue.Queue()
        began = time.time()
        for number, name in enumerate(shape.names()):
            work.put((began + number / shape.rate if shape.rate else began, number, name))

        def creator():
            connection = self.api.connect()
            while True:
                try:
                    at, number, name = work.get_nowait()
                except queue.Empty:
                    return
                time.sleep(max(0.0, at - time.time()))
                self.post(connection, side, name, namespace_of(number))

        for _ in range(CREATORS):
            threading.Thread(target=creator, daemon=True).start()
        return began

    def await_ready(self, side, process, count, limit_s):
        """Waits until this many models are Ready."""
        times, until = self.times, time.time() + limit_s

        def is_over():
            return len(times.ready) >= count or process.poll() is not None or len(self.errors) > 20

        with times.changed:
            # A controller that ends wakes nobody, so it is looked at every second.
            while not is_over() and time.time() < until:
                times.changed.wait(timeout=1)
        if len(self.times.ready) < count:
            reached = f"{len(self.times.deployed)} Deployments, {len(self.times.ready)} ready"
            raise SystemExit(f"{side.name}: {reached} of {count}; {self.errors[:3]}; {self.flags.logs}")

    def first_model(self, side, process):
        """One model becomes Ready and is deleted: from then on the controller does its work."""
        self.times = Times()
        namespace = namespace_of(0)
        self.post(self.api.connect(), side, PROBE, namespace)
        self.await_ready(side, process, 1, START_LIMIT_S)
        resource = f"{side.plural}.{side.group.split('/')[0]}"
        self.run_kubectl("-n", namespace, "delete", resource, PROBE, "--wait=true", "--timeout=60s")
        self.run_kubectl(
            *("-n", namespace, "wait", "pods", "--all"), "--for=delete", f"--timeout={START_LIMIT_S}s"
        )
        self.await_idle()

    def on_deployment(self, deployment, now):
        self.times.on_deployment(deployment, now)

    def on_model(self, model, now):
        self.times.on_model(model, now)

    def follow(self, side):
        """Watches Deployments and models; returns what ends that."""
        watched = (
            ("apps/v1/deployments", self.on_deployment, PARTIAL),
            (f"{side.group}/{side.plural}", self.on_model, None),
        )
        return [
            self.api.watch(f"/apis/{path}?watch=true&timeoutSeconds=7200", on_event, accept)
            for path, on_event, accept in watched
        ]

    def measure(self, side, shape):
        """One run of one side: creates, waits until all are ready, looks at the steady state, deletes."""
        namespaces = sorted({namespace_of(number) for number in range(shape.count)})
        for namespace in namespaces:
            self.run_kubectl("create", "namespace", namespace)
        self.await_idle()
        with open(self.flags.logs / f"{side.name}.log", "ab") as log:
            process = subprocess.Popen(
                side.command, env={**os.environ, **side.environment}, stdout=log, stderr=log
            )
        ends = []
        try:
            self.times = Times()
            ends = self.follow(side)
            self.first_model(side, process)
            self.times = Times()
            before = Spent.of(self.api, side, process.pid)
            began = self.create(side, shape)
            self.await_ready(side, process, shape.count, shape.limit_s(self.flags.limit_s))
            after = Spent.of(self.api, side, process.pid)
            result = self.result(shape, began, before, after)
            result["peak_mib"] = memory_mib(process.pid, "VmHWM")
            result.update(self.steady(process.pid))
            return result
        finally:
            for end in ends:
                end()
            # KServe removes its finalizers itself, so it must still run.
            self.delete(namespaces)
            process.terminate()
            process.wait(timeout=30)

    def result(self, shape, began, before, after):
        times, count = self.times, shape.count
        by_kind = {
            kind: (number - before.writes.get(kind, 0)) / count for kind, number in after.writes.items()
        }
        return {
            "deployment_p50_s": times.percentile(times.deployed, 0.50),
            "deployment_p99_s": times.percentile(times.deployed, 0.99),
            "ready_p50_s": times.percentile(times.ready, 0.50),
            "ready_p99_s": times.percentile(times.ready, 0.99),
            "all_ready_s": max(times.ready.values()) - began,
            "cpu_s": after.cpu_s - before.cpu_s,
            "cpu_ms_per_model": (after.cpu_s - before.cpu_s) * 1000 / count,
            "requests_per_model": (after.requests - before.requests) / count,
            "writes_by_kind": {kind: number for kind, number in by_kind.items() if number},
        }

    def await_quiet(self):
        """The last statuses are written, and nothing but the Lease is left to do."""
        until, quiet = time.time() + QUIET_LIMIT_S, 0
        while quiet < QUIET_LOOKS and time.time() < until:
            before = self.api.service_account_requests()
            time.sleep(QUIET_LOOK_S)
            is_quiet = self.api.service_account_requests() - before <= QUIET_REQUESTS
            quiet = quiet + 1 if is_quiet else 0

    def steady(self, pid):
        """What it costs while nothing happens. The requests of the last changes are not part of it."""
        self.await_quiet()
        before = (cpu_s(pid), self.api.service_account_requests())
        time.sleep(STEADY_S)
        minutes = STEADY_S / 60
        return {
            "steady_cpu_s_per_minute": (cpu_s(pid) - before[0]) / minutes,
            "steady_requests_per_minute": (self.api.service_account_requests() - before[1]) / minutes,
            "steady_mib": memory_mib(pid, "VmRSS"),
        }

    def delete(self, namespaces):
        self.run_kubectl("delete", "namespace", *namespaces, "--wait=true", "--timeout=900s")

    def await_idle(self):
        """The API server still works for a while after its resources have changed."""
        until = time.time() + 60
        while time.time() < until:
            before = cpu_s(self.flags.apiserver_pid)
            time.sleep(2)
            if (cpu_s(self.flags.apiserver_pid) - before) / 2 < 0.12:
                return


def namespace_of(number):
    return f"bench-{number // PER_NAMESPACE}"


def sides(flags):
    ours = Side(
        name="ours",
        group="serving.trustformers.dev/v1alpha1",
        plural="inferencemodels",
        command=[
            flags.operator,
            *("run", "--namespace", "trustformers-system", "--feed-auth", "none", "--pod-auth", "none"),
            *("--http-address", "127.0.0.1:18080", "--feed-address", "127.0.0.1:19091"),
        ],
        environment={"KUBECONFIG": flags.operator_kubeconfig},
        metrics="http://127.0.0.1:18080/metrics",
    )
    if not flags.kserve:
        return [ours]
    addresses = ("--metrics-addr", "127.0.0.1:18081", "--health-probe-addr", "127.0.0.1:18082")
    environment = {
        "KUBECONFIG": flags.kserve_kubeconfig,
        "POD_NAMESPACE": "kserve",
        "SECRET_NAME": "kserve-webhook-server-cert",
        # Its webhook server looks for its certificate below the folder for temporary files.
        "TMPDIR": str(pathlib.Path(flags.kserve_kubeconfig).parent),
    }
    kserve = Side(
        name="kserve",
        group="serving.kserve.io/v1beta1",
        plural="inferenceservices",
        command=[flags.kserve, *addresses],
        environment=environment,
    )
    return [ours, kserve]


# What must be reached beside KServe with all at once: how many times less. At a steady rate our own bounds
# decide about times.
NEEDS = {
    "deployment_p50_s": 3.0,
    "deployment_p99_s": 3.0,
    "all_ready_s": 1.0,
    "requests_per_model": 2.0,
    "cpu_s": 5.0,
}
NEEDS_AT_RATE = {"requests_per_model": 2.0, "cpu_s": 5.0}
# What must be reached in any case: at most this. Memory and the steady state are for 1,000 models. Renewals
# of the Lease take 30 requests a minute; the rest is for watches that end and start again.
BOUNDS = {"requests_per_model": 8.0}
BOUNDS_OF_1000 = {"peak_mib": 60.0, "steady_cpu_s_per_minute": 0.5, "steady_requests_per_minute": 45.0}
BOUNDS_AT_RATE = {"deployment_p99_s": 1.0}
# Processor time for each model of the largest run, in times of that of 1,000.
LINEAR = 1.3


def lines(shape, results):
    """The rows of one shape of load."""
    ours, peer = results["ours"], results.get("kserve")
    needs = NEEDS_AT_RATE if shape.rate else NEEDS
    for key, value in ours.items():
        name = f"{shape.name} {key}"
        if key == "writes_by_kind":
            kinds = ", ".join(f"{kind} {number:.2f}" for kind, number in sorted(value.items()))
            yield f"{name:<42} {kinds}; the rest of the requests: lists, watches, the Lease"
        elif peer is not None:
            need = needs.get(key)
            # A peer may cost nothing where we cost nothing.
            row = Row(name, "", need if value and peer[key] else None, smaller_is_better=True)
            row.ours, row.peer = [value], [peer[key]]
            yield row.line()
        else:
            yield f"{name:<42} {value:>10.2f}"
    bounds = dict(BOUNDS)
    if shape.rate:
        bounds.update(BOUNDS_AT_RATE)
    if shape.count <= 1000:
        bounds.update(BOUNDS_OF_1000)
    for key, bound in bounds.items():
        yield bounded(f"{shape.name} {key}", ours[key], bound)


def bounded(name, value, bound):
    return f"{name}: {value:.2f}, at most {bound:g}: {'ok' if value <= bound else 'MISS'}"


def shapes(flags):
    found = [Shape("at-once", flags.count)]
    if flags.rate:
        found.append(Shape(f"{flags.rate:g}/s", flags.count, rate=flags.rate))
    if flags.alone:
        found.append(Shape(f"alone-{flags.alone}", flags.alone, alone=True))
    return [shape for shape in found if not flags.only or shape.name.startswith(flags.only)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="models of each run")
    parser.add_argument("--rate", type=float, default=10.0, help="models a second of the second run; 0: none")
    parser.add_argument("--alone", type=int, default=5000, help="models of the run of ours alone; 0: none")
    parser.add_argument("--only", default="", help="only the runs whose name starts so: at-once, 10/s, alone")
    parser.add_argument("--limit-s", type=float, default=900.0, help="longest time of a run of 1,000 models")
    parser.add_argument("--kubectl", required=True)
    parser.add_argument("--kubeconfig", required=True, help="of an administrator")
    parser.add_argument("--apiserver-pid", type=int, required=True)
    parser.add_argument("--operator", required=True, help="our program")
    parser.add_argument("--operator-kubeconfig", required=True, help="with the token of our account")
    parser.add_argument("--kserve", default="", help="KServe's manager; without it only ours is measured")
    parser.add_argument("--kserve-kubeconfig", default="", help="with the token of KServe's account")
    parser.add_argument("--logs", type=pathlib.Path, required=True, help="folder for the controllers' logs")
    parser.add_argument("--report", type=pathlib.Path, required=True, help="JSON file to write")
    flags = parser.parse_args()
    flags.logs.mkdir(parents=True, exist_ok=True)

    bench = Bench(flags)
    report = {"models": flags.count, "date": datetime.datetime.now(datetime.UTC).isoformat(), "runs": {}}
    per_model = {}
    for shape in shapes(flags):
        results = {}
        for side in sides(flags)[: 1 if shape.alone else None]:
            print(f"{side.name}: {shape.count} models, {shape.name} ...", file=sys.stderr, flush=True)
            results[side.name] = bench.measure(side, shape)
            # Printed now: what the other side meets loses nothing of this one.
            print(f"{side.name}: {json.dumps(results[side.name])}", file=sys.stderr, flush=True)
        report["runs"][shape.name] = results
        per_model[shape.name] = results["ours"]["cpu_ms_per_model"]
        for line in lines(shape, results):
            print(line, flush=True)
        if shape.alone and "at-once" in per_model:
            growth = per_model[shape.name] / per_model["at-once"]
            print(bounded(f"{shape.name} cpu_ms_per_model of that at once", growth, LINEAR), flush=True)
        flags.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"report: {flags.report}")


if __name__ == "__main__":
    main()
