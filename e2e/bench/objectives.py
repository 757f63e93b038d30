#!/usr/bin/env python3
"""Measures our runtime and its peers alternately and prints the table of ratios; run.sh prepares and calls
it.

Absolute figures depend on the machine and the hour. Figures that are compared alternate within one run, and
each is the median of its rounds.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import programs
import versions
from rows import Row

PROMPT = 512
DEPTH = 512
DEEP = 4096
TOKENS = 128
CLIENTS = 8
SEQUENCE = 128
BATCHES = (1, 32)
# SmolLM2 ends an answer with one of these; without them every answer has its full length.
END_TOKENS = (0, 2)


class Bench:
    """Where everything lies, and how often it is measured."""

    def __init__(self, flags):
        self.ours = pathlib.Path(flags.ours) / "trustformers-serve"
        self.examples = pathlib.Path(flags.ours) / "examples"
        # Only groups that need a peer use its description.
        llama = pathlib.Path(flags.llama)
        self.llama_bench = llama / "llama-bench"
        self.llama_server = llama / "llama-server"
        self.llama_how = (
            (llama / "how.txt").read_text(encoding="utf-8").strip() if flags.llama else "not needed"
        )
        self.older = pathlib.Path(flags.older)
        self.python = flags.python
        self.onnx = flags.onnx
        self.rounds = flags.rounds
        models = pathlib.Path(flags.models)
        self.smollm2 = models / "SmolLM2-135M-Instruct.Q4_1.gguf"
        self.qwen = {
            "qwen-0.5b": models / "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
            "qwen-1.5b": models / "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        }
        self.minilm = models / "all-minilm-l6-v2"
        self.models = models

    def in_turns(self, rows, turn):
        """Calls `turn` for each round; rows whose feature is not there say so and end the group."""
        for round_ in range(self.rounds):
            progress(
                f"{rows[0].name} and {len(rows) - 1} more" if len(rows) > 1 else rows[0].name,
                round_ + 1,
                self.rounds,
            )
            try:
                turn()
            except programs.NotBuilt as why:
                for row in rows:
                    row.not_built = str(why)
                break
        return rows


def progress(what, round_, rounds):
    print(f"  {what}: turn {round_} of {rounds}", file=sys.stderr, flush=True)


def smollm2_steps(bench):
    depth0 = Row("smollm2-decode-depth-0", "tokens/s", need=1.0)
    depth512 = Row("smollm2-decode-depth-512", "tokens/s", need=1.5, note="(peer: its better attention)")
    prefill = Row("smollm2-prefill-512", "tokens/s", need=1.0)
    together = Row("smollm2-decode-8-sequences", "tokens/s")

    def turn():
        ours = programs.ours_engine(
            bench.ours,
            bench.smollm2,
            prefill=PROMPT,
            depth=f"0,{DEPTH}",
            sequences=CLIENTS,
            tokens=TOKENS,
            token_budget=PROMPT,
        )
        prefill.ours.append(ours["prefill", PROMPT, 1])
        depth0.ours.append(ours["decode", 1, 1])
        depth512.ours.append(ours["decode", DEPTH, 1])
        together.ours.append(ours["decode", 128, CLIENTS])
        prefill.peer.append(programs.llama_bench(bench.llama_bench, bench.smollm2, prompt=PROMPT))
        depth0.peer.append(programs.llama_bench(bench.llama_bench, bench.smollm2, tokens=TOKENS))
        depth512.peer.append(
            programs.llama_bench(bench.llama_bench, bench.smollm2, tokens=TOKENS, depth=DEPTH)
        )

    return bench.in_turns([depth0, depth512, prefill, together], turn)


def smollm2_clients(bench):
    speed = Row(f"smollm2-{CLIENTS}-clients", "output tokens/s", need=2.0, note="(128 + 128 tokens)")
    first = Row(f"smollm2-{CLIENTS}-clients-first-token", "ms (p50)", need=2.0, smaller_is_better=True)
    requests = CLIENTS * 3
    flags = {
        "clients": CLIENTS,
        "requests": requests,
        "warm_up": 2,
        "prompt_words": 128,
        "max_tokens": TOKENS,
    }

    def note(answer, speeds, firsts):
        if answer["output_tokens"] != requests * TOKENS:
            raise programs.Failed(
                f"{answer['output_tokens']} tokens were given for {requests} x {TOKENS}: {answer}"
            )
        speeds.append(answer["output_tokens_per_s"])
        firsts.append(answer["first_token_ms"]["p50"])

    def turn():
        bias = json.dumps({"logit_bias": {str(token): -100 for token in END_TOKENS}})
        with programs.our_server(bench.ours, bench.smollm2) as url:
            note(programs.load(bench.ours, url, api="generate", extra=bias, **flags), speed.ours, first.ours)
        extra = json.dumps({"ignore_eos": True, "cache_prompt": False})
        with programs.llama_server(bench.llama_server, bench.smollm2, CLIENTS, 512) as url:
            note(programs.load(bench.ours, url, api="llama", extra=extra, **flags), speed.peer, first.peer)

    return bench.in_turns([speed, first], turn)


def smollm2_deep(bench):
    """Decoding with a long context, with the types of the cache alternately."""
    row = Row("smollm2-decode-depth-4096", "tokens/s", need=1.3, note="(peer: ours with an f32 cache)")
    half = Row("smollm2-decode-depth-4096-f16", "tokens/s with an f32 cache")

    def turn():
        of = {}
        for kv_cache in ("auto", "f16", "f32"):
            ours = programs.ours_engine(
                bench.ours,
                bench.smollm2,
                prefill=0,
                depth=DEEP,
                sequences=0,
                tokens=TOKENS // 2,
                kv_cache=kv_cache,
            )
            of[kv_cache] = ours["decode", DEEP, 1]
        row.ours.append(of["auto"])
        half.ours.append(of["f16"])
        row.peer.append(of["f32"])
        half.peer.append(of["f32"])

    return bench.in_turns([row, half], turn)


def large_vocabulary(bench):
    """Many sequences of a model whose rows of logits are long."""
    row = Row("qwen-0.5b-decode-32-sequences", "tokens/s", note="(vocabulary of 152k)")

    def turn():
        ours = programs.ours_engine(
            bench.ours, bench.qwen["qwen-0.5b"], prefill=0, depth=0, sequences=32, tokens=16
        )
        row.ours.append(ours["decode", 128, 32])

    return bench.in_turns([row], turn)


def mixed_depths(bench):
    """Four sequences of which one is long, and loading, on weights of the real shapes; the example takes the
    turns.
    """
    mixed = Row("smollm2-shape-mixed-depths", "tokens/s", note="(8,000, 512, 512, 512)")
    load = Row("qwen-1.5b-shape-load", "ms with 1 thread")
    progress("mixed depths and loading", 1, 1)
    for line in programs.run(bench.examples / "steps", programs.THREADS, "smollm2", "deep").splitlines():
        if (speed := median_in(line, "mixed depths")) is not None:
            mixed.ours.append(speed)
    for line in programs.run(bench.examples / "steps", programs.THREADS, "qwen-1.5b", "load").splitlines():
        if found := re.search(r"loaded in ([0-9.]+) ms, with 1 thread in ([0-9.]+) ms", line):
            load.ours.append(float(found.group(1)))
            load.peer.append(float(found.group(2)))
    return [mixed, load]


def qwen_decode(name):
    def group(bench):
        row = Row(f"{name}-decode", "tokens/s", need=1.0)
        tokens = 64

        def turn():
            ours = programs.ours_engine(
                bench.ours, bench.qwen[name], prefill=0, depth=0, sequences=0, tokens=tokens
            )
            row.ours.append(ours["decode", 1, 1])
            row.peer.append(programs.llama_bench(bench.llama_bench, bench.qwen[name], tokens=tokens))

        return bench.in_turns([row], turn)

    return group


def minilm_embed(bench):
    rows = {batch: Row(f"minilm-embed-{SEQUENCE}-batch-{batch}", "texts/s", need=1.2) for batch in BATCHES}
    peers = {batch: {} for batch in BATCHES}

    def turn():
        ours = programs.ours_embed(bench.ours, bench.minilm, BATCHES, SEQUENCE)
        theirs = programs.python_embed(bench.python, bench.minilm, bench.onnx)
        for batch, row in rows.items():
            row.ours.append(ours[batch])
            for engine, speeds in theirs.items():
                peers[batch].setdefault(engine, []).append(speeds[str(batch)])

    bench.in_turns(list(rows.values()), turn)
    for batch, row in rows.items():
        if peers[batch]:
            best = max(peers[batch], key=lambda engine: statistics.median(peers[batch][engine]))
            row.peer = peers[batch][best]
            medians = ", ".join(
                f"{engine} {statistics.median(speeds):.1f}" for engine, speeds in peers[batch].items()
            )
            row.note = f"(peer: the best of {medians})"
    return list(rows.values())


def minilm_strategies(bench):
    """Middle and tail of the times that callers see, for each strategy under each load; texts of 16 words.

    `urgent` are texts of class high beside the saturating load: classes count in the strategy `priority`
    alone.
    """
    loads = {
        "low": {"rate": 5, "arrivals": "constant", "duration_s": 4},
        "bursts": {"rate": 64, "arrivals": "bursts", "duration_s": 4},
        "saturating": {"clients": 64, "requests": 2000},
    }
    urgent = {"rate": 10, "arrivals": "constant", "duration_s": 3, "extra": json.dumps({"priority": "high"})}
    strategies = ("time", "size", "dynamic", "priority")
    keys = [(strategy, load) for strategy in strategies for load in (*loads, "urgent")]
    rows = {key: Row(f"minilm-{'-'.join(key)}", "ms (p50)") for key in keys}
    others = {key: [] for key in rows}

    def note(key, answer):
        rows[key].ours.append(answer["total_ms"]["p50"])
        others[key].append((answer["total_ms"]["p99"], answer["texts_per_s"]))

    def load(url, flags):
        return programs.load(bench.ours, url, api="embeddings", prompt_words=16, warm_up=20, **flags)

    def turn():
        for strategy in strategies:
            with programs.our_server(
                bench.ours, bench.minilm, {"strategy": strategy, "max_wait_time_ms": 10}
            ) as url:
                for name, flags in loads.items():
                    note((strategy, name), load(url, flags))
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    crowd = pool.submit(
                        load, url, {**loads["saturating"], "requests": 100_000, "duration_s": 6}
                    )
                    note((strategy, "urgent"), load(url, urgent))
                    if crowd.done():
                        raise programs.Failed("the crowd was gone before the urgent texts were answered")
                    crowd.result()

    bench.in_turns(list(rows.values()), turn)
    for key, row in rows.items():
        if others[key]:
            p99, speed = (statistics.median(values) for values in zip(*others[key], strict=True))
            row.note = f"p99 {p99:.1f} ms, {speed:.0f} texts/s"
    return list(rows.values())


def fused_beside_unfused(bench):
    """Plans with every fused form beside plans with none, on weights of the real shapes; the examples take
    the turns.
    """
    rows = {
        ("steps", "decode"): Row("smollm2-shape-decode-fused", "tokens/s unfused"),
        ("steps", "prefill 512"): Row("smollm2-shape-prefill-fused", "tokens/s unfused"),
        ("encoder", "32 x 128"): Row("minilm-shape-32-fused", "texts/s unfused"),
    }
    progress("fused beside unfused", 1, 1)
    for example in ("steps", "encoder"):
        lines = programs.run(bench.examples / example, programs.THREADS, "fast", "unfused").splitlines()
        for (of, what), row in rows.items():
            if of == example:
                speeds = [speed for line in lines if (speed := median_in(line, what)) is not None]
                (fused,), (unfused,) = speeds[:-1], speeds[-1:]
                row.ours, row.peer = [fused], [unfused]
    return list(rows.values())


def median_in(line, what):
    """What an example prints as the median of a measurement; none in its other lines."""
    found = re.search(rf"\| *{what}:? .*?\(median +([0-9.]+)\)", line)
    return found and float(found.group(1))


def speculation(bench):
    """The larger Qwen, greedy, on prompts of code: with the smaller one as its draft, with guesses out of the
    text, and plain.
    """
    draft = Row("qwen-draft-speculation", "tokens/s", need=1.3, note="(peer: ours without the draft)")
    ngram = Row("qwen-ngram-speculation", "tokens/s plain")
    prompts = json.loads(pathlib.Path(__file__).with_name("code-prompts.json").read_text(encoding="utf-8"))

    def turn():
        large, small = bench.qwen["qwen-1.5b"], bench.qwen["qwen-0.5b"]
        plain, texts = programs.ours_generate(bench.ours, large, prompts, TOKENS)
        for row, flags in ((draft, ["--draft", small]), (ngram, ["--ngram"])):
            speed, same = programs.ours_generate(bench.ours, large, prompts, TOKENS, *flags)
            others = sum(one != other for one, other in zip(texts, same, strict=True))
            if others:
                row.note += f" ({others} of {len(texts)} answers differ)"
            row.ours.append(speed)
            row.peer.append(plain)

    return bench.in_turns([draft, ngram], turn)


def beside_older(bench):
    """The rows in which this version is compared with an older one."""
    found = []
    for row, measure in versions.rows(versions.Versions(bench.ours, bench.older, bench.models)):

        def turn(row=row, measure=measure):
            row.ours.append(measure(bench.ours))
            row.peer.append(measure(bench.older))

        found += [row] if row.not_run else bench.in_turns([row], turn)
    return found


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are measured together, and what run.sh has to get for them."""

    measure: Callable[[Bench], list[Row]]
    # Names that models/fetch.sh knows.
    models: tuple[str, ...] = ()
    # llama (llama-cpp.sh), python (python.sh), older (older.sh)
    peers: tuple[str, ...] = ()

    def needs(self):
        return {*(f"model:{name}" for name in self.models), *(f"peer:{name}" for name in self.peers)}


