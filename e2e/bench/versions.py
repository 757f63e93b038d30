#!/usr/bin/env python3
"""Measures two builds of trustformers-serve in turns on one processor and prints the table of ratios.

    versions.py --ours TARGET/ci/trustformers-serve --older OLDER/ci/trustformers-serve --models FOLDER

The rows are those in which a design is compared with an older one: many sequences over a large vocabulary, a
deep context whose keys and values are bf16, sequences of which one is much deeper than the others, and the
time until a model is loaded and gives its first token. `--only deep` measures the rows whose names have that.
"""

import argparse
import json
import pathlib
import subprocess
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


def speed(program, model, sequences, depth, *flags):
    """Tokens per second that `bench engine` measures for so many sequences at one depth."""
    command = [str(program), "bench", "engine", "--model", str(model), "--repeat", "1", "--json", *flags]
    command += ["--prefill", "0", "--depth", str(depth), "--sequences", str(sequences)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=LIMIT_S)
    results = json.loads(answer.stdout)["results"]
    (found,) = [one["median"] for one in results if one["sequences"] == max(sequences, 1)]
    return found


def seconds_to_first_token(program, model):
    """From the start of the program to the end of an answer of one token."""
    command = [str(program), "generate", "--model", str(model), "--max-tokens", "1", "--prompt", "Hello"]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT_S)
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


def rows(arguments):
    """Each row, and what measures a program for it."""
    small = arguments.models / "SmolLM2-135M-Instruct.Q4_1.gguf"
    wide = arguments.models / "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"
    large = arguments.models / "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf"

    def crowd(program):
        return speed(program, wide, 32, 0, "--prompt-tokens", "16", "--tokens", "64")

    def deep(program):
        # The older build has f32 keys and values alone.
        kind = ["--kv-cache", "bf16"] if program == arguments.ours else []
        return speed(program, small, 0, 4096, "--tokens", "64", *kind)

    yield Row("qwen-0.5b-32-sequences", "tokens/s", need=1.5, note="(vocabulary of 152k)"), crowd
    yield Row("smollm2-depth-4096-bf16", "tokens/s", need=1.3, note="(older: f32)"), deep
    mixed = Row("smollm2-depths-8k-and-3-of-512", "tokens/s", need=1.3, note="(four sequences)")
    yield mixed, lambda program: mixed_depths(program, small)
    load = Row("qwen-1.5b-load-and-first-token", "s", need=1.7, smaller_is_better=True)
    yield load, lambda program: seconds_to_first_token(program, large)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ours", type=pathlib.Path, required=True)
    parser.add_argument("--older", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose names have this")
    arguments = parser.parse_args()
    for row, measure in rows(arguments):
        if arguments.only not in row.name:
            continue
        for turn in range(arguments.rounds):
            print(f"  {row.name}: turn {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            row.ours.append(measure(arguments.ours))
            row.peer.append(measure(arguments.older))
        print(row.line(), flush=True)


if __name__ == "__main__":
    main()
