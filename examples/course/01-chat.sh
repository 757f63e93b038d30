#!/usr/bin/env bash
# 01-chat.sh: a chat by curl, over the route that OpenAI's clients use.
set -euo pipefail
url=${TRUSTFORMERS_URL:-http://localhost:8080}

curl --silent --show-error --fail-with-body --noproxy '*' "$url/v1/chat/completions" \
  --header 'content-type: application/json' \
  --data '{
    "model": "smollm2",
    "messages": [{"role": "user", "content": "How many legs has a spider?"}],
    "temperature": 0,
    "max_tokens": 32
  }'
echo
