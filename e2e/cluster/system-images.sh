# Images of the cluster's own pods, packed from the binaries that were built here. Sourced.

# The pause program holds a pod's namespaces. Its source comes with the Kubernetes module.
pack_pause() {
  [ -f "$STATE/images/pause.tar.id" ] && return 0
  local source
  source=$("$CLUSTER_SRC/binaries.sh" source kubernetes k8s.io/kubernetes)
  mkdir -p "$STATE/images"
  gcc -Os -static -s -w -o "$STATE/images/pause" "$source/build/pause/linux/pause.c"
  python3 "$E2E_DIR/images/pack.py" --output "$STATE/images/pause.tar" --tag localhost/pause:e2e --user 65535:65535 \
    --file "$STATE/images/pause:/pause:755" --entrypoint /pause >/dev/null
}

# pack_tool NAME: a static binary as the only file of an image.
pack_tool() {
  [ -f "$STATE/images/$1.tar.id" ] && return 0
  python3 "$E2E_DIR/images/pack.py" --output "$STATE/images/$1.tar" --tag "localhost/$1:e2e" --user 65532:65532 \
    --file "$(realpath "$BIN/$1"):/$1:755" --entrypoint "/$1" >/dev/null
}

load_everywhere() { local i; for i in $(seq "$(nodes_up)"); do load_tar "$i" "$1"; done; }
