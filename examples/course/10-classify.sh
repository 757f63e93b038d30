#!/usr/bin/env bash
# 10-classify.sh: scores of a model's labels. The model of the course has seeded values and knows nothing; a
# real one is the folder of any checkpoint for sequence classification.
set -euo pipefail
url=${TRUSTFORMERS_URL:-http://localhost:8080}

curl --silent --show-error --fail-with-body --noproxy '*' "$url/v1/classify" \
  --data '{"model": "labels", "input": ["the cat", ["hello world", "a pair of texts"]], "top_k": 2}'
echo