GROUPS = {
    "smollm2-steps": Group(smollm2_steps, models=("smollm2",), peers=("llama",)),
    "smollm2-deep": Group(smollm2_deep, models=("smollm2",)),
    "smollm2-clients": Group(smollm2_clients, models=("smollm2",), peers=("llama",)),
    "qwen-0.5b": Group(qwen_decode("qwen-0.5b"), models=("qwen-0.5b",), peers=("llama",)),
    "qwen-1.5b": Group(qwen_decode("qwen-1.5b"), models=("qwen-1.5b",), peers=("llama",)),
    "minilm-embed": Group(minilm_embed, models=("minilm",), peers=("python",)),
    "qwen-speculation": Group(speculation, models=("qwen-0.5b", "qwen-1.5b")),
    "minilm-strategies": Group(minilm_strategies, models=("minilm",)),
    "fused": Group(fused_beside_unfused),
    "qwen-vocabulary": Group(large_vocabulary, models=("qwen-0.5b",)),
    "mixed-depths": Group(mixed_depths),
    "older": Group(beside_older, models=("smollm2", "qwen-0.5b", "qwen-1.5b"), peers=("older",)),
}


def busy_seconds():
    """Processor time that everything on this machine used, and that our own children used."""
    with open("/proc/stat", encoding="ascii") as stat:
        ticks = [int(value) for value in stat.readline().split()[1:9]]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    all_busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return all_busy, children.ru_utime + children.ru_stime


