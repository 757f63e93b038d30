# How daemons of the cluster are started, recognised and ended. Sourced.
#
# A process is identified by its number *and* its start time, so that after a crash or a reboot a number that
# now belongs to another program is never signalled. Every daemon also lives in a cgroup of the cluster: a
# process without a record (a crash between fork and write, a container's process, a shim) is found there.

# The hierarchy whose cgroup.procs files say which processes are ours: cgroup v2, or v1's pids controller.
tracking_root() {
  if [ -f /sys/fs/cgroup/cgroup.controllers ]; then echo "/sys/fs/cgroup/$CGROUP"; else echo "/sys/fs/cgroup/pids/$CGROUP"; fi
}

# Field 22 of /proc/PID/stat, counted after the last ')', because a program's name may hold blanks. A zombie
# (its parent does not collect it) counts as gone.
start_time_of() {
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra fields <<<"${stat##*) }"
  [ "${fields[0]}" != Z ] && echo "${fields[19]}"
}

# alive NAME: true if the recorded process of that name still runs.
alive() {
  local pid began
  read -r pid began 2>/dev/null <"$STATE/run/$1.pid" || return 1
  [ "$(start_time_of "$pid")" = "$began" ]
}

# True if the cluster of the state folder runs: complete, since this boot, and with every daemon alive. The
# folder alone proves nothing: it outlives a reboot and a kill.
cluster_runs() {
  local record name
  [ "$(cat "$STATE/boot" 2>/dev/null)" = "$(cat /proc/sys/kernel/random/boot_id)" ] && [ -f "$STATE/complete" ] || return 1
  for record in "$STATE"/run/*.pid; do
    name=$(basename "$record" .pid)
    alive "$name" || { say "$name has died"; return 1; }
  done
}

# start NAME COMMAND...: runs a daemon in the background with its output in log/NAME.log. `setsid` does not
# fork here, so $! is the daemon itself; Ctrl-C in the terminal does not reach it.
start() {
  local name=$1 pid
  shift
  alive "$name" && return 0
  mkdir -p "$STATE/log" "$STATE/run" "$(tracking_root)/system"
  (
    echo "$BASHPID" >"$(tracking_root)/system/cgroup.procs"
    exec 9>&- 8>&-
    exec setsid "$@"
  ) >>"$STATE/log/$name.log" 2>&1 </dev/null &
  pid=$!
  echo "$pid $(start_time_of "$pid")" >"$STATE/run/$name.pid"
  disown "$pid"
}

# stop LIMIT_S NAME...: SIGTERM to all, then SIGKILL to those that are still there after LIMIT_S seconds.
stop() {
  local limit_s=$1 name pid end any
  shift
  for name in "$@"; do
    alive "$name" && read -r pid _ <"$STATE/run/$name.pid" && kill -TERM "$pid" 2>/dev/null || true
  done
  end=$((SECONDS + limit_s))
  while :; do
    any=
    for name in "$@"; do if alive "$name"; then any=1; fi; done
    [ -n "$any" ] && [ $SECONDS -lt $end ] || break
    sleep 0.1
  done
  for name in "$@"; do
    if alive "$name"; then read -r pid _ <"$STATE/run/$name.pid" && kill -KILL "$pid" 2>/dev/null || true; fi
    rm -f "$STATE/run/$name.pid"
  done
}

# Every process in our cgroup subtree, this script excepted.
our_processes() {
  find "$(tracking_root)" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -un | awk -v self=$$ '$1 != self && $1 != 0'
}

kill_remaining() {
  local pids
  # Containers can fork while they are being listed, hence the rounds.
  for _ in $(seq 50); do
    mapfile -t pids < <(our_processes)
    [ ${#pids[@]} != 0 ] || return 0
    kill -KILL "${pids[@]}" 2>/dev/null || true
    sleep 0.1
  done
  fail "processes survive SIGKILL: ${pids[*]}" "they probably wait for a disk or network file system"
}
