#!/usr/bin/env python3
"""Creates many models at once and at a steady rate, for our operator and for KServe's manager, and prints how
long each took and what it cost, as ratios. operator.sh prepares the cluster and calls it.

The two run one after the other on the same cluster, each as a process with the token of its own
ServiceAccount. A model is one pod on a fake node. Times are from the request that creates the model until a
watch shows the Deployment, or the model's condition Ready.
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

from api_server import PARTIAL, ApiServer, cpu_s, memory_mib
from rows import Row

CREATORS = 16
# Objects in one namespace: controllers list the ReplicaSets of a namespace for each Deployment.
PER_NAMESPACE = 500
SETTLE_S = 30
STEADY_S = 60
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
class Times:
    """When each model was created, had its Deployment, and was ready."""

    created: dict[str, float] = dataclasses.field(default_factory=dict)
    deployed: dict[str, float] = dataclasses.field(default_factory=dict)
    ready: dict[str, float] = dataclasses.field(default_factory=dict)

    def on_deployment(self, deployment, now):
        for owner in deployment["metadata"].get("ownerReferences", []):
            self.deployed.setdefault(owner["name"], now)

    def on_model(self, model, now):
        for condition in model.get("status", {}).get("conditions", []):
            if condition["type"] == "Ready" and condition["status"] == "True":
                self.ready.setdefault(model["metadata"]["name"], now)

    def percentile(self, reached, share):
        waits = sorted(reached[name] - self.created[name] for name in self.created if name in reached)
        return waits[min(len(waits) - 1, math.ceil(share * len(waits)) - 1)]


class Bench:
    """The cluster, and what is measured on it."""

    def __init__(self, flags):
        self.flags = flags
        self.kubectl = [flags.kubectl, "--kubeconfig", flags.kubeconfig]
        self.api = ApiServer(flags.kubectl, flags.kubeconfig)
        self.errors = []

    def run_kubectl(self, *arguments, **options):
        return subprocess.run([*self.kubectl, *arguments], check=True, capture_output=True, **options)

    def create(self, side, names, rate):
        """Creates the models from several threads: at once, or at `rate` a second."""
        work = queue.Queue()
        began = time.time()
        for number, name in enumerate(names):
            work.put((began + number / rate if rate else began, number, name))
        times = self.times

        def creator():
            connection = self.api.connect()
            while True:
                try:
                    at, number, name = work.get_nowait()
                except queue.Empty:
                    return
                time.sleep(max(0.0, at - time.time()))
                namespace = namespace_of(number)
                body = json.dumps(side.model(name, namespace))
                path = f"/apis/{side.group}/namespaces/{namespace}/{side.plural}"
                times.created[name] = time.time()
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                if response.status != 201:
                    self.errors.append(f"POST {name}: {response.status} {text[:300]!r}")

        threads = [threading.Thread(target=creator, daemon=True) for _ in range(CREATORS)]
        for thread in threads:
            thread.start()
        return began

    def measure(self, side, rate):
        """One run of one side: creates, waits until all are ready, looks at the steady state, deletes."""
        count = self.flags.count
        names = [f"m{number:05d}" for number in range(count)]
        namespaces = sorted({namespace_of(number) for number in range(count)})
        for namespace in namespaces:
            self.run_kubectl("create", "namespace", namespace)
        self.await_idle()
        with open(self.flags.logs / f"{side.name}.log", "ab") as log:
            process = subprocess.Popen(
                side.command, env={**os.environ, **side.environment}, stdout=log, stderr=log
            )
        ends = []
        try:
            # It becomes the leader, and its caches fill.
            time.sleep(10)
            times = self.times = Times()
            for path, on_event, accept in (
                ("apps/v1/deployments", times.on_deployment, PARTIAL),
                (f"{side.group}/{side.plural}", times.on_model, None),
            ):
                watch = f"/apis/{path}?watch=true&timeoutSeconds=3600"
                ends.append(self.api.watch(watch, on_event, accept))
            before = (cpu_s(process.pid), self.api.service_account_requests())
            began = self.create(side, names, rate)
            while len(self.times.ready) < count and time.time() - began < self.flags.limit_s:
                if process.poll() is not None or len(self.errors) > 20:
                    break
                time.sleep(0.05)
            if len(self.times.ready) < count:
                reached = f"{len(self.times.deployed)} Deployments, {len(self.times.ready)} ready"
                raise SystemExit(f"{side.name}: {reached} of {count}; {self.errors[:3]}; {self.flags.logs}")
            after = (cpu_s(process.pid), self.api.service_account_requests())
            result = self.result(began, before, after)
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

    def result(self, began, before, after):
        times, count = self.times, self.flags.count
        return {
            "deployment_p50_s": times.percentile(times.deployed, 0.50),
            "deployment_p99_s": times.percentile(times.deployed, 0.99),
            "ready_p50_s": times.percentile(times.ready, 0.50),
            "ready_p99_s": times.percentile(times.ready, 0.99),
            "all_ready_s": max(times.ready.values()) - began,
            "cpu_s": after[0] - before[0],
            "requests_per_model": (after[1] - before[1]) / count,
        }

    def steady(self, pid):
        """What it costs while nothing happens. The requests of the last changes are not part of it."""
        time.sleep(SETTLE_S)
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
            *("run", "--namespace", "trustformers-system", "--feed-auth", "none"),
            *("--http-address", "127.0.0.1:18080", "--feed-address", "127.0.0.1:19091"),
        ],
        environment={"KUBECONFIG": flags.operator_kubeconfig},
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


# What must be reached beside KServe: how many times less.
NEEDS = {
    "deployment_p50_s": 3.0,
    "deployment_p99_s": 3.0,
    "all_ready_s": 1.0,
    "requests_per_model": 2.0,
    "cpu_s": 5.0,
}
# What must be reached in any case: at most this. Memory is for 1,000 models.
BOUNDS = {"requests_per_model": 8.0, "peak_mib": 60.0, "steady_cpu_s_per_minute": 0.5}
# At most: 30 renewals of the Lease, and watches that end and start again.
STEADY_REQUESTS_PER_MINUTE = 45.0


def lines(shape, results):
    """The rows of one shape of load."""
    ours, peer = results["ours"], results.get("kserve")
    for key, value in ours.items():
        name = f"{shape} {key}"
        if peer is not None:
            need = NEEDS.get(key)
            # A peer may cost nothing where we cost nothing.
            row = Row(name, "", need if value and peer[key] else None, smaller_is_better=True)
            row.ours, row.peer = [value], [peer[key]]
            yield row.line()
        else:
            yield f"{name:<42} {value:>10.2f}"
    bounds = {**BOUNDS, "steady_requests_per_minute": STEADY_REQUESTS_PER_MINUTE}
    for key, bound in bounds.items():
        verdict = "ok" if ours[key] <= bound else "MISS"
        yield f"{shape} {key}: {ours[key]:.2f}, at most {bound:g}: {verdict}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="models of each run")
    parser.add_argument("--rate", type=float, default=10.0, help="models a second of the second run; 0: none")
    parser.add_argument("--limit-s", type=float, default=900.0, help="longest time of a run")
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
    shapes = {"at-once": 0.0}
    if flags.rate:
        shapes[f"{flags.rate:g}/s"] = flags.rate
    for shape, rate in shapes.items():
        results = {}
        for side in sides(flags):
            print(f"{side.name}: {flags.count} models, {shape} ...", file=sys.stderr, flush=True)
            results[side.name] = bench.measure(side, rate)
            # Printed now: what the other side meets loses nothing of this one.
            print(f"{side.name}: {json.dumps(results[side.name])}", file=sys.stderr, flush=True)
        report["runs"][shape] = results
        for line in lines(shape, results):
            print(line, flush=True)
        flags.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"report: {flags.report}")


if __name__ == "__main__":
    main()
