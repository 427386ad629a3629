# shellcheck shell=bash
# bench_guest.sh - `scripts/bench guest`: what a guest sees of its disks, side by side. Sourced by scripts/bench.

kernel=6.12 seconds=4 rounds=5 out='' filter='' json=''

bench_guest_usage() {
	cat <<-USAGE
		usage: scripts/bench guest [--out DIR] [--seconds S] [--rounds N] [--kernel K] [--only REGEX] [--json FILE]

		One guest with two vCPUs, and in it, in interleaved rounds, fio with 4 KiB random reads and writes at depth 1 and 32 on

		  ours: null, memory, file on tmpfs
		  QEMU's own nvme: null-co, and a file on tmpfs with aio=threads, native and io_uring
		  QEMU's virtio-blk with an iothread: null-co, and the same file
		  vhost-user-blk, served by qemu-storage-daemon: null-co, and the same file with aio=native and io_uring

		  --out DIR     where report.md, report.json, latency.svg and fio's own JSON go (default: target/bench/<time>)
		  --seconds S   length of each run (default: $seconds)
		  --rounds N    rounds (default: $rounds); medians are of the rounds, spread is (max - min) / median
		  --kernel K    6.1, 6.12 or 7.x (default: $kernel)
		  --only REGEX  only the devices whose label matches
		  --json FILE   the rows as JSON, one object each: transport, namespace, operation, block_size, depth, iops, avg_ns,
		                p50_ns, p99_ns, p999_ns, medians of the rounds
		  --help        this text
	USAGE
}

while (($#)); do
	case $1 in
	--help | -h) bench_guest_usage && exit 0 ;;
	--out | --seconds | --rounds | --kernel | --only | --json)
		(($# > 1)) || fail "$1 needs a value"
		case $1 in
		--out) out=$2 ;;
		--seconds) seconds=$2 ;;
		--rounds) rounds=$2 ;;
		--kernel) kernel=$2 ;;
		--only) filter=$2 ;;
		--json) json=$2 ;;
		esac
		shift
		;;
	*) fail "unknown argument '$1' (try --help)" ;;
	esac
	shift
done
[[ $seconds =~ ^[1-9][0-9]{0,2}$ && $rounds =~ ^[1-9][0-9]?$ ]] || fail "--seconds and --rounds take small numbers"
[[ " ${GUEST_SERIES[*]} " == *" $kernel "* ]] || fail "unknown kernel '$kernel' (there are: ${GUEST_SERIES[*]})"
[[ -n $out ]] || out=$(cargo_target)/bench/$(date -u +%Y%m%d-%H%M%S)
[[ -z $json ]] || { : >"$json" && json=$(realpath -- "$json"); } || fail "cannot write '$json'"
mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)

# One daemon serves all of ours, on one core.
dir='' shm=''
temp_dir dir
build_daemon
step "what draws the plot (release build)"
logged "$out/build.log" cargo build --release --locked -p bench || fail "it does not build: see $out/build.log"
rm -f -- "$out/build.log"
ok
step "QEMU with the vhost-user-nvme device"
qemu=$(scripts/build-qemu) || fail "there is no QEMU to run the guest in"
ok "$qemu"
step "guest (Linux $kernel)"
guest_userland
guest_kernel "$kernel"
ok "$GUEST_RELEASE"

shm=$(mktemp -d /dev/shm/vhost-user-nvme.XXXXXXXX)
on_exit rm -rf -- "$shm"
fallocate -l 512M "$shm/disk" || fail "no room for 512 MiB on /dev/shm"

