# shellcheck shell=bash
# bench_host.sh - `scripts/bench host`: a polled guest against a daemon in its own process, both pinned. Sourced by scripts/bench.

seconds=2 rounds=3 out='' filter='' json='' against='' idle=poll,adaptive buffers=256 client_core='' poller_core='' parts=()

bench_host_usage() {
	cat <<-USAGE
		usage: scripts/bench host [PART...] [--json FILE] [--out DIR] [--seconds S] [--rounds N] [--only REGEX] [--against REV]
		                          [--idle POLICY,...] [--buffers MIB] [--client-core N] [--poller-core N]

		A polled guest (polled-guest, one thread) against the daemon (a process of its own, one poller), each on a core of its own.

		  table   commands per second and their times: null, memory and a file on tmpfs at depth 1, 32 and 128, in rounds by turns
		          over rows, policies and builds: Markdown, JSON, two plots (the default)
		  idle    what 1 and 16 connected idle controllers cost in 30 s (adaptive) over each transport, and how long a command takes
		          that wakes the poller
		  fair    8 guests of depth 32 on one poller; a guest of depth 1 alone and beside one of depth 128
		  strace  system calls of a poller under load (poll; null and memory): needs strace
		  transports   the same reads over vhost-user and vfio-user, by turns: the way of a command is the same
		  all     all of these

		  --json FILE         the table's rows as JSON, one object each: transport, namespace, operation, block_size, depth, iops,
		                      avg_ns, p50_ns, p99_ns, p999_ns, medians of the rounds; spread and more
		  --out DIR           where reports and plots go (default: target/bench/<time>)
		  --seconds S         length of each run (default: $seconds)
		  --rounds N          rounds (default: $rounds); medians are of the rounds, spread is (max - min) / median
		  --only REGEX        only the rows whose name matches: namespace-operation-size-depth, such as null-randread-4k-1
		  --against REV       also builds that commit, and measures both by turns
		  --idle POLICY,...   poll, adaptive, interrupt; more than one are measured by turns (default: $idle; the first alone
		                      with --against)
		  --buffers MIB       guest memory the data goes to and comes from (default: $buffers); 0: a buffer for each command
		  --client-core N     core of the guest, and of the poller (default: 0 and 1; with more than four cores the last two
		  --poller-core N     that are no siblings)

		Huge pages are reserved for the time of the run if we may. On a shared machine runs that others disturb are done again.
	USAGE
}

while (($#)); do
	case $1 in
	--help | -h) bench_host_usage && exit 0 ;;
	table | idle | fair | strace | transports) parts+=("$1") ;;
	all) parts+=(table idle fair strace transports) ;;
	--out | --seconds | --rounds | --only | --json | --against | --idle | --buffers | --client-core | --poller-core)
		(($# > 1)) || fail "$1 needs a value"
		case $1 in
		--out) out=$2 ;;
		--seconds) seconds=$2 ;;
		--rounds) rounds=$2 ;;
		--only) filter=$2 ;;
		--json) json=$2 ;;
		--against) against=$2 ;;
		--idle) idle=$2 ;;
		--buffers) buffers=$2 ;;
		--client-core) client_core=$2 ;;
		--poller-core) poller_core=$2 ;;
		esac
		shift
		;;
	*) fail "unknown argument '$1' (try --help)" ;;
	esac
	shift
