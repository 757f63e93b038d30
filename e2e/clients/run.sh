#!/usr/bin/env bash
# run.sh BASE_URL GRPC_ADDRESS [--model NAME] [--embed-model NAME] [--only CLIENT,...]: real clients,
# unchanged, against a running server, such as http://127.0.0.1:8080 and 127.0.0.1:9090. Each prints a line
# PASS or FAIL for every check; the exit code says whether all passed. Without names the first ready models of
# each task are asked; `--embed-model none` leaves out the checks that embed, for a pod of one model that
# generates. That model must have a chat template with tools.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

SOURCE=$E2E_DIR/clients
ALL=(openai-python anthropic-python langchain tritonclient grpcio grpc-web websocket curl grpcurl openai-node ai-sdk rust)
USAGE="usage: run.sh BASE_URL GRPC_ADDRESS [--model NAME] [--embed-model NAME] [--only CLIENT,...]; clients: ${ALL[*]}"

[ $# -ge 2 ] || fail "$USAGE"
base=${1%/} address=$2 model='' embed_model='' only=("${ALL[@]}")
shift 2
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=${2:?$USAGE} ;;
    --embed-model) embed_model=${2:?$USAGE} ;;
    --only) IFS=, read -ra only <<<"${2:?$USAGE}" ;;
    *) fail "unknown argument $1" "$USAGE" ;;
  esac
  shift 2
done

# first_model TASK: the first ready model that the server lists for the task.
first_model() {
  curl --noproxy '*' -sf --max-time 30 "$base/v1/models" | python3 -c 'import json, sys
ready = [model["id"] for model in json.load(sys.stdin)["data"] if model["task"] == sys.argv[1] and model["state"] == "ready"]
print(ready[0] if ready else "")' "$1" || fail "$base/v1/models gives no list of models" "is the server running?"
}

wants() { [[ " ${only[*]} " == *" $1 "* ]]; }

# run_client NAME COMMAND...: the command with the addresses and models; counts its lines.
run_client() {
  local name=$1 began=$SECONDS log=$logs/$1.log status=0
  shift
  wants "$name" || return 0
  "$@" "$base" "$address" "$model" "$embed_model" 2>"$log.errors" | tee "$log" || status=$?
  # A program that ends without a line, or for another reason than a check, is a failure with its last words.
  if [ ! -s "$log" ] || { [ $status != 0 ] && ! grep '^FAIL ' "$log" >/dev/null; }; then
    echo "FAIL $name: ended with status $status: $(tail -3 "$log.errors" | tr '\n' ' ' | cut -c1-600)" | tee -a "$log"
  fi
  cat "$log" >>"$logs/all"
  say "$name took $((SECONDS - began)) s"
}

for name in "${only[@]}"; do [[ " ${ALL[*]} " == *" $name "* ]] || fail "there is no client $name" "$USAGE"; done
[ -n "$model" ] || model=$(first_model generate)
[ -n "$embed_model" ] || embed_model=$(first_model embed)
[ -n "$model" ] && [ -n "$embed_model" ] || fail "the server needs a ready model that generates and one that embeds" "see $base/v1/models"

mapfile -t folders < <("$SOURCE/environment.sh")
[ ${#folders[@]} = 3 ] || fail "the clients could not be installed"
python=${folders[0]}/python node_packages=${folders[1]} node=${folders[2]}/node
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore LANGSMITH_TRACING=false OPENAI_LOG=error

run_client openai-python "$python" "$SOURCE/python/openai_python.py"
run_client anthropic-python "$python" "$SOURCE/python/anthropic_python.py"
run_client langchain "$python" "$SOURCE/python/langchain_python.py"
run_client tritonclient "$python" "$SOURCE/python/triton_client.py"
run_client grpcio "$python" "$SOURCE/python/grpc_client.py"
run_client grpc-web "$python" "$SOURCE/python/grpc_web.py"
run_client websocket "$python" "$SOURCE/python/websocket_client.py"
run_client curl "$SOURCE/curl.sh"
if wants grpcurl; then
  grpcurl=$("$CLUSTER_SRC/binaries.sh" path grpcurl)
  PATH=$PATH:$(dirname "$grpcurl")
fi
run_client grpcurl "$SOURCE/grpcurl.sh"
run_client openai-node "$node" "$node_packages/openai_node.mjs"
run_client ai-sdk "$node" "$node_packages/ai_sdk.mjs"
run_client rust "$SOURCE/rust.sh"

passed=$(grep -c '^PASS ' "$logs/all" || true)
skipped=$(grep -c '^SKIP ' "$logs/all" || true)
failed=$(grep -c '^FAIL ' "$logs/all" || true)
if [ "$failed" != 0 ]; then grep '^FAIL ' "$logs/all" >&2; fi
echo "clients: $passed checks passed, $failed failed, $skipped left out"
[ "$failed" = 0 ]
