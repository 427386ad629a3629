# shellcheck shell=bash
# bench_ssd.sh - `scripts/bench ssd`: an SSD through us, through QEMU's own userspace driver and through the host's kernel, side by side.
# Sourced by scripts/bench.
# shellcheck disable=SC2154 # _vm_accel is of vm.sh
. scripts/lib/ssd.sh

seconds=4 rounds=5 out='' json='' labels=(ours vfio-nvme vfio-blk kernel-nvme kernel-blk)

bench_ssd_usage() {
	cat <<-USAGE
		usage: scripts/bench ssd [--out DIR] [--seconds S] [--rounds N] [--json FILE]

		A host with an IOMMU and five SSDs, all alike and emulated by QEMU (L1), has a guest (L2, under KVM) to which each SSD is a disk
		by another way. In L2, in interleaved rounds, fio with 4 KiB random reads and writes at depth 1 and 32 on

		  ours         our daemon, which drives the SSD through VFIO
		  vfio-nvme    QEMU's own userspace NVMe driver (nvme://), to L2 as QEMU's NVMe device
		  vfio-blk     the same, as virtio-blk with an iothread
		  kernel-nvme  the host kernel's driver (aio=native), as QEMU's NVMe device
		  kernel-blk   the same, as virtio-blk with an iothread

		and, before that, in L1 itself on the host kernel's driver (host).

		  --out DIR     where report.md and the console go (default: target/bench/<time>)
		  --seconds S   length of each run (default: $seconds)
		  --rounds N    rounds (default: $rounds); medians are of the rounds, spread is (max - min) / median
		  --json FILE   the rows as JSON, one object each
		  --help        this text
	USAGE
}

while (($#)); do
	case $1 in
	--help | -h) bench_ssd_usage && exit 0 ;;
	--out | --seconds | --rounds | --json)
		(($# > 1)) || fail "$1 needs a value"
		case $1 in
		--out) out=$2 ;;
		--seconds) seconds=$2 ;;
		--rounds) rounds=$2 ;;
		--json) json=$2 ;;
		esac
		shift
		;;
	*) fail "unknown argument '$1' (try --help)" ;;
	esac
	shift
done
[[ $seconds =~ ^[1-9][0-9]{0,2}$ && $rounds =~ ^[1-9][0-9]?$ ]] || fail "--seconds and --rounds take small numbers"
[[ -n $out ]] || out=$(cargo_target)/bench/$(date -u +%Y%m%d-%H%M%S)
[[ -z $json ]] || { : >"$json" && json=$(realpath -- "$json"); } || fail "cannot write '$json'"
mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)

