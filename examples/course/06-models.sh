#!/usr/bin/env bash
# 06-models.sh: a model is loaded, asked and unloaded while the server runs. The path is one of the server's
# machine.
set -euo pipefail
url=${TRUSTFORMERS_URL:-http://localhost:8080}
path=${TRUSTFORMERS_MODEL_FILE:-SmolLM2-135M-Instruct.Q4_1.gguf}

ask() { # ROUTE BODY
  curl --silent --show-error --fail-with-body --noproxy '*' "$url$1" --data "$2"
  echo
}

# Answers once the model is ready.
ask /v1/models/load '{"name": "second", "path": "'"$path"'", "context_tokens": 512}'
ask /v1/generate '{"model": "second", "prompt": "Water boils at", "max_tokens": 8, "temperature": 0}'
# Answers once the model's own answers have ended and its memory is free.
ask /v1/models/unload '{"model": "second"}'
curl --silent --show-error --fail-with-body --noproxy '*' "$url/v1/models"
echo
