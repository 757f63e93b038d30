#!/usr/bin/env bash
# suites.sh [SUITE...]: test suites of other projects against trustformers-serve, which it starts and ends.
# Without a name: every suite whose source is there. docs/clients.md says what differs and why.
#   openapi        schemathesis over /openapi.json: no answer is a 5xx or undocumented
#   llama.cpp      the tests of llama.cpp's server that apply; their source comes from a package
#   schemas        jsonschemabench's cases; needs no server
#   openresponses  the compliance tests of Open Responses that apply
# SUITES names a folder with copies of the repositories guidance-ai/jsonschemabench and
# openresponses/openresponses, each under its name. SECONDS_OF_FUZZING (default 600) bounds schemathesis.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"
source "$E2E_DIR/clients/server.sh"

SOURCE=$E2E_DIR/clients
REPOSITORIES=${SUITES:-$CACHE/clients/suites}
# Those that ask for what this server has: one WebSocket for all requests, no store of answers, texts only.
RESPONSES_TESTS=basic-response,streaming-response,system-prompt,tool-calling,multi-turn
LLAMA_CPP_TESTS=(unit/test_{chat_completion,tool_call,compat_anthropic,compat_oai_responses,embedding}.py
  unit/test_completion.py::test_completion_{with,stream_with}_openai_library
  unit/test_completion.py::test_completion_stream_with_openai_library_stops)

has_schemas() { [ -d "$REPOSITORIES/jsonschemabench/maskbench/data" ]; }
has_openresponses() { [ -f "$REPOSITORIES/openresponses/bin/compliance-test.ts" ]; }

# llama_cpp_tests: prints the folder of llama.cpp's tests of its server, out of the pinned source package.
llama_cpp_tests() {
  local pins=$E2E_DIR/bench/llama-cpp.txt folder work
  folder=$CACHE/clients/llama.cpp-$(sha256sum "$pins" | cut -c1-12)
  if [ ! -f "$folder/complete" ]; then
    say "getting llama.cpp's tests ..."
    work=$folder.part
    rm -rf "$work" "$folder"
    mkdir -p "$work"
    # Downloading a source package asks its build script for its name; nothing of it is installed.
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
      --require-hashes -r "$pins" -d "$work" >&2 || fail "pip could not download llama.cpp's source" "pins: $pins"
    tar -xzf "$work"/*.tar.gz -C "$work" --wildcards --strip-components=6 '*/vendor/llama.cpp/tools/server/tests/*'
    rm "$work"/*.tar.gz
    mv "$work" "$folder"
    touch "$folder/complete"
  fi
  echo "$folder"
}

# Its hooks are python/schemathesis_hooks.py.
suite_openapi() {
  # It keeps its records in the working directory. A model that is unloaded would be missing afterwards.
  cd "$CACHE/clients"
  PYTHONPATH=$SOURCE/python SCHEMATHESIS_HOOKS=schemathesis_hooks "$suites/schemathesis" run "$SERVER_URL/openapi.json" \
    --exclude-path /v1/models/unload --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance \
    --phases examples,coverage,fuzzing --mode all --max-examples "${MAX_EXAMPLES:-40}" --max-time "${SECONDS_OF_FUZZING:-600}" \
    --request-timeout 60 --suppress-health-check all --warnings off --continue-on-failure --no-color --seed 1
}

# python/llama_cpp_suite.py says which cases do not apply, and why.
suite_llama.cpp() {
  local tests port
  tests=$(llama_cpp_tests)
  port=$(free_ports 1)
  (cd "$tests" && DEBUG_EXTERNAL=1 PORT=$port PYTHONPATH=$SOURCE/python:$tests PYTHONDONTWRITEBYTECODE=1 \
    TRUSTFORMERS_URL=$SERVER_URL TRUSTFORMERS_MODEL=$SERVER_MODEL TRUSTFORMERS_EMBED_MODEL=$SERVER_EMBED_MODEL \
    "$suites/python" -m pytest -p llama_cpp_suite -p no:cacheprovider -q -rxX --tb=short "${LLAMA_CPP_TESTS[@]}")
}

suite_openresponses() {
  local bundle
  has_openresponses || fail "SUITES holds no copy of openresponses/openresponses" "looked for: $REPOSITORIES/openresponses"
  bundle=$CACHE/clients/openresponses.mjs
  NODE_PATH=${folders[1]}/node_modules "${folders[2]}/node" "${folders[1]}/node_modules/esbuild/bin/esbuild" --log-level=warning \
    "$REPOSITORIES/openresponses/bin/compliance-test.ts" --bundle --platform=node --format=esm --alias:zod=zod/v3 "--outfile=$bundle"
  "${folders[2]}/node" "$bundle" --base-url "$SERVER_URL/v1" --api-key none --model "$SERVER_MODEL" --filter $RESPONSES_TESTS
}

suite_schemas() {
  has_schemas || fail "SUITES holds no copy of guidance-ai/jsonschemabench" "looked for: $REPOSITORIES/jsonschemabench"
  (cd "$REPO_DIR" && MASKBENCH=$REPOSITORIES/jsonschemabench/maskbench/data \
    cargo test --locked --profile ci --workspace --lib --exclude trustformers-operator maskbench -- --nocapture)
}

if [ $# = 0 ]; then
  set -- openapi llama.cpp
  ! has_openresponses || set -- "$@" openresponses
  ! has_schemas || set -- "$@" schemas
fi
for suite in "$@"; do
  declare -F "suite_$suite" >/dev/null || fail "there is no suite $suite" "suites: openapi llama.cpp schemas openresponses"
done
suites=$("$SOURCE/environment.sh" suites)
mapfile -t folders < <("$SOURCE/environment.sh")
if [ "$*" != schemas ]; then
  "$E2E_DIR/models/fetch.sh" qwen-0.5b minilm
  start_server
fi
failed=()
for suite in "$@"; do
  say "suite $suite ..."
  set +e
  (set -e; "suite_$suite")
  status=$?
  set -e
  [ $status = 0 ] || failed+=("$suite")
done
[ ${#failed[@]} = 0 ] || fail "suites that failed: ${failed[*]}" "server's log: $CACHE/clients/server/log"
echo "suites passed: $*"
