#!/bin/bash
# Runs in a host (L1) with SSDs of the serial numbers "ours", "vfio-nvme", "vfio-blk", "kernel-nvme" and "kernel-blk", all alike: measures
# the host's own driver on one of them, then a guest (L2) in which each is a disk by another way. The medians are /results/host.tsv and
# shellcheck disable=SC2317 # what is called by name
# /results/guest.tsv.
# usage: ssd-bench.sh SECONDS ROUNDS LIMIT LABEL...
# shellcheck source=guest-tests/guest/ssd-lib.sh
. "$(dirname -- "$0")/ssd-lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }
seconds=$1 rounds=$2 limit=$3
shift 3

huge_pages 384
declare -A ssd=() disk=()
for label; do
	ssd[$label]=$(ssd_function "$label") disk[$label]=$(ssd_disk "${ssd[$label]}")
done
host=${disk[${*: -1}]}
dd if=/dev/zero of="$host" bs=1M oflag=direct 2>/dev/null || true
./bench.sh --seconds "$seconds" --rounds "$rounds" "host=$host"
cp /results/bench/summary.tsv /results/host.tsv
rm -rf /results/bench

args=() slots=() slot=4
# put LABEL DEVICE [MORE-ARG...]
put() {
	local place
	place=$(printf '%02x' $slot)
	slots+=("$1=$place")
	args+=("${@:3}" -device "$2,addr=$place")
	slot=$((slot + 1))
}
from_vfio() { echo "driver=nvme,node-name=$1,device=${ssd[$1]},namespace=1"; }
from_kernel() { echo "driver=host_device,node-name=$1,filename=${disk[$1]},aio=native,cache.direct=on"; }
for label; do
	case $label in
	ours | vfio-*) ssd_take "${ssd[$label]}" ;;
	esac
	case $label in
	ours)
		daemon_on /tmp/ours.sock -- --socket-path /tmp/ours.sock --namespace "nvme:${ssd[ours]}"
		put ours vhost-user-nvme,reply-timeout=180000,socket=/tmp/ours.sock
		;;
	*-nvme)
		put "$label" "nvme,drive=$label,serial=$label" -blockdev "$("from_${label%-nvme}" "$label")"
		;;
	*-blk)
		put "$label" "virtio-blk-pci,drive=$label,iothread=io-$label" -object "iothread,id=io-$label" -blockdev "$("from_${label%-blk}" "$label")"
		;;
	esac
done
l2_start --seconds "$limit" --append "bench.slots=$(IFS=,; echo "${slots[*]}") bench.seconds=$seconds bench.rounds=$rounds" "${args[@]}"
l2_ends guest
[[ -z $DAEMON_PID ]] || daemon_off
mkdir -p /tmp/l2
tar -C /tmp/l2 -xf /results/l2.tar
cp /tmp/l2/bench/summary.tsv /results/guest.tsv || fail results "L2 has none"
rm -f /results/l2.tar
finish
