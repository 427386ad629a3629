#!/bin/bash
# fio 4k random reads and writes at depth 1 and 32 on several block devices of one guest, in interleaved rounds so that the machine's
# noise falls on all alike. JSON of every run in /results/bench, the medians as a table.
# usage: bench.sh [--seconds S] [--rounds N] [--engine libaio|io_uring] LABEL=DEVICE...
set -euo pipefail

seconds=4 rounds=3 engine=libaio devices=()
while (($#)); do
	case $1 in
	--seconds) seconds=$2 && shift ;;
	--rounds) rounds=$2 && shift ;;
	--engine) engine=$2 && shift ;;
	--help | -h)
		sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
		exit 0
		;;
	*=/dev/*) devices+=("$1") ;;
	*)
		echo "bench: '$1' is no LABEL=/dev/NAME (try --help)" >&2
		exit 2
		;;
	esac
	shift
done
((${#devices[@]})) || {
	echo "bench: no devices" >&2
	exit 2
}
out=/results/bench
mkdir -p $out
cases=(randread-1 randread-32 randwrite-1 randwrite-32)

for device in "${devices[@]}"; do
	[[ -b ${device#*=} ]] || {
		echo "FAIL bench: ${device#*=} is no block device"
		exit 1
	}
done
for ((round = 1; round <= rounds; round++)); do
	echo "round $round of $rounds, up $(cut -d ' ' -f 1 /proc/uptime) s"
	for case in "${cases[@]}"; do
		# Another one begins each time: none has always the same neighbour, or the guest as the last left it.
		devices=("${devices[@]:1}" "${devices[0]}")
		for device in "${devices[@]}"; do
			file=$out/${device%%=*}.$case.$round.json
			if ! timeout $((seconds + 60)) fio --output="$file" --output-format=json --name="$case" --filename="${device#*=}" --direct=1 \
				--ioengine="$engine" --rw="${case%-*}" --iodepth="${case#*-}" --bs=4k --time_based --runtime="$seconds" \
				--ramp_time=0.5 --norandommap --randrepeat=0 >/dev/null; then
				echo "FAIL bench: fio $case on $device"
				tail -n 5 "$file" 2>/dev/null || true
				exit 1
			fi
		done
	done
done

# name, case, median of IOPS / p50 / p99 in us over the rounds, least and most IOPS; mean / p50 / p99 / p99.9 in ns
for case in "${cases[@]}"; do
	for device in "${devices[@]}"; do
		name=${device%%=*}
		jq -rs --arg name "$name" --arg case "$case" '
			def median: sort | .[(length - 1) / 2 | floor];
			map(.jobs[0] | if .read.total_ios > 0 then .read else .write end)
			| [$name, $case, (map(.iops) | median | floor),
			   (map(.clat_ns.percentile["50.000000"] / 1000) | median | floor),
			   (map(.clat_ns.percentile["99.000000"] / 1000) | median | floor),
			   (map(.iops) | min | floor), (map(.iops) | max | floor),
			   (map(.clat_ns.mean) | median | floor), (map(.clat_ns.percentile["50.000000"]) | median),
			   (map(.clat_ns.percentile["99.000000"]) | median), (map(.clat_ns.percentile["99.900000"]) | median)] | @tsv' "$out/$name.$case".*.json
	done
done >$out/summary.tsv
printf '%-24s %-13s %9s %9s %9s %9s %9s\n' device 'fio 4k' IOPS 'p50 us' 'p99 us' 'min IOPS' 'max IOPS'
while IFS=$'\t' read -r name case iops p50 p99 min max _; do
	printf '%-24s %-13s %9d %9d %9d %9d %9d\n' "$name" "$case" "$iops" "$p50" "$p99" "$min" "$max"
done <$out/summary.tsv
echo "PASS bench (${#devices[@]} devices, $rounds rounds of $seconds s)"
