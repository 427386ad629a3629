#!/bin/bash
# A short look at the disk: random reads, random writes, verified writes; a table of what fio saw, and one line to read by machine:
# demo: randread=<IOPS> randwrite=<IOPS> verify=ok
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

seconds=${DEMO_SECONDS:-3}
printf '%s: %s, %d MiB, %d-byte blocks\n' "$NS_DEV" "$(tr -s ' ' <"/sys/class/nvme/$CTRL/model")" $((SIZE >> 20)) "$LBA"
printf '%-10s %6s %9s %9s %9s %9s\n' 'fio 4k' depth IOPS MiB/s 'p50 us' 'p99 us'
declare -A iops
for rw in randread randwrite; do
	for depth in 1 32; do
		if ! run_fio "$rw-$depth" $((seconds + 30)) --output-format=json --ioengine=libaio --iodepth=$depth --rw=$rw --bs=4k \
			--time_based --runtime="$seconds" --ramp_time=0.5 --norandommap; then
			fail "$rw" "fio failed at depth $depth"
			finish
		fi
		read -r i mib p50 p99 < <(jq -r --arg d "${rw#rand}" '.jobs[0][$d] |
			"\(.iops | floor) \(.bw / 1024 | floor) \(.clat_ns.percentile["50.000000"] / 1000 | floor) \(.clat_ns.percentile["99.000000"] / 1000 | floor)"' \
			"/tmp/fio-$rw-$depth.out")
		printf '%-10s %6d %9d %9d %9d %9d\n' "$rw" $depth "$i" "$mib" "$p50" "$p99"
		iops[$rw]=$i
		((i > 0)) || fail "$rw" "fio counted no I/O at depth $depth"
	done
done
if run_fio verify 60 --ioengine=libaio --iodepth=16 --numjobs=2 --offset_increment=32m --size=8m --rw=randwrite \
	--bssplit=4k/60:64k/30:512k/10 --verify=crc32c --verify_fatal=1; then
	verify=ok
	pass verify
else
	verify=failed
	fail verify "what was written does not read back"
fi
echo "demo: randread=${iops[randread]} randwrite=${iops[randwrite]} verify=$verify"
finish
