#!/usr/bin/env bash
# 04-json.sh: an answer that a JSON schema describes. The server allows no token that does not fit.
set -euo pipefail
url=${TRUSTFORMERS_URL:-http://localhost:8080}

curl --silent --show-error --fail-with-body --noproxy '*' "$url/v1/generate" \
  --data '{
    "model": "smollm2",
    "prompt": "Anna is 31 years old. As JSON: ",
    "temperature": 0,
    "max_tokens": 64,
    "response_format": {
      "type": "json_schema",
      "schema": {
        "type": "object",
        "properties": {
          "name": {"type": "string", "maxLength": 20},
          "age": {"type": "integer", "minimum": 0, "maximum": 150}
        },
        "required": ["name", "age"],
        "additionalProperties": false
      }
    }
  }'
echo