# Labels with the slot of the PCI bus where each device sits, and its QEMU arguments.
labels=() slots=() qemu_args=()
wanted() { [[ -z $filter || $1 =~ $filter ]]; }
# put LABEL DEVICE[,PROPERTY...] [MORE-QEMU-ARG...]
put() {
	local slot
	wanted "$1" || return 0
	slot=$(printf '%02x' $((${#slots[@]} + 4)))
	labels+=("$1")
	slots+=("$1=$slot")
	qemu_args+=("${@:3}" -device "$2,addr=0x$slot")
}
node() { echo "driver=raw,node-name=$1,file.driver=file,file.locking=off,file.filename=$shm/disk,cache.direct=on,file.cache.direct=on,file.aio=$2"; }

# vhost_user_blk LABEL BLOCKDEV: a device of the guest, and its qemu-storage-daemon, both with a queue for each vCPU as ours have
vhost_user_blk() {
	local socket=$dir/$1.sock end
	wanted "$1" || return 0
	"${qemu%/*}/qemu-storage-daemon" --blockdev "$2,node-name=disk" \
		--export "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=$socket,writable=on,num-queues=2" \
		>"$dir/$1.log" 2>&1 </dev/null &
	on_exit _end_child $!
	end=$(($(now_us) + 20000000))
	until socket_listens "$socket"; do
		kill -0 $! 2>/dev/null || fail "qemu-storage-daemon ended at its start: $(tail -n 1 -- "$dir/$1.log")"
		(($(now_us) < end)) || fail "qemu-storage-daemon does not listen after 20 s"
		sleep 0.05
	done
	put "$1" "vhost-user-blk-pci,chardev=$1,num-queues=2" -chardev "socket,id=$1,path=$socket"
}

{
	for backend in null memory file; do
		printf '[[controller]]\nsocket-path = "%s"\n[[controller.namespace]]\nbackend = "%s"\n' "$dir/$backend.sock" "$backend"
		if [[ $backend == file ]]; then printf 'path = "%s"\n\n' "$shm/disk"; else printf 'size = "512M"\n\n'; fi
	done
} >"$dir/daemon.toml"
for backend in null memory file; do
	put "ours-$backend" "vhost-user-nvme,socket=$dir/$backend.sock"
done
put qemu-nvme-null nvme,drive=nvme-null,serial=nvme-null -blockdev driver=null-co,node-name=nvme-null,size=536870912,read-zeroes=off
for aio in threads native io_uring; do
	put "qemu-nvme-file-$aio" "nvme,drive=nvme-$aio,serial=nvme-$aio" -blockdev "$(node "nvme-$aio" "$aio")"
done
put virtio-blk-null virtio-blk-pci,drive=vb-null,iothread=io0 -object iothread,id=io0 \
	-blockdev driver=null-co,node-name=vb-null,size=536870912,read-zeroes=off
put virtio-blk-file virtio-blk-pci,drive=vb-file,iothread=io1 -object iothread,id=io1 -blockdev "$(node vb-file native)"
vhost_user_blk vhost-user-blk-null driver=null-co,size=536870912,read-zeroes=off
for aio in native io_uring; do
	vhost_user_blk "vhost-user-blk-file-$aio" "$(node disk "$aio" | sed 's/,node-name=disk//')"
done
((${#labels[@]})) || fail "no device matches '$filter'"

step "daemon"
daemon_start "$dir" "$dir"/{null,memory,file}.sock -- --config "$dir/daemon.toml"
ok "pid $DAEMON_PID"

step "${#labels[@]} devices, $rounds rounds of 4 cases of $seconds s: about $((${#labels[@]} * rounds * 4 * (seconds + 2) / 60 + 1)) minutes"
guest_test_cpio "$dir/test.cpio" \
	"devices=\$(./by-slot.sh ${slots[*]}) && ./bench.sh --seconds $seconds --rounds $rounds \$devices" \
	"./dmesg-clean.sh 'Ignoring bogus Namespace Identifiers'" # QEMU's nvme has none
rc=0
run_vm --out "$dir/vm" --qemu "$qemu" --kernel "$kernel" --memory auto --test "$dir/test.cpio" --progress \
	--timeout $((120 + ${#labels[@]} * rounds * 4 * (seconds + 6))) -- "${qemu_args[@]}" || rc=$?
((rc == 0)) || {
	tail -n 20 "$dir/vm/console.log" >&2
	fail "the guest ended with status $rc"
}
daemon_runs || fail "the daemon died: $(tail -n 1 "$DAEMON_LOG")"
daemon_stop || fail "the daemon did not end cleanly: $(tail -n 1 "$DAEMON_LOG")"
ok

# ---------------------------------------------------------------- report

results=$dir/vm/results/bench
mkdir -p "$out/fio"
cp -- "$results"/*.json "$out/fio/"
cp -- "$results/summary.tsv" "$out/summary.tsv"
# shellcheck disable=SC1003 # a backslash, as %q wrote it
accel=$(sed -nE 's/.* -accel ([^ ]+).*/\1/p' "$dir/vm/command" | tr -d '\\')
cpu=$(sed -nE 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p)
dirty=''
git diff --quiet HEAD 2>/dev/null || dirty=', with changes'
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$dirty
memory=memfd
if grep -q hugetlb=on "$dir/vm/command"; then memory='huge pages'; fi

# summary.tsv: name, case, median IOPS, p50, p99, min, max; then in nanoseconds mean, p50, p99, p99.9
awk -F '\t' -v accel="$accel" -v commit="$commit" -v cpu="$cpu" -v cores="$(nproc)" -v host="$(uname -r)" \
	-v guest="$GUEST_RELEASE" -v qemu="$("$qemu" --version | sed -n 1p)" -v seconds="$seconds" -v rounds="$rounds" \
	-v memory="$memory" '
	function quoted(s) { gsub(/["\\]/, "\\\\&", s); return "\"" s "\"" }
	BEGIN {
		printf "{\n \"commit\": %s, \"machine\": %s, \"cores\": %d, \"host_kernel\": %s, \"guest_kernel\": %s,\n", quoted(commit), quoted(cpu), cores, quoted(host), quoted(guest)
		printf " \"qemu\": %s, \"accel\": %s, \"guest_memory\": %s, \"seconds\": %d, \"rounds\": %d,\n \"results\": [", quoted(qemu), quoted(accel), quoted(memory), seconds, rounds
	}
	{
		printf "%s\n  {\"device\": %s, \"case\": %s, \"iops\": %d, \"p50_us\": %d, \"p99_us\": %d, \"iops_min\": %d, \"iops_max\": %d}", (NR > 1 ? "," : ""), quoted($1), quoted($2), $3, $4, $5, $6, $7
	}
	END { print "\n ]\n}" }' "$out/summary.tsv" >"$out/report.json"

# LABEL is TRANSPORT-NAMESPACE, CASE is OPERATION-DEPTH
awk -F '\t' '
	BEGIN { printf "[" }
	{
		transport = $1; namespace = $1
		sub(/-(null|memory|file).*/, "", transport)
		namespace = substr($1, length(transport) + 2)
		split($2, kase, "-")
		if (transport == "ours") transport = "vhost-user-nvme"
		printf "%s\n {\"transport\": \"%s\", \"namespace\": \"%s\", \"operation\": \"%s\", \"block_size\": 4096, \"depth\": %d,", (NR > 1 ? "," : ""), transport, namespace, kase[1], kase[2]
		printf " \"iops\": %d, \"avg_ns\": %d, \"p50_ns\": %d, \"p99_ns\": %d, \"p999_ns\": %d}", $3, $8, $9, $10, $11
	}
	END { print "\n]" }' "$out/summary.tsv" >"$dir/rows.json"
"$(cargo_target)/release/polled-guest" plot "$dir/rows.json" >"$out/latency.svg" || fail "there is no plot"
[[ -z $json ]] || cp -- "$dir/rows.json" "$json"

{
	cat <<-HEAD
		Made by \`scripts/bench guest --seconds $seconds --rounds $rounds\` at commit $commit.

		Machine: $cpu, $(nproc) cores, $(($(awk '$1 == "MemTotal:" {print $2}' /proc/meminfo) >> 20)) GiB, Linux $(uname -r). Guest: Linux $GUEST_RELEASE, 2 vCPUs,
		memory in $memory, \`-accel $accel\`. $("$qemu" --version | sed -n 1p). Daemon: one polling core for all of ours.

		Median IOPS of fio 4 KiB over $rounds interleaved rounds of $seconds s; in brackets the spread, (max - min) / median.

	HEAD
	awk -F '\t' -v order="${labels[*]}" '
		{ iops[$1, $2] = $3; spread[$1, $2] = $3 ? ($7 - $6) * 100 / $3 : 0; p50[$1, $2] = $4; p99[$1, $2] = $5; p999[$1, $2] = $11 / 1000 }
		function row(name, text, i) {
			text = "| " name
			for (i = 1; i <= 4; i++) text = text sprintf(" | %d (%.0f %%)", iops[name, kase[i]], spread[name, kase[i]])
			print text " |"
		}
		function late(name, text, i) {
			text = "| " name
			for (i = 1; i <= 4; i++) text = text sprintf(" | %d / %d / %d", p50[name, kase[i]], p99[name, kase[i]], p999[name, kase[i]])
			print text " |"
		}
		function best(regex, k, i, b) {
			b = 0
			for (i = 1; i <= n; i++) if (names[i] ~ regex && iops[names[i], k] > b) b = iops[names[i], k]
			return b
		}
		function ratio(text, mine, regex, i, b, line) {
			line = "| " text
			for (i = 1; i <= 4; i++) {
				b = best(regex, kase[i])
				line = line (b && iops[mine, kase[i]] ? sprintf(" | %.2f", iops[mine, kase[i]] / b) : " | -")
			}
			print line " |"
		}
		END {
			n = split(order, names, " ")
			split("randread-1 randread-32 randwrite-1 randwrite-32", kase, " ")
			head = " | read QD1 | read QD32 | write QD1 | write QD32 |\n| --- | ---: | ---: | ---: | ---: |"
			print "| device" head
			for (i = 1; i <= n; i++) row(names[i])
			print "\nThe same as ratios (more than 1: ours is faster; the best of the aio modes is taken for each case):\n"
			print "| ours / theirs" head
			ratio("null / QEMU nvme on null-co", "ours-null", "^qemu-nvme-null$")
			ratio("null / virtio-blk on null-co", "ours-null", "^virtio-blk-null$")
			ratio("null / vhost-user-blk on null-co", "ours-null", "^vhost-user-blk-null$")
			ratio("memory / QEMU nvme on the file", "ours-memory", "^qemu-nvme-file")
			ratio("file / QEMU nvme on the file", "ours-file", "^qemu-nvme-file")
			ratio("file / virtio-blk on the file", "ours-file", "^virtio-blk-file$")
			ratio("file / vhost-user-blk on the file", "ours-file", "^vhost-user-blk-file")
			print "\nCompletion latency in microseconds, median of the rounds: p50 / p99 / p99.9.\n"
			print "| device" head
			for (i = 1; i <= n; i++) late(names[i])
		}' "$out/summary.tsv"
} >"$out/report.md"
cat -- "$out/report.md"
info "report.md, report.json, latency.svg and fio's JSON are in $out"
