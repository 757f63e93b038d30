# Rungs: named parts of a long run, each timed, its output shown and kept. Sourced.
# shellcheck shell=bash

RUNG_LOGS=$REPORT_DIR/rungs
RUNG_NAMES=() RUNG_SECONDS=() RUNG_RESULTS=()

begin_rungs() { rm -rf "$RUNG_LOGS"; mkdir -p "$RUNG_LOGS"; }

# rung NAME COMMAND...: ends the whole run when the command fails, because what follows needs it.
rung() {
  local name=$1 began=$SECONDS result=ok status
  shift
  printf '\n=== %s\n' "$name"
  # Not in an `if`: there, bash would ignore failures inside the functions that are called. The status is the command's,
  # not tee's.
  set +e
  (set -e; "$@") 2>&1 | tee "$RUNG_LOGS/$name.log"
  status=${PIPESTATUS[0]}
  set -e
  [ "$status" = 0 ] || result=failed
  RUNG_NAMES+=("$name") RUNG_SECONDS+=($((SECONDS - began))) RUNG_RESULTS+=("$result")
  [ $result = ok ] || { echo "=== $name failed (log: $RUNG_LOGS/$name.log)"; exit 1; }
}

# The table at the end, and the same as JSON for `make report`.
end_rungs() {
  local i total=0
  printf '\n%-12s %8s\n' rung seconds
  for i in "${!RUNG_NAMES[@]}"; do
    printf '%-12s %8d  %s\n' "${RUNG_NAMES[$i]}" "${RUNG_SECONDS[$i]}" "${RUNG_RESULTS[$i]}"
    total=$((total + RUNG_SECONDS[i]))
  done
  printf '%-12s %8d\n' sum $total
  {
    printf '{"commit": "%s", "time": "%s", "cores": %d, "rungs": [' \
      "$(git -C "$REPO_DIR" rev-parse --short HEAD 2>/dev/null || echo none)" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(nproc)"
    for i in "${!RUNG_NAMES[@]}"; do
      [ "$i" = 0 ] || printf ', '
      printf '{"name": "%s", "seconds": %d, "result": "%s"}' "${RUNG_NAMES[$i]}" "${RUNG_SECONDS[$i]}" "${RUNG_RESULTS[$i]}"
    done
    printf ']}\n'
  } >"$REPORT_DIR/rungs.json"
}

# count_tests STATUS: what cargo's test programs said, added up: `N passed, N failed`. A run that failed without a failed
# test (a lint, a build) counts as one, so that this line alone tells how it went.
count_tests() {
  cat "$RUNG_LOGS"/*.log 2>/dev/null | awk -v status="$1" '
    /^test result:/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "passed;") passed += $i; if ($(i + 1) == "failed;") failed += $i } }
    END { if (status != 0 && failed == 0) failed = 1; printf "%d passed, %d failed\n", passed, failed }'
}
