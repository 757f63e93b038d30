#!/usr/bin/env bash
# llama-cpp.sh: gets llama.cpp's source, builds its server and its benchmark for this processor, and prints the folder
# of the programs. About ten minutes on two cores the first time, nothing afterwards.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

PINS=$E2E_DIR/bench/llama-cpp.txt
PEERS=$CACHE/peers

# GCC 12 places stores behind the load of AMX's tile configuration, and what it builds for AMX ends with SIGSEGV or
# SIGILL at the first matrix. So AMX is built by clang or not at all; the table says which it was.
compiler() {
  if command -v clang-16 clang++-16 >/dev/null; then
    echo clang-16 clang++-16
  elif command -v clang clang++ >/dev/null && [ "$(clang -dumpversion | cut -d. -f1)" -ge 16 ]; then
    echo clang clang++
  else
    echo cc c++
  fi
}
has_amx() { awk '/^flags/ && / amx_tile / { found = 1 } END { exit !found }' /proc/cpuinfo; }

read -r cc cxx <<<"$(compiler)"
flags=(-DGGML_NATIVE=ON)
kind=native
if has_amx && [ "$cc" = cc ]; then
  kind="avx512-without-amx"
  flags=(-DGGML_NATIVE=OFF)
  for set in SSE42 AVX AVX2 BMI2 FMA F16C AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16; do flags+=("-DGGML_$set=ON"); done
  say "this processor has AMX, but there is no clang 16: llama.cpp is built without AMX and slower than it could be"
fi

# The compiler, the processor's flags and the pins decide what comes out.
key=$({ cat "$PINS"; "$cc" --version | head -1; echo "$kind"; awk '/^flags/ { print; exit }' /proc/cpuinfo; } | sha256sum | cut -c1-12)
folder=$PEERS/llama.cpp-$key
mkdir -p "$PEERS"
exec 8>"$PEERS/llama.cpp.lock"
flock 8
if [ ! -x "$folder/bin/llama-server" ]; then
  command -v cmake >/dev/null || fail "cmake is missing" "Debian: apt-get install cmake ninja-build g++"
  work=$folder.part
  rm -rf "$work"
  mkdir -p "$work/source"
  say "getting llama.cpp ..."
  # Downloading a source package asks its build script for its name and dependencies; nothing of it is installed.
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    --require-hashes -r "$PINS" -d "$work" >&2 || fail "pip could not download llama.cpp's source" "pins: $PINS"
  tar -xzf "$work"/*.tar.gz -C "$work/source" --strip-components=1
  rm "$work"/*.tar.gz
  generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  say "building llama.cpp with $cc ($kind) ..."
  {
    cmake -S "$work/source/vendor/llama.cpp" -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
      "-DCMAKE_C_COMPILER=$cc" "-DCMAKE_CXX_COMPILER=$cxx" "${flags[@]}" -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
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
