#!/usr/bin/env bash
# build.sh: builds our programs with the `ci` profile, packs each as an image on one shared root, and puts
# those that pods use into the nodes of the running cluster. TAG names them; without it the tag is made from
# their content, so that a changed program is a changed pod template and a node never runs an older image
# under the same name. Prints sizes; the tag is kept in the file `tag` beside the archives.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/env.sh"

PROGRAMS=(operator gateway runtime serve)
IN_NODES=(operator gateway runtime)
STAGE=$IMAGE_STORE/stage
TARGET=${CARGO_TARGET_DIR:-$REPO_DIR/target}/ci
declare -A PORTS=([operator]="8080/tcp 9091/tcp" [gateway]="8080/tcp 9090/tcp" [runtime]="8080/tcp 9090/tcp" [serve]="8080/tcp 9090/tcp")

build_programs() {
  local program build=(build --workspace --bins)
  # `make test` has built the programs for its tests already. They differ in tokio's test clock only, which no
  # program pauses; building them again without it would take minutes.
  [ -z "${TRUSTFORMERS_TESTED_PROGRAMS:-}" ] || build=(test --workspace --no-run)
  (cd "$REPO_DIR" && cargo "${build[@]}" --locked --profile ci) >&2
  mkdir -p "$STAGE"
  for program in "${PROGRAMS[@]}"; do strip -s -o "$STAGE/trustformers-$program" "$TARGET/trustformers-$program"; done
}

pack_program() { # PROGRAM TAG
  local program=$1 port arguments=()
  for port in ${PORTS[$program]}; do arguments+=(--port "$port"); done
  # As in the Dockerfile: without a configuration, every model of a mounted folder is served.
  [ "$program" != serve ] || arguments+=(--workdir /models --cmd=--models --cmd=/models)
  python3 "$E2E_DIR/images/pack.py" --output "$IMAGE_STORE/trustformers-$program.tar" --tag "localhost/trustformers-$program:$2" \
    --root "$STAGE/root" --file "$STAGE/trustformers-$program:/usr/bin/trustformers-$program:755" \
    --user 65532:65532 --entrypoint "/usr/bin/trustformers-$program" "${arguments[@]}" \
    --label org.opencontainers.image.licenses=Apache-2.0 --label "org.opencontainers.image.title=trustformers-$program"
}

began=$SECONDS
mkdir -p "$IMAGE_STORE"
build_programs
python3 "$E2E_DIR/images/root.py" "$STAGE/root"
content=$({ cat "$E2E_DIR/images/pack.py" "$E2E_DIR/images/root.py"; cd "$STAGE" && sha256sum trustformers-*; } | sha256sum | cut -c1-12)
tag=${TAG:-dev-$content}
for program in "${PROGRAMS[@]}"; do pack_program "$program" "$tag"; done
echo "$tag" >"$IMAGE_STORE/tag"
archives=()
for program in "${IN_NODES[@]}"; do archives+=("$IMAGE_STORE/trustformers-$program.tar"); done
"$CLUSTER_SRC/load-images.sh" "${archives[@]}"
say "images have the tag $tag ($((SECONDS - began)) s)"
