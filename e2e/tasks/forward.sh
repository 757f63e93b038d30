# The port-forward of a demo on another cluster. It outlives the demo: the printed curl line works. Sourced.

FORWARD_RECORD=$CACHE/demo-forward
FORWARD_ADDRESS=http://127.0.0.1:18080

source "$CLUSTER_SRC/process.sh"

start_forward() {
  local pid
  stop_forward
  setsid kubectl -n "$SYSTEM_NAMESPACE" port-forward service/trustformers-gateway 18080:8080 >"$FORWARD_RECORD.log" 2>&1 </dev/null &
  pid=$!
  echo "$pid $(start_time_of "$pid")" >"$FORWARD_RECORD"
  wait_until 15 "a forwarded port (see $FORWARD_RECORD.log)" curl -sf --noproxy '*' "$FORWARD_ADDRESS/health/live"
}

stop_forward() {
  local pid began
  read -r pid began 2>/dev/null <"$FORWARD_RECORD" || return 0
  if [ "$(start_time_of "$pid")" = "$began" ]; then kill "$pid" || true; fi
  rm -f "$FORWARD_RECORD" "$FORWARD_RECORD.log"
}
