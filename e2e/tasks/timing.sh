# Steps of the demo: a line before each, and a table of their times at the end. Sourced.

STEP_NAMES=() STEP_SECONDS=()

# step TITLE COMMAND...
step() {
  local title=$1 began=$SECONDS
  shift
  say "$title ..."
  "$@"
  STEP_NAMES+=("$title") STEP_SECONDS+=($((SECONDS - began)))
}

print_steps() {
  local i
  for i in "${!STEP_NAMES[@]}"; do printf '  %5d s  %s\n' "${STEP_SECONDS[$i]}" "${STEP_NAMES[$i]}"; done
}
