# A trustformers-serve of this working copy for tests, ended when the script ends. Sourced.

SERVER_MODEL=qwen
SERVER_EMBED_MODEL=minilm

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
  kill -TERM "$SERVER_PID" 2>/dev/null || true
  wait "$SERVER_PID" 2>/dev/null || true
}

# start_server: builds it, starts it on this machine alone and waits until it is ready. Sets SERVER_URL,
# SERVER_GRPC and SERVER_PID.
start_server() {
  local http grpc folder
  # Within `make test` the program of the tests is used: another build, without tokio's test clock, takes
  # minutes.
  local build=(build --workspace --bin trustformers-serve)
  [ -z "${TRUSTFORMERS_TESTED_PROGRAMS:-}" ] || build=(test --workspace --no-run)
  (cd "$REPO_DIR" && cargo "${build[@]}" --locked --profile ci) >&2
  read -r http grpc <<<"$(free_ports 2)"
  SERVER_URL=http://127.0.0.1:$http SERVER_GRPC=127.0.0.1:$grpc
  folder=$CACHE/clients/server
  mkdir -p "$folder"
  cat >"$folder/config.yaml" <<EOF
server: {host: "127.0.0.1", port: $http, grpc_port: $grpc}
models:
  - {name: $SERVER_MODEL, path: "$MODEL_STORE/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"}
  - {name: $SERVER_EMBED_MODEL, path: "$MODEL_STORE/all-minilm-l6-v2"}
EOF
  "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/trustformers-serve" --config "$folder/config.yaml" >"$folder/log" 2>&1 &
  SERVER_PID=$!
  trap end_server EXIT
  until server_answers >/dev/null; do
    ! server_has_ended || fail "trustformers-serve ended: $(tail -3 "$folder/log")" "log: $folder/log"
    [ $SECONDS -lt 600 ] || fail "trustformers-serve was not ready within 600 s" "log: $folder/log"
    sleep 0.1
  done
  say "trustformers-serve is ready at $SERVER_URL and $SERVER_GRPC (log: $folder/log)"
}
