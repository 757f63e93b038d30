#!/usr/bin/env bash
# older.sh: builds trustformers-serve of an older commit, with which bench-cpu compares this one, and prints
# the program. As long as a build of this one takes the first time, nothing afterwards.
#   BENCH_OLDER=2f5cf43   the commit; it must be in the history of this repository
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

PEERS=$CACHE/peers
# The objectives of the rows are ratios to this version.
OLDER=${BENCH_OLDER:-2f5cf43b650963d6fc339ff5ddf352fbafe73ecc}

cd "$REPO_DIR"
commit=$(git rev-parse --verify --quiet "$OLDER^{commit}") ||
  fail "the history of this repository has no commit $OLDER" "of a shallow clone, get the rest: git fetch --unshallow"
folder=$PEERS/trustformers-serve-${commit:0:12}
mkdir -p "$PEERS"
exec 8>"$PEERS/older.lock"
flock 8
if [ ! -x "$folder/trustformers-serve" ]; then
  work=$folder.part
  rm -rf "$work"
  mkdir -p "$work/source" "$work/bin"
  say "building trustformers-serve of ${commit:0:12} ..."
  git archive "$commit" | tar -x -C "$work/source"
  (
    cd "$work/source" &&
      CARGO_TARGET_DIR=$work/target cargo build --locked --profile ci -p trustformers-serve --bin trustformers-serve
  ) >"$PEERS/older.log" 2>&1 || fail "the older version could not be built" "log: $PEERS/older.log"
  cp "$work/target/ci/trustformers-serve" "$work/bin/"
  rm -rf "$folder"
  mv "$work/bin" "$folder"
  rm -rf "$work"
fi
echo "$folder/trustformers-serve"
