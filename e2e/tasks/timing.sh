# Parts of the demo: a line before each, and a table of what each took at the end. Sourced.
# shellcheck shell=bash

PART_NAMES=() PART_SECONDS=()

# part TITLE COMMAND...
part() {
  local title=$1 began=$SECONDS
  shift
  say "$title ..."
  "$@"
  PART_NAMES+=("$title") PART_SECONDS+=($((SECONDS - began)))
}

print_parts() {
  local i
  for i in "${!PART_NAMES[@]}"; do printf '  %5d s  %s\n' "${PART_SECONDS[$i]}" "${PART_NAMES[$i]}"; done
}
