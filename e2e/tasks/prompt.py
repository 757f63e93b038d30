#!/usr/bin/env python3
"""Sends a prompt to a gateway and prints the answer as it arrives, token by token. Standard library only.

usage: prompt.py ADDRESS MODEL PROMPT [MAX_TOKENS]

The last line on stderr says how many tokens came and how soon the first one did.
"""

import json
import sys
import time
import urllib.error
import urllib.request


def events(answer):
    """The data of each server-sent event, parsed; ends at [DONE]."""
    for line in (line.decode().strip() for line in answer):
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    address, model, prompt = sys.argv[1:4]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": int(sys.argv[4]) if len(sys.argv) == 5 else 48,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/v1/generate/stream", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began, first, count = time.monotonic(), None, 0
    # A proxy of the environment cannot reach the test network.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as answer:
            print(prompt, end="", flush=True)
            for event in events(answer):
                if "error" in event:
                    sys.exit(f"\nerror: {event['error']}")
                if event.get("finish_reason") is None or event.get("text"):
                    first = first or time.monotonic()
                    print(event.get("text", ""), end="", flush=True)
                if event.get("token") is not None:
                    count += 1
    except urllib.error.HTTPError as error:
        sys.exit(f"error: {address} answered {error.code}: {error.read().decode(errors='replace')}")
    except OSError as error:
        sys.exit(f"error: {address} does not answer: {error}")
    if not count:
        sys.exit("error: the answer held no token")
    print()
    took, first_ms = time.monotonic() - began, (first - began) * 1000
    print(f"{count} tokens in {took:.2f} s, the first after {first_ms:.0f} ms", file=sys.stderr)


if __name__ == "__main__":
    main()
