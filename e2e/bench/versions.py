#!/usr/bin/env python3
"""Measures two builds of trustformers-serve in turns on one processor and prints the table of ratios.

    versions.py --ours TARGET/ci/trustformers-serve --older OLDER/ci/trustformers-serve --models FOLDER

The rows are those in which a design is compared with an older one: many sequences over a large vocabulary, a
deep context whose keys and values are bf16, sequences of which one is much deeper than the others, the time
until a model is loaded and gives its first token, and, on a processor with AMX, eight sequences and reading a
prompt. `--only deep` measures the rows whose names have that. `make bench-cpu` builds the older one and
measures these rows too.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import threading
import time
import urllib.request

import programs
from rows import Row

LIMIT_S = 600
# SmolLM2 has one token for each of these words, and ends an answer with one of these tokens.
WORDS = (
    *("the", "old", "house", "near", "river", "was", "built", "by"),
    *("people", "who", "came", "from", "north", "and", "they", "made"),
)
END_TOKENS = (0, 2)
# Of its context of 8,192 tokens the deep sequence leaves room for its answer.
DEEP_WORDS, SHALLOW_WORDS, SHALLOW = 7600, 512, 3
DEEP_ANSWER, SHALLOW_ANSWER = 480, 160
DEEP, PROMPT = 4096, 512


@dataclasses.dataclass(frozen=True)
class Versions:
    """The two programs, and the folder of the models."""

    ours: pathlib.Path
    older: pathlib.Path
    models: pathlib.Path


def has_amx():
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return any("amx_int8" in line.split() for line in text.splitlines() if line.startswith("flags"))


def seconds_to_first_token(program, model):
    """From the start of the program to the end of an answer of one token. The file is in the page cache."""
    with model.open("rb") as file:
        while file.read(1 << 24):
            pass
    began = time.monotonic()
    flags = ["--threads", programs.THREADS, "--max-tokens", 1, "--prompt", "Hello"]
    programs.run(program, "generate", "--model", model, *flags)
    return time.monotonic() - began


class Stream(threading.Thread):
    """A streamed answer, and when each of its tokens came."""

    def __init__(self, url, first_word, words, tokens):
        super().__init__(daemon=True)
        prompt = " ".join([first_word] + [WORDS[at % len(WORDS)] for at in range(words - 1)])
        bias = {str(token): -100 for token in END_TOKENS}
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logit_bias": bias}
        headers = {"content-type": "application/json"}
        self.request = urllib.request.Request(
            url + "/v1/generate/stream", json.dumps(body).encode(), headers=headers
        )
        self.times, self.failure = [], None
        self.has_begun = threading.Event()

    def run(self):
        try:
            with urllib.request.urlopen(self.request, timeout=LIMIT_S) as answer:
                for line in answer:
                    if line.startswith(b"data: {") and b'"token"' in line:
                        self.times.append(time.monotonic())
                        self.has_begun.set()
        except OSError as why:
            self.failure = why
        self.has_begun.set()


def mixed_depths(program, model):
    """Tokens per second of a deep sequence and three shallow ones together, while all of them decode."""
    with programs.our_server(program, model) as url:
        streams = [Stream(url, "deep", DEEP_WORDS, DEEP_ANSWER)]
        streams[0].start()
        streams[0].has_begun.wait(LIMIT_S)
        for word in ("one", "two", "three")[:SHALLOW]:
            streams.append(Stream(url, word, SHALLOW_WORDS, SHALLOW_ANSWER))
            streams[-1].start()
        for stream in streams:
            stream.join(LIMIT_S)
            if stream.failure or not stream.times:
                raise programs.Failed(f"a stream of {program} ended early: {stream.failure}")
    began = max(stream.times[0] for stream in streams)
    ended = min(stream.times[-1] for stream in streams)
    if ended <= began:
        raise programs.Failed("the sequences never decoded together; make the deep answer longer")
    return sum(began < at <= ended for stream in streams for at in stream.times) / (ended - began)


def rows(versions):
    """Each row, and what measures a program for it."""
    small = versions.models / "SmolLM2-135M-Instruct.Q4_1.gguf"
    wide = versions.models / "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"
    large = versions.models / "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf"

    def crowd(program):
        flags = {"prefill": 0, "depth": 0, "sequences": 32, "prompt_tokens": 16, "tokens": 64}
        return programs.ours_engine(program, wide, **flags)["decode", 16, 32]

    def deep(program):
        # The older build has f32 keys and values alone.
        kind = {"kv_cache": "bf16"} if program == versions.ours else {}
        flags = {"prefill": 0, "depth": DEEP, "sequences": 0, "tokens": 64, **kind}
        return programs.ours_engine(program, small, **flags)["decode", DEEP, 1]

    def eight(program):
        flags = {"prefill": 0, "depth": 0, "sequences": 8, "tokens": 128}
        return programs.ours_engine(program, small, **flags)["decode", 128, 8]

    def prompt(program):
        # The prompt in one step.
        flags = {"prefill": PROMPT, "depth": 0, "sequences": 0, "tokens": 2, "token_budget": PROMPT}
        return programs.ours_engine(program, small, **flags)["prefill", PROMPT, 1]

    yield Row("older-qwen-0.5b-32-sequences", "tokens/s", need=1.5, note="(vocabulary of 152k)"), crowd
    yield Row("older-smollm2-depth-4096-bf16", "tokens/s", need=1.3, note="(older: f32)"), deep
    mixed = Row("older-smollm2-mixed-depths", "tokens/s", need=1.3, note="(8k, 512, 512, 512)")
    yield mixed, lambda program: mixed_depths(program, small)
    load = Row("older-qwen-1.5b-load", "s to the first token", need=1.7, smaller_is_better=True)
    yield load, lambda program: seconds_to_first_token(program, large)
    amx = (
        (Row("older-smollm2-amx-8-sequences", "tokens/s", need=1.35), eight),
        (Row("older-smollm2-amx-prefill-512", "tokens/s", need=2.0), prompt),
    )
    for row, measure in amx:
        if not has_amx():
            row.not_run = "this processor has no AMX"
        yield row, measure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ours", type=pathlib.Path, required=True)
    parser.add_argument("--older", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose names have this")
    arguments = parser.parse_args()
    versions = Versions(arguments.ours, arguments.older, arguments.models)
    for row, measure in rows(versions):
        if arguments.only not in row.name:
            continue
        try:
            for turn in range(0 if row.not_run else arguments.rounds):
                print(f"  {row.name}: turn {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
                row.ours.append(measure(versions.ours))
                row.peer.append(measure(versions.older))
        except (programs.Failed, programs.NotBuilt) as why:
            sys.exit(f"error: {why}")
        print(row.line(), flush=True)


if __name__ == "__main__":
    main()
