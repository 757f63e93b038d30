# One line PASS or FAIL for each check of a client. Sourced.

failed=0

# check CLIENT WHAT FUNCTION [FILE]: runs a check, which fails with its first failing command. Not in an `if`:
# there, bash would ignore failures inside the function. A failure also shows the beginning of FILE.
check() {
  local found status
  set +e
  found=$(
    set -e
    "$3" 2>&1
  )
  status=$?
  set -e
  if [ $status = 0 ]; then
    echo "PASS $1: $2"
  else
    echo "FAIL $1: $2: $(tr '\n' ' ' <<<"$found" | cut -c1-400) $(head -c 300 "${4:-/dev/null}" | tr '\n' ' ')"
    failed=1
  fi
}
