# Stages: named parts of `make test`, each timed, its output shown and kept. Sourced.

STAGE_LOGS=$REPORT_DIR/stages
STAGE_NAMES=() STAGE_SECONDS=() STAGE_RESULTS=()

# What the run starts from: cold (nothing is compiled), warm (Kubernetes and our crates are), or mixed.
compiled_before() {
  local kubernetes=no crates=no
  [ -z "$(find "$BIN_STORE" -name kube-apiserver 2>/dev/null)" ] || kubernetes=yes
  [ -z "$(find "${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci/deps" -name 'libtrustformers_*' 2>/dev/null)" ] || crates=yes
  case $kubernetes$crates in yesyes) echo warm ;; nono) echo cold ;; *) echo mixed ;; esac
}

begin_stages() {
  rm -rf "$STAGE_LOGS"
  mkdir -p "$STAGE_LOGS"
  STAGES_START=$(compiled_before)
}

# stage NAME COMMAND...: ends the whole run when the command fails, because what follows needs it.
stage() {
  local name=$1 began=$SECONDS result=ok status
  shift
  printf '\n=== %s\n' "$name"
  # Not in an `if`: there, bash would ignore failures inside the functions that are called. The status is the
  # command's, not tee's.
  set +e
  (set -e; "$@") 2>&1 | tee "$STAGE_LOGS/$name.log"
  status=${PIPESTATUS[0]}
  set -e
  [ "$status" = 0 ] || result=failed
  STAGE_NAMES+=("$name") STAGE_SECONDS+=($((SECONDS - began))) STAGE_RESULTS+=("$result")
  [ $result = ok ] || { echo "=== $name failed (log: $STAGE_LOGS/$name.log)"; exit 1; }
}

# The table at the end, and the same as JSON for `make report`, which shows the last cold and the last warm
# run.
end_stages() {
  local i total=0
  printf '\n%-12s %8s\n' stage seconds
  for i in "${!STAGE_NAMES[@]}"; do
    printf '%-12s %8d  %s\n' "${STAGE_NAMES[$i]}" "${STAGE_SECONDS[$i]}" "${STAGE_RESULTS[$i]}"
    total=$((total + STAGE_SECONDS[i]))
  done
  printf '%-12s %8d  (%s)\n' sum $total "$STAGES_START"
  {
    printf '{"commit": "%s", "time": "%s", "cores": %d, "start": "%s", "stages": [' \
      "$(git -C "$REPO_DIR" rev-parse --short HEAD 2>/dev/null || echo none)" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" \
      "$(nproc)" "$STAGES_START"
    for i in "${!STAGE_NAMES[@]}"; do
      [ "$i" = 0 ] || printf ', '
      printf '{"name": "%s", "seconds": %d, "result": "%s"}' \
        "${STAGE_NAMES[$i]}" "${STAGE_SECONDS[$i]}" "${STAGE_RESULTS[$i]}"
    done
    printf ']}\n'
  } >"$REPORT_DIR/stages-$STAGES_START.json"
}

# count_tests STATUS: the results of cargo's test programs, added up: `N passed, N failed`. A run that failed
# without a failed test (a lint, a build) counts as one, so that this line alone shows the result.
count_tests() {
  cat "$STAGE_LOGS"/*.log 2>/dev/null | awk -v status="$1" '
    /^test result:/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "passed;") passed += $i; if ($(i + 1) == "failed;") failed += $i } }
    END { if (status != 0 && failed == 0) failed = 1; printf "%d passed, %d failed\n", passed, failed }'
}
