# shellcheck shell=bash
# daemon.sh - starts the daemon for a script, ends it by its pid, looks at what it costs. Needs common.sh; DAEMON is the program.
#
#   daemon_start DIR ARG...       runs it with its log in DIR/daemon.log; DAEMON_PID. Waits until every --wait socket listens
#   daemon_single DIR ARG...      the same with --socket-path DIR/nvme.sock: NVME_SOCKET; speaks NVME_TRANSPORT if that is set
#   daemon_again                  SIGKILL, and the same again at once, without waiting for anything
#   daemon_upgrade                has it hand over to a new process of the same program; status 1 and why not, if it does not
#   daemon_stop                   SIGTERM; status 1 if it does not end by itself with status 0 within 10 s
#   daemon_runs                   status 0 while it runs
#   process_cpu_us PID            CPU time of all its threads so far, in microseconds
#   process_own_memory PID        resident KiB that are not shared memory of 1 MiB and more (the guest's, a namespace's)
#   socket_listens PATH           status 0 when somebody listens
# shellcheck disable=SC2034 # the results are for the scripts that source this

DAEMON_PID='' DAEMON_LOG='' NVME_SOCKET='' _daemon_arguments=() _daemon_state=''

daemon_single() {
	local dir=$1
	shift
	NVME_SOCKET=$dir/nvme.sock
	daemon_start "$dir" "$NVME_SOCKET" -- ${NVME_TRANSPORT:+--transport "$NVME_TRANSPORT"} --socket-path "$NVME_SOCKET" "$@"
}

# daemon_start DIR SOCKET... -- ARG...
daemon_start() {
	local dir=$1 sockets=() socket end
	shift
	while [[ $1 != -- ]]; do
		sockets+=("$1")
		shift
	done
	shift
	mkdir -p -- "$dir"
	DAEMON_LOG=$dir/daemon.log
	_daemon_arguments=("$@")
	# What it keeps goes with the directory, however it ends.
	_daemon_state=$dir/state
	_daemon_spawn
	end=$(($(now_us) + 20000000))
	for socket in "${sockets[@]}"; do
		until socket_listens "$socket"; do
			if ! daemon_runs; then
				tail -n 10 -- "$DAEMON_LOG" >&2
				fail "the daemon ended at its start: $(tail -n 1 -- "$DAEMON_LOG")"
			fi
			(($(now_us) < end)) || fail "the daemon does not listen on $socket after 20 s"
			sleep 0.05
		done
	done
}

_daemon_spawn() {
	RUNTIME_DIRECTORY=$_daemon_state "$DAEMON" "${_daemon_arguments[@]}" >>"$DAEMON_LOG" 2>&1 </dev/null &
	DAEMON_PID=$!
	on_exit _daemon_end "$DAEMON_PID"
}

daemon_again() {
	kill -KILL "$DAEMON_PID"
	# the shell says what became of it
	wait "$DAEMON_PID" 2>/dev/null || true
	_forget_exit _daemon_end "$DAEMON_PID"
	_daemon_spawn
}

daemon_upgrade() {
	local old=$DAEMON_PID said rc=0
	said=$("$DAEMON" upgrade --pid "$old" 2>&1) || rc=1
	echo "$said"
	if ((rc)) || [[ ! $said =~ to\ process\ ([0-9]+) ]]; then return 1; fi
	DAEMON_PID=${BASH_REMATCH[1]}
	on_exit _daemon_end "$DAEMON_PID"
	_forget_exit _daemon_end "$old"
	# The first is a child of this shell, the others are not.
	wait "$old" 2>/dev/null || rc=$?
	((rc == 0 || rc == 127)) || echo "the old process ended with status $rc"
	((rc == 0 || rc == 127))
}

# Asked from the kernel's table: a connection of our own would be one that the daemon has to serve.
socket_listens() { awk -v path="$1" '$8 == path && $4 == "00010000" {found = 1} END {exit !found}' /proc/net/unix; }

daemon_runs() { kill -0 "$DAEMON_PID" 2>/dev/null && [[ $(_process_state "$DAEMON_PID") != Z ]]; }
_process_state() { sed -E 's/^.*\) (.).*/\1/' "/proc/$1/stat" 2>/dev/null || echo X; }

daemon_stop() {
	local pid=$DAEMON_PID i rc=0
	[[ -n $pid ]] || return 0
	DAEMON_PID=
	kill -TERM "$pid" 2>/dev/null || true
	for ((i = 0; i < 100; i++)); do
		if ! kill -0 "$pid" 2>/dev/null || [[ $(_process_state "$pid") == Z ]]; then break; fi
		sleep 0.1
	done
	if ((i == 100)); then
		warn "the daemon does not end within 10 s of SIGTERM"
		kill -KILL "$pid" 2>/dev/null || true
	fi
	wait "$pid" 2>/dev/null || rc=$?
	# No child of this shell, since another process handed over to it: its log tells how it ended.
	if ((rc == 127 && i < 100)) && tail -n 3 -- "$DAEMON_LOG" | grep -q 'stopped'; then rc=0; fi
	_forget_exit _daemon_end "$pid"
	((rc == 0)) || warn "the daemon ended with status $rc"
	return $((rc != 0))
}

# At exit: politely, then not.
_daemon_end() {
	local i
	kill -TERM "$1" 2>/dev/null || return 0
	for ((i = 0; i < 30; i++)); do
		kill -0 "$1" 2>/dev/null || break
		[[ $(_process_state "$1") != Z ]] || break
		sleep 0.1
	done
	kill -KILL "$1" 2>/dev/null || true
	wait "$1" 2>/dev/null || true
}

# From the scheduler, in nanoseconds: the clock ticks of /proc/PID/stat are too coarse for what sleeps.
process_cpu_us() { awk '{sum += $1} END {printf "%d\n", sum / 1000}' /proc/"$1"/task/*/schedstat; }

# What is counted apart: mappings of shared files (memfd, hugetlbfs, /dev/shm) of 1 MiB and more. Those are guests' memory
# and memory namespaces; doorbell windows, rings and everything private stay in the sum.
process_own_memory() {
	awk '
		/^[0-9a-f]+-[0-9a-f]+ / {
			shared = substr($2, 4, 1) == "s"
		}
		/^Size:/ { large = $2 >= 1024 }
		/^Rss:/ && !(shared && large) { sum += $2 }
		END { print sum + 0 }' "/proc/$1/smaps"
}
