#!/usr/bin/env python3
"""Tokens as they are made: server-sent events, read with the standard library alone."""

import json
import os
import urllib.request

url = os.environ.get("TRUSTFORMERS_URL", "http://localhost:8080")
body = {
    "model": "smollm2",
    "prompt": "The three primary colours are",
    "max_tokens": 24,
    "temperature": 0,
    "stream": True,
}
request = urllib.request.Request(f"{url}/v1/generate", data=json.dumps(body).encode())
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

with opener.open(request) as events:
    for line in events:
        # Every event is one line of data; the last one is not JSON.
        data = line.decode().removeprefix("data: ").strip()
        if not data or data.startswith(":"):
            continue
        if data == "[DONE]":
            break
        event = json.loads(data)
        if "finish_reason" in event:
            print(f"\n{event['usage']['completion_tokens']} tokens, ended by {event['finish_reason']}")
        else:
            print(event["text"], end="", flush=True)
