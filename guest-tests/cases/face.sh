# shellcheck shell=bash
# The daemon as a program: it explains itself, refuses what cannot work in one line, and creates nothing then.

# refuses TEXT ARG...: status not 0, one line on stderr that holds TEXT, no socket
_refuses() {
	local text=$1 rc=0 lines
	shift
	rm -f -- "$CASE_DIR/s"
	timeout 10 "$DAEMON" "$@" >"$CASE_DIR/out" 2>"$CASE_DIR/err" </dev/null || rc=$?
	printf '%s\n  status %d: %s\n' "$*" "$rc" "$(cat "$CASE_DIR/err")"
	((rc != 0 && rc != 124)) || broken "it takes $*"
	[[ ! -e $CASE_DIR/s ]] || broken "a socket is left of $*"
	lines=$(grep -c . "$CASE_DIR/err" || true)
	((lines >= 1 && lines <= 8)) || broken "$lines lines about $*"
	grep -qiE -- "$text" "$CASE_DIR/err" || broken "nothing about '$text' for $*: $(sed -n 1p "$CASE_DIR/err")"
}

refusals_case() {
	local s=$CASE_DIR/s name
	_refuses 'namespace' --socket-path "$s"
	_refuses 'size' --socket-path "$s" --namespace memory
	_refuses 'bytes|size' --socket-path "$s" --namespace memory,size=0
	_refuses 'size|large|memory' --socket-path "$s" --namespace memory,size=99999P
	_refuses 'block-size' --socket-path "$s" --namespace memory,size=1G,block-size=513
	_refuses 'no file' --socket-path "$s" --namespace "file,path=$CASE_DIR/none.img"
	_refuses 'bogus' --socket-path "$s" --namespace memory,size=1G,bogus=1
	_refuses 'directory|No such file|folder' --socket-path "$CASE_DIR/none/s" --namespace memory,size=1M
	_refuses '9999' --socket-path "$s" --namespace memory,size=1M --cores 9999
	printf '[[controller]]\nsocket-path = "%s"\nnamespaze = 1\n' "$s" >"$CASE_DIR/bad.toml"
	_refuses 'namespaze|line 3|:3' --config "$CASE_DIR/bad.toml"
	for name in one two; do
		printf '[[controller]]\nname = "%s"\nsocket-path = "%s"\n[[controller.namespace]]\nbackend = "null"\nsize = "1G"\n' "$name" "$s"
	done >"$CASE_DIR/twice.toml"
	_refuses 'socket' --config "$CASE_DIR/twice.toml"
	# a socket that somebody listens on is not taken away
	daemon_start "$CASE_DIR" "$CASE_DIR/used" -- --socket-path "$CASE_DIR/used" --namespace memory,size=1M
	_refuses 'use|listen' --socket-path "$CASE_DIR/used" --namespace memory,size=1M
	socket_listens "$CASE_DIR/used" || broken "the first daemon has lost its socket"
	daemon_fine
	[[ ! -e $CASE_DIR/used ]] || broken "the socket is left after a clean end"
}

conventions_case() {
	"$DAEMON" --help >"$CASE_DIR/help"
	grep -q -- '--namespace' "$CASE_DIR/help" || broken "--help says nothing of --namespace"
	"$DAEMON" --version | grep -qE '^vhost-user-nvme [0-9]' || broken "--version"
	"$DAEMON" --print-capabilities >"$CASE_DIR/capabilities"
	python3 -c 'import json, sys; assert json.load(sys.stdin)["type"]' <"$CASE_DIR/capabilities" || broken "--print-capabilities is no JSON with a type"
	# a daemon that was killed leaves its socket; the next one takes it over
	daemon_single "$CASE_DIR" --namespace memory,size=64M --log-format json
	grep -aq 'vhost-user-nvme,.*socket=' "$DAEMON_LOG" || broken "it does not say how QEMU attaches"
	kill -KILL "$DAEMON_PID"
	wait "$DAEMON_PID" || true
	[[ -S $NVME_SOCKET ]] || broken "the test needs the socket of a killed daemon"
	daemon_single "$CASE_DIR" --namespace memory,size=64M
	nvme_device "$NVME_SOCKET"
	guest_run vm --smp 1 -- "${DEVICE[@]}" -- "./running.sh --idle 1" ./dmesg-clean.sh
	daemon_fine
}

test_case daemon-refusals refusals_case
test_case daemon-conventions conventions_case
