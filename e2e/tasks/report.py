#!/usr/bin/env python3
"""Prints the figures that lie in the report folder and the sizes of the packed images, as Markdown.

usage: report.py REPORT_FOLDER IMAGE_FOLDER
"""

import gzip
import json
import os
import pathlib
import statistics
import sys
import tarfile
import time

# The limits of `make test` on a machine with two cores, as in CONTRIBUTING.md.
BUDGET_MINUTES = {"cold": 45, "warm": 12}


def load(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def when(path):
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(path.stat().st_mtime))


def first_token(folder):
    path = folder / "first_token.json"
    found = load(path)
    print(f"\n## From `kubectl apply` to the first token ({when(path)})\n")
    print("| model image | ms |\n|---|---|")
    print(f"| on the node already | {found['cached_ms']} |\n| pulled first | {found['uncached_ms']} |")


def image_sizes(folder):
    print("\n## Images\n\n| image | MB unpacked | MB compressed (gzip) |\n|---|---|---|")
    for path in sorted(folder.glob("trustformers-*.tar")):
        plain = packed = 0
        with tarfile.open(path) as archive:
            index = json.load(archive.extractfile("index.json"))
            manifest_path = "blobs/sha256/" + index["manifests"][0]["digest"].split(":")[1]
            for layer in json.load(archive.extractfile(manifest_path))["layers"]:
                data = archive.extractfile("blobs/sha256/" + layer["digest"].split(":")[1]).read()
                plain += len(data)
                packed += len(gzip.compress(data, 6, mtime=0))
        name = index["manifests"][0]["annotations"]["io.containerd.image.name"]
        print(f"| {name} | {plain / 1e6:.1f} | {packed / 1e6:.1f} |")


def decode(folder):
    """Tokens after the first one over the time they took: the first belongs to the prompt."""
    path = folder / "decode.jsonl"
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    speeds = sorted((len(run["tokens"]) - 1) / run["timings_ms"]["decode"] * 1000 for run in runs)
    prefill = [len(run["prompt_tokens"]) / run["timings_ms"]["prefill"] * 1000 for run in runs]
    print(f"\n## SmolLM2-135M Q4_1 on 2 CPU threads ({when(path)})\n")
    made, given = len(runs[0]["tokens"]), len(runs[0]["prompt_tokens"])
    print(
        f"decode {statistics.median(speeds):.0f} tokens/s "
        f"(median of {len(runs)}, {speeds[0]:.0f} to {speeds[-1]:.0f}; {made} tokens), "
        f"prompt {statistics.median(prefill):.0f} tokens/s ({given} tokens)"
    )


def stages(folder):
    """The last cold and the last warm run of `make test`, each beside its budget."""
    for start, minutes in BUDGET_MINUTES.items():
        found = load(folder / f"stages-{start}.json")
        if found is None:
            print(f"\n## `make test`, {start}\n\nnot run yet on this machine: make test")
            continue
        print(
            f"\n## `make test`, {start} ({found['time']}, commit {found['commit']}, {found['cores']} cores)\n"
        )
        print("| stage | seconds | |\n|---|---|---|")
        for stage in found["stages"]:
            print(f"| {stage['name']} | {stage['seconds']} | {stage['result']} |")
        total = sum(stage["seconds"] for stage in found["stages"])
        verdict = "ok" if total <= 60 * minutes else "MISS"
        print(f"| sum | {total} | {verdict}: {total / 60:.1f} of {minutes} minutes |")


def demo(folder):
    found = load(folder / "demo.json")
    if found:
        print(f"\n## Last `make demo` ({found['time']})\n")
        print(f"whole: {found['total_seconds']} s; apply to ready: {found['apply_to_ready_ms']} ms")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    reports, images = map(pathlib.Path, sys.argv[1:])
    print(f"# Report: {os.uname().machine}, {os.cpu_count()} cores")
    first_token(reports)
    image_sizes(images)
    decode(reports)
    stages(reports)
    demo(reports)


if __name__ == "__main__":
    main()
