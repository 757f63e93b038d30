#!/usr/bin/env bash
# report.sh: the figures of this checkout. What `make test` measured is printed with its time;
# what is not there is measured now, the time to first token on a cluster that is brought up for it and taken
# down again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
unset KUBECONFIG
RUNS=5
PROMPT="Once upon a time there was a lighthouse keeper who"

measure_first_token() {
  local status=0
  say "measuring the time to first token on a fresh cluster ..."
  "$E2E_DIR/models/fetch.sh"
  "$E2E_DIR/images/build.sh" >/dev/null
  "$CLUSTER_SRC/down.sh"
  "$CLUSTER_SRC/up.sh" --nodes 2 >/dev/null
  "$CLUSTER_SRC/binaries.sh" link "$BIN" helm
  "$CLUSTER_SRC/load-images.sh" "$IMAGE_STORE"/trustformers-{operator,gateway,runtime}.tar "$IMAGE_STORE/smollm2.tar"
  (cd "$REPO_DIR" && TRUSTFORMERS_E2E_KUBECONFIG=$OUR_KUBECONFIG TRUSTFORMERS_E2E_BIN=$BIN TRUSTFORMERS_E2E_IMAGE_TAG=$(cat "$IMAGE_STORE/tag") \
    "$CLUSTER_SRC/client.sh" cargo test --locked --profile ci --workspace --test scenarios -- --exact s2_first_token::the_time_to_the_first_token_is_reported) >&2 || status=1
  "$CLUSTER_SRC/down.sh"
  [ $status = 0 ] || fail "the scenario the_time_to_the_first_token_is_reported failed, so there is no time to first token"
}

# The program of the images, so that what is measured is what is shipped.
measure_decode() {
  local program=$IMAGE_STORE/stage/trustformers-serve
  [ -x "$program" ] || "$E2E_DIR/images/build.sh" >/dev/null
  [ -f "$MODEL_STORE/SmolLM2-135M-Instruct.Q4_1.gguf" ] || "$E2E_DIR/models/fetch.sh"
  say "measuring decode speed, $RUNS runs on 2 threads ..."
  for _ in $(seq "$RUNS"); do
    "$program" generate --model "$MODEL_STORE/SmolLM2-135M-Instruct.Q4_1.gguf" --prompt "$PROMPT" --max-tokens 128 --temperature 0 --threads 2 --json 2>/dev/null
  done >"$REPORT_DIR/decode.jsonl.part"
  mv "$REPORT_DIR/decode.jsonl.part" "$REPORT_DIR/decode.jsonl"
}

mkdir -p "$REPORT_DIR"
[ -f "$REPORT_DIR/first_token.json" ] || measure_first_token
[ -f "$IMAGE_STORE/trustformers-runtime.tar" ] || "$E2E_DIR/images/build.sh" >/dev/null
measure_decode
python3 "$E2E_DIR/tasks/report.py" "$REPORT_DIR" "$IMAGE_STORE"