def machine():
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    first = text.split("\n\n", maxsplit=1)[0]
    value = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    flags = set(value.get("flags", "").split())
    known = [
        flag
        for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
        if flag in flags
    ]
    family = f"family {value.get('cpu family')} model {value.get('model')}"
    return f"{value.get('model name')} ({family}), {os.cpu_count()} cores, {' '.join(known)}"


def asked():
    """The flags and the groups that they ask for; ends the program where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--needs", action="store_true", help="only print what the groups need, a line for each"
    )
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("ours", "models", "report"):
        parser.add_argument(f"--{name}", default="")
    for name in ("llama", "python", "onnx", "older"):
        parser.add_argument(f"--{name}", default="", help="empty where no group needs it")
    flags = parser.parse_args()
    if flags.rounds < 3:
        sys.exit("error: a median of fewer than 3 turns says little; BENCH_ROUNDS is at least 3")
    groups = [group for name, group in GROUPS.items() if name.startswith(flags.only)]
    if not groups:
        sys.exit(f"error: no group begins with {flags.only!r}; there are {', '.join(GROUPS)}")
    return flags, groups


def main():
    flags, groups = asked()
    if flags.needs:
        print("\n".join(sorted(set().union(*(group.needs() for group in groups)))))
        return
    for name in ("ours", "models", "report"):
        if not getattr(flags, name):
            sys.exit(f"error: --{name} is needed to measure anything")
    bench = Bench(flags)
    (all_before, own_before), began = busy_seconds(), datetime.datetime.now(datetime.UTC)
    rows = []
    try:
        for group in groups:
            found = group.measure(bench)
            # Printed now: what a later group meets loses nothing of this one.
            print("\n".join(row.line() for row in found), flush=True)
            rows += found
    except programs.Failed as why:
        sys.exit(f"error: {why}")
    took = datetime.datetime.now(datetime.UTC) - began
    all_after, own_after = busy_seconds()
    foreign = max(0.0, (all_after - all_before) - (own_after - own_before)) / (
        took.total_seconds() * os.cpu_count()
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
    ).stdout.strip()
    head = [
        f"machine: {machine()}",
        f"llama.cpp: {bench.llama_how}",
        f"{began:%Y-%m-%d %H:%M} UTC, commit {commit or 'unknown'}, {programs.THREADS} threads, "
        f"medians of {flags.rounds} turns, {took.total_seconds():.0f} s, "
        f"others took {100 * foreign:.0f} % of the processor",
    ]
    print("\n".join(["", *head]))
    pathlib.Path(flags.report).write_text(
        json.dumps({"head": head, "rows": [row.json() for row in rows]}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
