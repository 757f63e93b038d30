#!/usr/bin/env bash
# grpcurl.sh BASE_URL GRPC_ADDRESS MODEL EMBED_MODEL: what grpcurl finds by reflection, and calls. A line PASS
# or FAIL for each check. grpcurl is on the path.
# shellcheck disable=SC2329 # check calls functions by their names
set -euo pipefail
address=$2 model=$3
source "$(dirname "${BASH_SOURCE[0]}")/check.sh"

call() { grpcurl -plaintext -max-time 60 "$@"; }

services() {
  local found service
  found=$(call "$address" list)
  for service in trustformers.v1.InferenceService trustformers.v1.ModelService trustformers.v1.HealthService \
    inference.GRPCInferenceService grpc.health.v1.Health; do
    grep -x "$service" <<<"$found" >/dev/null || { echo "no $service among $found"; return 1; }
  done
}

description() { [[ $(call "$address" describe trustformers.v1.GenerateRequest) == *"float temperature = 3"* ]]; }

generate() {
  local found
  found=$(call -d "{\"prompt\": \"1, 2, 3,\", \"max_tokens\": 4, \"model\": \"$model\"}" "$address" trustformers.v1.InferenceService/Generate)
  [[ $found == *'"text":'*4* ]] || { echo "$found"; return 1; }
}

stream() {
  local found
  found=$(call -d "{\"prompt\": \"1, 2, 3,\", \"max_tokens\": 4, \"model\": \"$model\"}" "$address" trustformers.v1.InferenceService/GenerateStream)
  [[ $found == *FINISH_REASON_* ]] || { echo "$found"; return 1; }
}

health() { [[ $(call "$address" grpc.health.v1.Health/Check) == *SERVING* ]]; }

kserve() { [[ $(call "$address" inference.GRPCInferenceService/ServerLive) == *true* ]]; }

errors() {
  local found
  found=$(call -d '{"prompt": "a", "model": "missing"}' "$address" trustformers.v1.InferenceService/Generate 2>&1 || true)
  [[ $found == *NotFound* ]] || { echo "$found"; return 1; }
}

check grpcurl "list of services" services
check grpcurl "description of a message" description
check grpcurl "Generate" generate
check grpcurl "GenerateStream" stream
check grpcurl "grpc.health.v1" health
check grpcurl "KServe v2" kserve
check grpcurl "errors" errors
exit "$failed"
