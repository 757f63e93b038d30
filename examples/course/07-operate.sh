#!/usr/bin/env bash
# 07-operate.sh: what an operator of the server looks at: health, the state of each model, metrics.
set -euo pipefail
url=${TRUSTFORMERS_URL:-http://localhost:8080}

ask() { # ROUTE
  curl --silent --show-error --fail-with-body --noproxy '*' "$url$1"
}

for question in live ready startup; do
  echo "$question: $(ask "/health/$question")"
done
echo "models: $(ask /v1/models)"
# Prometheus scrapes the same port.
ask /metrics | grep '^trustformers_generated_tokens_total'
