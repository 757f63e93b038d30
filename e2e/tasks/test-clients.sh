#!/usr/bin/env bash
# test-clients.sh [short | ARGUMENT...]: starts trustformers-serve with a model that calls tools and one that
# embeds, runs the clients of e2e/clients/run.sh against it, and ends it. `short` is what `make test` runs;
# other arguments, such as --only curl, go to run.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
source "$E2E_DIR/clients/server.sh"

arguments=("$@")
if [ "${1:-}" = short ]; then arguments=(--only "openai-python,anthropic-python,grpcio,grpc-web,websocket,curl"); fi

"$E2E_DIR/models/fetch.sh" qwen-0.5b minilm
"$E2E_DIR/clients/environment.sh" >/dev/null
start_server
"$E2E_DIR/clients/run.sh" "$SERVER_URL" "$SERVER_GRPC" --model "$SERVER_MODEL" --embed-model "$SERVER_EMBED_MODEL" \
  ${arguments[@]+"${arguments[@]}"}
