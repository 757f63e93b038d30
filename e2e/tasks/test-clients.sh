#!/usr/bin/env bash
# test-clients.sh [short | gateway | ARGUMENT...]: starts trustformers-serve with a model that calls tools and
# one that embeds, runs the clients of e2e/clients/run.sh against it, and ends it. `short` is what `make test`
# runs; `gateway` runs all of them through a gateway before that server too; other arguments, such as --only
# curl, go to run.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
source "$E2E_DIR/clients/server.sh"

through_gateway='' arguments=("$@")
case ${1:-} in
  short) arguments=(--only "openai-python,anthropic-python,grpcio,grpc-web,websocket,curl") ;;
  gateway) through_gateway=yes arguments=("${@:2}") ;;
esac

# run_clients URL GRPC_ADDRESS PREFIX: the clients, with the models' names after the prefix.
run_clients() {
  "$E2E_DIR/clients/run.sh" "$1" "$2" --model "$3$SERVER_MODEL" --embed-model "$3$SERVER_EMBED_MODEL" ${arguments[@]+"${arguments[@]}"}
}

"$E2E_DIR/models/fetch.sh" qwen-0.5b minilm
"$E2E_DIR/clients/environment.sh" >/dev/null
start_server
run_clients "$SERVER_URL" "$SERVER_GRPC" ''
if [ -n "$through_gateway" ]; then
  start_gateway
  # A gateway lists models by their full names.
  run_clients "$GATEWAY_URL" "$GATEWAY_GRPC" default/
fi