done
((${#parts[@]})) || parts=(table)
[[ $seconds =~ ^[0-9]{1,3}([.][0-9]+)?$ && $rounds =~ ^[1-9][0-9]?$ ]] || fail "--seconds and --rounds take small numbers"
[[ $buffers =~ ^[0-9]{1,5}$ ]] || fail "--buffers takes a number of MiB"
IFS=, read -ra policies <<<"$idle"
for policy in "${policies[@]}"; do
	case $policy in poll | adaptive | interrupt) ;; *) fail "unknown policy '$policy' (there are: poll, adaptive, interrupt)" ;; esac
done
((${#policies[@]})) || fail "--idle needs a policy"
if [[ -n $against ]]; then
	against=$(git rev-parse --verify --quiet "$against^{commit}") || fail "there is no such commit"
	policies=("${policies[0]}")
fi
[[ -z $json ]] || { : >"$json" && json=$(realpath -- "$json"); } || fail "cannot write '$json'"
[[ -n $out ]] || out=$(cargo_target)/bench/$(date -u +%Y%m%d-%H%M%S)
mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)

# ---------------------------------------------------------------- cores

# Cores we may run on, one of each pair of siblings.
bench_cores() {
	local list part core
	list=$(sed -nE 's/^Cpus_allowed_list:\s*//p' /proc/self/status)
	for part in ${list//,/ }; do
		for ((core = ${part%-*}; core <= ${part#*-}; core++)); do
			[[ $(sed -E 's/[-,].*//' "/sys/devices/system/cpu/cpu$core/topology/thread_siblings_list" 2>/dev/null || echo "$core") != "$core" ]] ||
				echo "$core"
		done
	done
}
mapfile -t cores < <(bench_cores)
n=${#cores[@]}
((n >= 1)) || cores=(0)
if ((n > 4)); then
	client_core=${client_core:-${cores[n - 2]}} poller_core=${poller_core:-${cores[n - 1]}}
else
	client_core=${client_core:-${cores[0]}} poller_core=${poller_core:-${cores[1]:-${cores[0]}}}
fi
[[ $client_core =~ ^[0-9]+$ && $poller_core =~ ^[0-9]+$ ]] || fail "a core is a number"
[[ $client_core != "$poller_core" ]] || warn "guest and poller share core $client_core: the figures say little"

# ---------------------------------------------------------------- programs

dir='' shm=''
temp_dir dir
rust_toolchain
# bench_build TARGET ARG...: a release build
bench_build() {
	local target=$1 log=$out/build.log
	shift
	logged "$log" cargo build --release --locked --target-dir "$target" "$@" || fail "it does not build: see $log"
	rm -f -- "$log"
}
step "daemon and guest (release build)"
bench_build "$(cargo_target)" -p vhost-user-nvme -p bench
daemons=("$(cargo_target)/release/vhost-user-nvme") labels=('')
guest=$(cargo_target)/release/polled-guest
ok
if [[ -n $against ]]; then
	step "daemon of ${against:0:12}"
	git worktree add --quiet --detach "$dir/tree" "$against"
	on_exit git worktree remove --force "$dir/tree"
	bench_build "$(cargo_target)/against" --manifest-path "$dir/tree/Cargo.toml" -p vhost-user-nvme
	# The other one first: it is what this one is compared with.
	cp -- "$(cargo_target)/against/release/vhost-user-nvme" "$dir/vhost-user-nvme"
	daemons=("$dir/vhost-user-nvme" "${daemons[0]}")
	labels=("${against:0:12}" 'this')
	ok
fi

# What we measure goes before what others do here, if we may.
favoured=(nice -n 0)
if ((EUID == 0)); then favoured=(nice -n -20); fi

# Two of these at a time would measure each other.
exec {bench_lock}>"${TMPDIR:-/tmp}/vhost-user-nvme-bench.lock"
if ! flock -n "$bench_lock"; then
	info "another run measures: waiting for it"
	flock "$bench_lock"
fi

# ---------------------------------------------------------------- memory

# bench_huge_pages MIB: that much is free, or as much as can be; given back at exit.
huge=/sys/kernel/mm/hugepages/hugepages-2048kB
bench_huge_pages() {
	local before now free
	[[ -w $huge/nr_hugepages ]] || return 0
	before=$(<"$huge/nr_hugepages") free=$(<"$huge/free_hugepages")
	((free < $1 / 2)) || return 0
	echo $((before + $1 / 2 - free)) >"$huge/nr_hugepages" 2>/dev/null || true
	now=$(<"$huge/nr_hugepages")
	((now == before)) || on_exit _bench_give_back $((now - before))
}
# As many as we took: others may have changed the number meanwhile.
_bench_give_back() {
	local now
	now=$(<"$huge/nr_hugepages")
	echo $((now > $1 ? now - $1 : 0)) >"$huge/nr_hugepages"
}

# bench_file: DISK, another file of 256 MiB on tmpfs: a daemon keeps its own to itself
bench_file() {
	if [[ -z $shm ]]; then
		shm=$(mktemp -d /dev/shm/vhost-user-nvme.XXXXXXXX)
		on_exit rm -rf -- "$shm"
	fi
	DISK=$(mktemp "$shm/XXXXXX")
	fallocate -l 256M "$DISK" || fail "no room for 256 MiB on /dev/shm"
}

# ---------------------------------------------------------------- daemons

# What guests speak.
spoken=vhost-user
# bench_daemon DIR PROGRAM POLICY NAMESPACE[=SOCKET[@TRANSPORT]]...: controllers with a namespace each, DIR/SOCKET.sock
bench_daemon() {
	local at=$1 program=$2 policy=$3 spec namespace transport sockets=()
	shift 3
	mkdir -p -- "$at"
	printf '[daemon]\ncores = [%d]\nidle = "%s"\nlog-level = "warn"\n' "$poller_core" "$policy" >"$at/daemon.toml"
	for spec in "$@"; do
		transport=vhost-user
		[[ $spec != *@* ]] || transport=${spec#*@} spec=${spec%@*}
		namespace=${spec%%=*}
		sockets+=("$at/${spec#*=}.sock")
		{
			printf '[[controller]]\nsocket-path = "%s"\n' "${sockets[-1]}"
			# A daemon of before vfio-user does not know the key.
			[[ $transport == vhost-user ]] || printf 'transport = "%s"\n' "$transport"
			printf '[[controller.namespace]]\nbackend = "%s"\nblock-size = 512\n' "$namespace"
			case $namespace in
			null) printf 'size = "1T"\n' ;;
			memory) printf 'size = "256M"\n' ;;
			file)
				bench_file
				printf 'path = "%s"\n' "$DISK"
				;;
			esac
		} >>"$at/daemon.toml"
	done
	# shellcheck disable=SC2034 # for daemon_start
	DAEMON=${favoured[0]}
	daemon_start "$at" "${sockets[@]}" -- "${favoured[@]:1}" "$program" --config "$at/daemon.toml"
}

# bench_stop: the last one that was started
bench_stop() {
	daemon_runs || fail "the daemon died: $(tail -n 1 -- "$DAEMON_LOG")"
	daemon_stop || fail "the daemon did not end cleanly: $(tail -n 1 -- "$DAEMON_LOG")"
}

# number KEY JSON: the values of a key, one to a line
number() { grep -oE "\"$1\":[0-9.e+-]+" <<<"$2" | cut -d : -f 2; }
micros() { awk -v ns="$1" 'BEGIN {printf "%.2f", ns / 1000}'; }

# ---------------------------------------------------------------- parts

bench_table() {
	local names name want=() subjects=() pids=() i policy label load
	mapfile -t names < <("$guest" rows)
	for name in "${names[@]}"; do
		if [[ -z $filter || $name =~ $filter ]]; then want+=(--row "$name"); fi
	done
	((${#want[@]})) || fail "no row matches '$filter'"
	step "table: $((${#want[@]} / 2)) rows, $rounds rounds of $seconds s, ${#daemons[@]} build(s), ${#policies[@]} policies"
	bench_huge_pages $((${#daemons[@]} * ${#policies[@]} * 256 + buffers + 32 + 256))
	for i in "${!daemons[@]}"; do
		for policy in "${policies[@]}"; do
			label=$policy
			((${#policies[@]} > 1)) || label=${labels[i]:-$policy}
			bench_daemon "$dir/table-$i-$policy" "${daemons[i]}" "$policy" null memory file
			pids+=("$DAEMON_PID")
			subjects+=(--daemon "$label,$DAEMON_PID,$dir/table-$i-$policy")
		done
	done
	# In the background, so that a signal to us is not kept waiting until it has ended.
	"${favoured[@]}" "$guest" table "${subjects[@]}" "${want[@]}" --seconds "$seconds" --rounds "$rounds" --core "$client_core" \
		--buffers "$buffers" --head "$head" --out "$out" ${json:+--json "$json"} >/dev/null &
	load=$!
	on_exit _end_child "$load"
	wait "$load" || fail "it did not go through"
	_forget_exit _end_child "$load"
	for DAEMON_PID in "${pids[@]}"; do bench_stop; done
	ok
	cat -- "$out/report.md"
}

idle_seconds=30
bench_idle() {
	local n i names sockets held from to result rows=() wakes=()
	step "connected idle controllers for $idle_seconds s (adaptive), then single commands"
	for spoken in vhost-user vfio-user; do
		for n in 1 16; do
			names=() sockets=()
			for ((i = 1; i <= n; i++)); do
				names+=("null=idle$i@$spoken")
				sockets+=(--socket "$dir/idle-$spoken-$n/idle$i.sock")
			done
			bench_daemon "$dir/idle-$spoken-$n" "${daemons[-1]}" adaptive "${names[@]}"
			VIRTUAL_GUEST_TRANSPORT=$spoken "$guest" hold "${sockets[@]}" --buffers 0 --seconds $((idle_seconds + 60)) >/dev/null 2>"$dir/hold.log" &
			held=$!
			on_exit _end_child "$held"
			until grep -q holding "$dir/hold.log"; do
				kill -0 "$held" 2>/dev/null || fail "$(tail -n 1 "$dir/hold.log")"
				sleep 0.1
			done
			# Idle is what has had nothing to do for a while: a poller that has to look at doorbells looks seldom after 2 s.
			sleep 4
			from=$(process_cpu_us "$DAEMON_PID")
			sleep "$idle_seconds"
			to=$(process_cpu_us "$DAEMON_PID")
			kill "$held" 2>/dev/null || true
			wait "$held" 2>/dev/null || true
			_forget_exit _end_child "$held"
			rows+=("$spoken $n $((to - from))")
			sleep 0.2
			if ((n == 1)); then
				result=$(VIRTUAL_GUEST_TRANSPORT=$spoken "${favoured[@]}" "$guest" wake "${sockets[@]}" --core "$client_core" --buffers 0 --count 1000) ||
					fail "no answer"
				wakes+=("$(printf -- '- %s: p50 %s us, p99 %s us, mean %s us' "$spoken" "$(micros "$(number p50_ns "$result")")" \
					"$(micros "$(number p99_ns "$result")")" "$(micros "$(number avg_ns "$result")")")")
			fi
			bench_stop
		done
	done
	spoken=vhost-user
	ok
	{
		printf '### Idle\n\nConnected controllers with a queue pair each that have nothing to do (adaptive): CPU time of all threads of the daemon in %d s.\n\n' \
			"$idle_seconds"
		printf '| transport | controllers | CPU time (s) | of a core |\n| --- | ---: | ---: | ---: |\n'
		printf '%s\n' "${rows[@]}" | awk -v seconds="$idle_seconds" '{printf "| %s | %d | %.4f | %.3f %% |\n", $1, $2, $3 / 1e6, $3 / seconds / 1e4}'
		printf '\nA command each 2 ms (1000): over vhost-user the poller sleeps in between, over vfio-user it naps only after 10 ms.\n\n'
		printf '%s\n' "${wakes[@]}" ''
	} | tee -- "$out/idle.md"
}

bench_fair() {
	local i names=() sockets=() namespace result low high alone beside round
	for ((i = 1; i <= 8; i++)); do names+=("null=null$i" "memory=memory$i"); done
	# 256 MiB for each of eight memory namespaces, and small buffers.
	step "fairness: one poller, several guests ($rounds rounds of $seconds s)"
	bench_huge_pages $((8 * 256 + 8 * 16))
	bench_daemon "$dir/fair" "${daemons[-1]}" "${policies[0]}" "${names[@]}"
	printf '### Fairness\n\nOne poller (%s), one client thread for all guests, which takes at most 16 completions of each in turn. Each figure is the median of %d rounds.\n\n' "${policies[0]}" "$rounds" >"$out/fair.md"
	for namespace in null memory; do
		sockets=() low=() high=() alone=() beside=()
		for ((i = 1; i <= 8; i++)); do sockets+=(--socket "$dir/fair/$namespace$i.sock"); done
		# The memory of a namespace comes when it is written first.
		[[ $namespace == null ]] || bench_load "${sockets[@]}" --fill >/dev/null || fail "no result"
		for ((round = 0; round < rounds; round++)); do
			result=$(bench_load "${sockets[@]}" --depth 32) || fail "no result"
			low+=("$(number iops "$result" | sort -g | sed -n 1p)")
			high+=("$(number iops "$result" | sort -g | sed -n '$p')")
			result=$(bench_load "${sockets[@]:0:2}" --depth 1) || fail "no result"
			alone+=("$(number p99_ns "$result")")
			result=$(bench_load "${sockets[@]:0:4}" --depth 1,128) || fail "no result"
			beside+=("$(number p99_ns "$result" | sed -n 1p)")
		done
		{
			printf -- '- %s, 8 guests of depth 32: most / least IOPS %s (worst round %s)\n' "$namespace" \
				"$(bench_ratios median "${low[*]}" "${high[*]}")" "$(bench_ratios worst "${low[*]}" "${high[*]}")"
			printf -- '- %s, a guest of depth 1: p99 %s us alone, %s us beside one of depth 128\n' "$namespace" \
				"$(micros "$(median "${alone[@]}")")" "$(micros "$(median "${beside[@]}")")"
		} >>"$out/fair.md"
	done
	bench_stop
	ok
	echo >>"$out/fair.md"
	cat -- "$out/fair.md"
}
bench_load() { VIRTUAL_GUEST_TRANSPORT=$spoken "${favoured[@]}" "$guest" load "$@" --seconds "$seconds" --core "$client_core" --buffers 16 --batch 16; }
median() { printf '%s\n' "$@" | sort -g | sed -n "$((($# + 1) / 2))p"; }
# bench_ratios median|worst LOWS HIGHS
bench_ratios() {
	awk -v what="$1" -v a="$2" -v b="$3" 'BEGIN {
		n = split(a, low, " "); split(b, high, " ")
		for (i = 1; i <= n; i++) r[i] = high[i] / low[i]
		for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (r[j] < r[i]) { t = r[i]; r[i] = r[j]; r[j] = t }
		printf "%.3f", what == "worst" ? r[n] : r[int((n + 1) / 2)]
	}'
}

bench_strace() {
	local namespace tid count load
	need_packages strace
	step "system calls of a poller under load (poll)"
	bench_huge_pages $((256 + 32))
	bench_daemon "$dir/strace" "${daemons[-1]}" poll null memory
	tid=$(bench_poller_thread "$DAEMON_PID") || fail "found no thread of a poller"
	printf '### System calls\n\nstrace -c on the thread of the poller for 2 s under load (poll, depth 32):\n\n' >"$out/strace.md"
	for namespace in null memory; do
		"${favoured[@]}" "$guest" load --socket "$dir/strace/$namespace.sock" --depth 32 --seconds 4 --warm-up 0 --core "$client_core" \
			--buffers 16 >"$dir/strace.json" 2>"$dir/strace.log" &
		load=$!
		on_exit _end_child "$load"
		sleep 1
		timeout --signal=INT 2 strace -c -qq -p "$tid" -o "$dir/strace.out" || true
		kill -0 "$load" 2>/dev/null || fail "the load ended early: $(tail -n 1 "$dir/strace.log")"
		wait "$load" || fail "the load failed: $(tail -n 1 "$dir/strace.log")"
		_forget_exit _end_child "$load"
		count=$(awk '$NF == "total" {print $(NF == 6 ? 4 : 3); found = 1; exit} END {if (!found) print 0}' "$dir/strace.out")
		printf -- '- %s: %d system calls, at %.0f commands per second\n' "$namespace" "$count" "$(number iops "$(<"$dir/strace.json")")" >>"$out/strace.md"
		if ((count > 0)); then sed 's/^/      /' "$dir/strace.out" >>"$out/strace.md"; fi
	done
	bench_stop
	ok
	echo >>"$out/strace.md"
	cat -- "$out/strace.md"
}
bench_poller_thread() {
	local task
	for task in /proc/"$1"/task/*; do
		if [[ $(<"$task/comm") == *poller* ]]; then
			echo "${task##*/}"
			return 0
		fi
	done
	return 1
}

bench_transports() {
	local -A figures=()
	local round namespace depth result order
	# One daemon and short runs, each beside its like: what else the machine does comes to both.
	step "transports: $rounds rounds of $seconds s"
	bench_huge_pages $((2 * 256 + 32))
	bench_daemon "$dir/transports" "${daemons[-1]}" "${policies[0]}" \
		null=null-vhost-user memory=memory-vhost-user null=null-vfio-user@vfio-user memory=memory-vfio-user@vfio-user
	for spoken in vhost-user vfio-user; do
		bench_load --socket "$dir/transports/memory-$spoken.sock" --fill >/dev/null || fail "no result"
	done
	for ((round = 0; round < rounds; round++)); do
		order=(vhost-user vfio-user)
		((round % 2 == 0)) || order=(vfio-user vhost-user)
		for namespace in null memory; do
			for depth in 1 32 128; do
				for spoken in "${order[@]}"; do
					result=$(bench_load --socket "$dir/transports/$namespace-$spoken.sock" --depth "$depth") || fail "no result"
					figures[$spoken-$namespace-$depth]+=" $(number iops "$result")"
				done
			done
		done
	done
	bench_stop
	spoken=vhost-user
	ok
	{
		printf '### Transports\n\nReads of 4 KiB over each transport by turns (%s), thousands a second, medians of %d rounds; the ratio is the median of those of each round.\n\n' \
			"${policies[0]}" "$rounds"
		printf '| namespace | depth | vhost-user | vfio-user | vfio-user / vhost-user |\n| --- | --- | --- | --- | --- |\n'
		for namespace in null memory; do
			for depth in 1 32 128; do
				# shellcheck disable=SC2086 # words
				printf '| %s | %d | %.1f | %.1f | %s |\n' "$namespace" "$depth" \
					"$(awk -v n="$(median ${figures[vhost-user-$namespace-$depth]})" 'BEGIN {print n / 1000}')" \
					"$(awk -v n="$(median ${figures[vfio-user-$namespace-$depth]})" 'BEGIN {print n / 1000}')" \
					"$(bench_ratios median "${figures[vhost-user-$namespace-$depth]}" "${figures[vfio-user-$namespace-$depth]}")"
			done
		done
		echo
	} | tee -- "$out/transports.md"
}

# ---------------------------------------------------------------- all of it

dirty=''
git diff --quiet HEAD 2>/dev/null || dirty=', with changes'
head="Made by \`scripts/bench host --seconds $seconds --rounds $rounds\` at commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$dirty${against:+, against ${against:0:12}}.

Machine: $(sed -nE 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p), $(nproc) cores, Linux $(uname -r). Guest on core $client_core, poller on core $poller_core, one queue
pair of 256 entries, data in $buffers MiB of guest memory, namespaces of 256 MiB (memory, file) and 1 TiB (null)."
for part in "${parts[@]}"; do "bench_$part"; done
for part in idle fair strace transports; do
	if [[ -e $out/$part.md ]]; then cat -- "$out/$part.md" >>"$out/report.md"; fi
done
info "reports and plots are in $out"
