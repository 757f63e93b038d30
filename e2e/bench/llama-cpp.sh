#!/usr/bin/env bash
# llama-cpp.sh: gets llama.cpp's source, builds its server and its benchmark for this processor, and prints
# the folder of the programs. About ten minutes on two cores the first time, nothing afterwards.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

PINS=$E2E_DIR/bench/llama-cpp.txt
PEERS=$CACHE/peers

has_amx() { awk '/^flags/ && / amx_tile / { found = 1 } END { exit !found }' /proc/cpuinfo; }

# clang_16: prints a C and a C++ compiler of clang 16 or newer, if this machine has them.
clang_16() {
  local version
  for version in 16 17 18 19 20 21; do
    if command -v "clang-$version" "clang++-$version" >/dev/null; then echo "clang-$version clang++-$version"; return; fi
  done
  if command -v clang clang++ >/dev/null && [ "$(clang -dumpversion | cut -d. -f1)" -ge 16 ]; then echo clang clang++; fi
}

# GCC 12 places stores behind the load of AMX's tile configuration, and what it builds for AMX ends with
# SIGSEGV or SIGILL at the first matrix. So on a processor with AMX clang builds, and it is installed where it
# is missing: a peer without AMX would be no fair one.
compiler() {
  local found
  found=$(clang_16)
  if [ -z "$found" ] && has_amx; then
    [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ] ||
      fail "llama.cpp needs clang 16 or newer for this processor's AMX" "Debian: sudo apt-get install clang-16"
    say "installing clang 16, which builds llama.cpp for AMX ..."
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends clang-16; } >&2 ||
      fail "apt-get could not install clang-16" "any clang from 16 on the path is used"
    found=$(clang_16)
  fi
  echo "${found:-cc c++}"
}

compilers=$(compiler)
read -r cc cxx <<<"$compilers"
kind=native
if has_amx; then kind=native-with-amx; fi

# The compiler, the processor's flags and the pins decide what comes out.
key=$({ cat "$PINS"; "$cc" --version | head -1; echo "$kind"; awk '/^flags/ { print; exit }' /proc/cpuinfo; } | sha256sum | cut -c1-12)
folder=$PEERS/llama.cpp-$key
mkdir -p "$PEERS"
exec 8>"$PEERS/llama.cpp.lock"
flock 8
if [ ! -x "$folder/bin/llama-server" ]; then
  if ! command -v cmake >/dev/null; then
    [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ] || fail "cmake is missing" "Debian: sudo apt-get install cmake ninja-build g++"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends cmake ninja-build g++; } >&2 ||
      fail "apt-get could not install cmake, ninja-build and g++"
  fi
  work=$folder.part
  rm -rf "$work"
  mkdir -p "$work/source"
  say "getting llama.cpp ..."
  # Downloading a source package asks its build script for its name and dependencies; nothing of it is
  # installed.
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    --require-hashes -r "$PINS" -d "$work" >&2 || fail "pip could not download llama.cpp's source" "pins: $PINS"
  tar -xzf "$work"/*.tar.gz -C "$work/source" --strip-components=1
  rm "$work"/*.tar.gz
  generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  say "building llama.cpp with $cc ($kind) ..."
  {
    cmake -S "$work/source/vendor/llama.cpp" -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
      "-DCMAKE_C_COMPILER=$cc" "-DCMAKE_CXX_COMPILER=$cxx" -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
      -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build "$work/build" -j 2 --target llama-bench llama-server
  } >"$PEERS/llama.cpp.log" 2>&1 || fail "llama.cpp could not be built" "log: $PEERS/llama.cpp.log"
  mkdir -p "$work/bin"
  cp "$work"/build/bin/llama-{bench,server} "$work/bin/"
  echo "$kind, $("$cc" --version | head -1)" >"$work/bin/how.txt"
  rm -rf "$work/build" "$work/source" "$folder"
  mv "$work" "$folder"
fi
echo "$folder/bin"
