#!/usr/bin/env python3
"""Measures two builds of trustformers-serve in turns on one processor and prints the table of ratios.

    versions.py --ours TARGET/ci/trustformers-serve --older OLDER/ci/trustformers-serve --models FOLDER

The rows are those in which a design is compared with an older one: many sequences over a large vocabulary, a
deep context whose keys and values are bf16, and the time until a model is loaded and gives its first token.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from rows import Row

LIMIT_S = 600


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
    load = Row("qwen-1.5b-load-and-first-token", "s", need=1.7, smaller_is_better=True)
    yield load, lambda program: seconds_to_first_token(program, large)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ours", type=pathlib.Path, required=True)
    parser.add_argument("--older", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for row, measure in rows(arguments):
        for turn in range(arguments.rounds):
            print(f"  {row.name}: turn {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            row.ours.append(measure(arguments.ours))
            row.peer.append(measure(arguments.older))
        print(row.line(), flush=True)


if __name__ == "__main__":
    main()
