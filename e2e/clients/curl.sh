#!/usr/bin/env bash
# curl.sh BASE_URL GRPC_ADDRESS MODEL EMBED_MODEL: the routes as a person calls them, with curl: text,
# server-sent events, health, metrics, the OpenAPI document, compression, CORS, errors. A line PASS or FAIL
# for each check.
# shellcheck disable=SC2329 # check calls functions by their names
set -euo pipefail
base=$1 model=$3 embed_model=$4
source "$(dirname "${BASH_SOURCE[0]}")/check.sh"
answer=$(mktemp) head=$(mktemp)
trap 'rm -f "$answer" "$head"' EXIT

# request ARGUMENT...: the status; the body is in $answer, the head in $head.
request() { curl --noproxy '*' --silent --show-error --max-time 120 --output "$answer" --dump-header "$head" --write-out '%{http_code}' "$@"; }

# header NAME: its value in the last answer.
header() { sed -n "s/^$1: *//Ip" "$head" | tr -d '\r' | tail -1; }

# json EXPRESSION: a Python expression over the last answer, as `body`.
json() { python3 -c 'import json, sys; body = json.load(open(sys.argv[1])); assert eval(sys.argv[2]), json.dumps(body)[:400]' "$answer" "$1"; }

whole() {
  [ "$(request "$base/v1/generate" -d "{\"model\": \"$model\", \"prompt\": \"1, 2, 3,\", \"max_tokens\": 4, \"temperature\": 0}")" = 200 ]
  json '"4" in body["text"] and body["usage"]["completion_tokens"] == 4 and len(body["tokens"]) == 4'
  [ -n "$(header x-request-id)" ]
  [ "$(header x-trustformers-digest | wc -c)" = 65 ]
}

events() {
  [ "$(request -N "$base/v1/generate/stream" -d "{\"model\": \"$model\", \"prompt\": \"1, 2, 3,\", \"max_tokens\": 4, \"temperature\": 0}")" = 200 ]
  [ "$(header content-type)" = text/event-stream ]
  [ "$(header x-accel-buffering)" = no ]
  # Lines of data, an empty line after each, and the end.
  [ "$(grep -cvE '^(data: .+|)$' "$answer" || true)" = 0 ]
  [ "$(grep -c '^data: ' "$answer")" = 6 ]
  [ "$(grep '^data: ' "$answer" | tail -1)" = 'data: [DONE]' ]
}

chat_events() {
  [ "$(request -N "$base/v1/chat/completions" -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Say hello.\"}], \"max_tokens\": 8, \"stream\": true}")" = 200 ]
  [ "$(grep '^data: ' "$answer" | tail -1)" = 'data: [DONE]' ]
}

aliases() {
  [ "$(request "$base/openai/v1/models")" = 200 ]
  json 'body["object"] == "list" and len(body["data"]) >= 1'
  [ "$(request "$base/v1/models/${model//\//%2F}")" = 200 ]
  [ "$(request "$base/v1/models/$model")" = 200 ]
  json 'body["state"] == "ready"'
}

health() {
  local path
  for path in health health/live health/ready health/startup; do
    [ "$(request "$base/$path")" = 200 ]
    json 'body["status"] == "ok"'
  done
  for path in health/live health/ready; do [ "$(request "$base/v2/$path")" = 200 ]; done
  [ "$(request "$base/metrics")" = 200 ]
  grep '^trustformers_' "$answer" >/dev/null
}

openapi() {
  [ "$(request "$base/openapi.json")" = 200 ]
  json 'body["openapi"].startswith("3.1") and "/v1/chat/completions" in body["paths"]'
}

compression() {
  local encoding
  for encoding in gzip br zstd; do
    [ "$(request "$base/openapi.json" -H "accept-encoding: $encoding")" = 200 ]
    [ "$(header content-encoding)" = "$encoding" ]
  done
  [ "$(request -N "$base/v1/generate/stream" -H 'accept-encoding: gzip, br, zstd' -d "{\"model\": \"$model\", \"prompt\": \"1, 2\", \"max_tokens\": 2}")" = 200 ]
  [ -z "$(header content-encoding)" ]
  [ "$embed_model" != none ] || return 0
  [ "$(printf '{"model": "%s", "input": "hello"}' "$embed_model" | gzip | request "$base/v1/embeddings" -H 'content-encoding: gzip' --data-binary @-)" = 200 ]
  json 'len(body["data"]) == 1'
}

cors() {
  [[ $(request -X OPTIONS "$base/v1/chat/completions" -H 'origin: http://localhost:3000' -H 'access-control-request-method: POST' -H 'access-control-request-headers: authorization,content-type') =~ ^20[04]$ ]]
  [[ $(header access-control-allow-origin) =~ ^(\*|http://localhost:3000)$ ]]
  [ "$(request "$base/v1/models" -H 'origin: http://localhost:3000')" = 200 ]
  [[ $(header access-control-expose-headers) == *x-request-id* ]]
}

errors() {
  [ "$(request "$base/v1/generate" -d "{\"model\": \"$model\", \"prompt\": \"a\", \"max_token\": 3}")" = 400 ]
  json 'body["error"]["field"] == "max_token" and "max_tokens" in body["error"]["message"]'
  [ "$(request "$base/v1/nothing")" = 404 ]
  json '"/v1/nothing" in body["error"]["message"]'
  [ "$(request "$base/v1/generate")" = 405 ]
  [ "$(request "$base/v2/models/missing/infer" -d '{"inputs": []}')" = 404 ]
  json 'isinstance(body["error"], str)'
  [ "$(request "$base/v1/generate" -d '{')" = 400 ]
}

check curl "generate" whole "$answer"
check curl "generate: server-sent events" events "$answer"
check curl "chat: server-sent events" chat_events "$answer"
check curl "models: aliases, names in paths" aliases "$answer"
check curl "health and metrics" health "$answer"
check curl "openapi.json" openapi "$answer"
check curl "compression of answers and requests, never of a stream" compression "$answer"
check curl "CORS" cors "$answer"
check curl "errors" errors "$answer"
exit "$failed"
