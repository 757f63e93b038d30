#!/usr/bin/env python3
"""Which text means the same: vectors of three texts, and the cosine between them."""

import json
import os
import urllib.request

url = os.environ.get("TRUSTFORMERS_URL", "http://localhost:8080")
texts = [
    "A cat sits on the mat.",
    "There is a kitten on the rug.",
    "The invoice is due on Friday.",
]
body = {"model": "minilm", "input": texts}
request = urllib.request.Request(f"{url}/v1/embeddings", data=json.dumps(body).encode())
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request) as answer:
    vectors = [item["embedding"] for item in json.load(answer)["data"]]


def cosine(a, b):
    # The vectors of this model have the length 1.
    return sum(x * y for x, y in zip(a, b, strict=True))


for other in (1, 2):
    print(f"{cosine(vectors[0], vectors[other]):.2f}  {texts[0]}  {texts[other]}")
nearest = max((1, 2), key=lambda other: cosine(vectors[0], vectors[other]))
print(f"nearest: {texts[nearest]}")