dir='' shm=''
temp_dir dir
build_daemon
step "QEMU with the vhost-user-nvme device"
QEMU_BIN=$(scripts/build-qemu) || fail "there is no QEMU to run the guests in"
ok "$QEMU_BIN"
step "host and guest"
# Starting fio takes a second or two under emulation.
limit=$((${#labels[@]} * rounds * 4 * (seconds + 4) + 60))
ssd_tree "$dir/tree" "./ssd-bench.sh $seconds $rounds $limit ${labels[*]}" -- ./ssd-bench-l2.sh
make_test_cpio "$dir/tree" "$dir/l1.cpio"
rm -rf -- "$dir/tree"
# The media are memory, so that it is not they that are measured.
shm=$(mktemp -d /dev/shm/vhost-user-nvme.XXXXXXXX)
on_exit rm -rf -- "$shm"
ssd_iommu
for label in "${labels[@]}"; do
	ssd_image "$shm/$label" 128
	fallocate -l 128M "$shm/$label" || fail "no room for 128 MiB on /dev/shm"
	ssd_node "disk-$label" "$shm/$label"
	ssd_port "slot-$label"
	ssd_add "$label" "slot-$label" "disk-$label" logical_block_size=4096,physical_block_size=4096
done
ok
step "$rounds rounds of 4 cases of $seconds s on $((${#labels[@]} + 1)) disks: about $((limit * 6 / 5 / 60 + 1)) minutes"
ssd_start --progress --out "$dir/vm" --test "$dir/l1.cpio" --timeout $((limit * 6 / 5 + 90))
rc=0
vm_wait || rc=$?
cp -- "$dir/vm/console.log" "$dir/vm/results/"*.{log,tsv} "$out/" 2>/dev/null || true
((rc == 0)) || fail "the host ended with status $rc: see $out/console.log"
ok

dirty=''
git diff --quiet HEAD 2>/dev/null || dirty=', with changes'
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$dirty

# name, case, median IOPS, p50, p99, min, max; then in nanoseconds mean, p50, p99, p99.9
if [[ -n $json ]]; then
	cat -- "$out/host.tsv" "$out/guest.tsv" | awk -F '\t' '
		BEGIN { printf "[" }
		{
			split($2, kase, "-")
			printf "%s\n {\"transport\": \"%s\", \"namespace\": \"ssd\", \"operation\": \"%s\", \"block_size\": 4096, \"depth\": %d,", (NR > 1 ? "," : ""), ($1 == "ours" ? "vhost-user-nvme" : $1), kase[1], kase[2]
			printf " \"iops\": %d, \"avg_ns\": %d, \"p50_ns\": %d, \"p99_ns\": %d, \"p999_ns\": %d}", $3, $8, $9, $10, $11
		}
		END { print "\n]" }' >"$json"
fi
{
	cat <<-HEAD
		Made by \`scripts/bench ssd --seconds $seconds --rounds $rounds\` at commit $commit.

		Machine: $(sed -nE 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p), $(nproc) cores, Linux $(uname -r). Host (L1): Linux $GUEST_RELEASE, 2 vCPUs under
		\`-accel $_vm_accel\`, emulated SSDs on memory. Guest (L2): KVM in L1, 1 vCPU, huge pages. $("$QEMU_BIN" --version | sed -n 1p).

		Median IOPS of fio 4 KiB over $rounds interleaved rounds of $seconds s; in brackets the spread, (max - min) / median.

	HEAD
	cat -- "$out/guest.tsv" "$out/host.tsv" | awk -F '\t' -v order="${labels[*]} host" '
		{ iops[$1, $2] = $3; spread[$1, $2] = $3 ? ($7 - $6) * 100 / $3 : 0; p50[$1, $2] = $4; p99[$1, $2] = $5 }
		END {
			n = split(order, names, " ")
			split("randread-1 randread-32 randwrite-1 randwrite-32", kase, " ")
			head = " | read QD1 | read QD32 | write QD1 | write QD32 |\n| --- | ---: | ---: | ---: | ---: |"
			print "| disk" head
			for (i = 1; i <= n; i++) {
				line = "| " names[i]
				for (k = 1; k <= 4; k++) line = line sprintf(" | %d (%.0f %%)", iops[names[i], kase[k]], spread[names[i], kase[k]])
				print line " |"
			}
			print "\nOurs as a ratio (more than 1: ours is faster):\n"
			print "| ours /" head
			for (i = 2; i <= n; i++) {
				line = "| " names[i]
				for (k = 1; k <= 4; k++)
					line = line (iops[names[i], kase[k]] ? sprintf(" | %.2f", iops["ours", kase[k]] / iops[names[i], kase[k]]) : " | -")
				print line " |"
			}
			print "\nCompletion latency in microseconds, median of the rounds: p50 / p99.\n"
			print "| disk" head
			for (i = 1; i <= n; i++) {
				line = "| " names[i]
				for (k = 1; k <= 4; k++) line = line sprintf(" | %d / %d", p50[names[i], kase[k]], p99[names[i], kase[k]])
				print line " |"
			}
		}'
} >"$out/report.md"
cat -- "$out/report.md"
info "report.md and the console are in $out"
