# A trustformers-serve of this working copy for tests, ended when the script ends. Sourced.

SERVER_MODEL=qwen
SERVER_EMBED_MODEL=minilm

# Counted from the start of the program, because the build before it takes as long as it takes.
READY_TIMEOUT_S=600

# free_ports COUNT: ports that nothing listens on.
free_ports() {
  python3 -c 'import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(each.getsockname()[1] for each in sockets))' "$1"
}

server_answers() { curl --noproxy '*' -sf --max-time 5 "$SERVER_URL/health/ready"; }

# server_has_ended: whether it is gone; a server that cannot start is not waited for.
server_has_ended() { ! kill -0 "$SERVER_PID" 2>/dev/null; }

end_server() {
  local pid
  for pid in ${GATEWAY_PID:-} ${FEED_PID:-} ${SERVER_PID:-}; do
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
}

# server_program NAME: one of our programs, as the last build left it.
server_program() { echo "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/$1"; }

# start_gateway: a gateway before the server that runs, with the routing table of a feed instead of an
# operator's. Sets GATEWAY_URL and GATEWAY_GRPC.
start_gateway() {
  local feed http grpc folder programs deadline
  folder=$CACHE/clients/gateway
  rm -rf "$folder"
  mkdir -p "$folder"
  mapfile -t programs < <("$E2E_DIR/clients/environment.sh")
  read -r feed http grpc <<<"$(free_ports 3)"
  GATEWAY_URL=http://127.0.0.1:$http GATEWAY_GRPC=127.0.0.1:$grpc
  "${programs[0]}/python" "$E2E_DIR/clients/python/routing_feed.py" "127.0.0.1:$feed" "$SERVER_URL" "$SERVER_GRPC" \
    "$SERVER_MODEL=generate" "$SERVER_EMBED_MODEL=embed" >"$folder/feed-log" 2>&1 &
  FEED_PID=$!
  "$(server_program trustformers-gateway)" --feed "http://127.0.0.1:$feed" --state-dir "$folder" \
    --http-address "127.0.0.1:$http" --grpc-address "127.0.0.1:$grpc" >"$folder/log" 2>&1 &
  GATEWAY_PID=$!
  deadline=$((SECONDS + READY_TIMEOUT_S))
  until curl --noproxy '*' -sf --max-time 5 "$GATEWAY_URL/health/ready" >/dev/null; do
    kill -0 "$GATEWAY_PID" 2>/dev/null || fail "trustformers-gateway ended: $(tail -3 "$folder/log")" "log: $folder/log"
    kill -0 "$FEED_PID" 2>/dev/null || fail "the feed ended: $(tail -3 "$folder/feed-log")" "log: $folder/feed-log"
    [ $SECONDS -lt $deadline ] || fail "trustformers-gateway was not ready within $READY_TIMEOUT_S s" "log: $folder/log"
    sleep 0.1
  done
  say "trustformers-gateway is ready at $GATEWAY_URL and $GATEWAY_GRPC (log: $folder/log)"
}

# start_server: builds it, starts it on this machine alone and waits until it is ready. Sets SERVER_URL,
# SERVER_GRPC and SERVER_PID.
start_server() {
  local http grpc folder deadline
  # Within `make test` the program of the tests is used: another build, without tokio's test clock, takes
  # minutes.
  local build=(build --workspace --bin trustformers-serve --bin trustformers-gateway)
  [ -z "${TRUSTFORMERS_TESTED_PROGRAMS:-}" ] || build=(test --workspace --no-run)
  # TRUSTFORMERS_BUILT=1: the programs are there already.
  [ -n "${TRUSTFORMERS_BUILT:-}" ] || (cd "$REPO_DIR" && cargo "${build[@]}" --locked --profile ci) >&2
  read -r http grpc <<<"$(free_ports 2)"
  SERVER_URL=http://127.0.0.1:$http SERVER_GRPC=127.0.0.1:$grpc
  folder=$CACHE/clients/server
  mkdir -p "$folder"
  cat >"$folder/config.yaml" <<EOF
server: {host: "127.0.0.1", port: $http, grpc_port: $grpc}
models:
  - {name: $SERVER_MODEL, aliases: [default/$SERVER_MODEL], path: "$MODEL_STORE/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"}
  - {name: $SERVER_EMBED_MODEL, aliases: [default/$SERVER_EMBED_MODEL], path: "$MODEL_STORE/all-minilm-l6-v2"}
EOF
  "$(server_program trustformers-serve)" --config "$folder/config.yaml" >"$folder/log" 2>&1 &
  SERVER_PID=$!
  trap end_server EXIT
  deadline=$((SECONDS + READY_TIMEOUT_S))
  until server_answers >/dev/null; do
    ! server_has_ended || fail "trustformers-serve ended: $(tail -3 "$folder/log")" "log: $folder/log"
    [ $SECONDS -lt $deadline ] || fail "trustformers-serve was not ready within $READY_TIMEOUT_S s" "log: $folder/log"
    sleep 0.1
  done
  say "trustformers-serve is ready at $SERVER_URL and $SERVER_GRPC (log: $folder/log)"
}
