#!/bin/bash
# Keeps the disk busy and says so ("READY running" on the console) until the machine ends; with --idle it does nothing at all instead.
# usage: running.sh [--idle] SECONDS
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
idle=
[[ $1 != --idle ]] || { idle=1 && shift; }
seconds=$1
subject
if [[ -n $idle ]]; then
	# so that the queues have been used
	run_fio first 30 --ioengine=libaio --iodepth=16 --numjobs=2 --rw=randwrite --bs=4k --size=4m || fail first "fio failed"
	echo "READY running"
	sleep "$seconds"
else
	timeout "$seconds" fio --output=/dev/null --direct=1 --filename="$NS_DEV" --name=running --ioengine=libaio --iodepth=32 --numjobs=2 --rw=randrw \
		--bs=4k --norandommap --time_based --runtime="$seconds" &
	sleep 1
	echo "READY running"
	wait || true
fi
finish
