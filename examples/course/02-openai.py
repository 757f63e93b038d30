#!/usr/bin/env python3
"""A chat through OpenAI's own client, whole and as a stream. It needs: pip install openai"""

import os

from openai import OpenAI

url = os.environ.get("TRUSTFORMERS_URL", "http://localhost:8080")
client = OpenAI(base_url=f"{url}/v1", api_key="none")
messages = [{"role": "user", "content": "How many legs has a spider?"}]

answer = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=32)
print(answer.choices[0].message.content)

stream = client.chat.completions.create(
    model="smollm2", messages=messages, temperature=0, max_tokens=32, stream=True
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
