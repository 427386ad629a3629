#!/bin/bash
# Reads, writes, flushes and trims whose data nobody looks at, for a namespace that keeps none: everything completes, without error.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

for depth in 1 16 64; do
	if run_fio "mixed-$depth" 40 --ioengine=libaio --iodepth="$depth" --numjobs=2 --rw=randrw --fsync=64 --norandommap \
		--bssplit="$LBA/20:4k/40:64k/30:1m/10" --blockalign="$LBA" --time_based --runtime=2; then
		pass "mixed-$depth"
	else
		fail "mixed-$depth" "fio failed"
	fi
done
if [[ $(<"/sys/block/$NS/queue/discard_max_bytes") == 0 ]]; then
	skip trim "the namespace has no deallocate"
elif blkdiscard -o 0 -l 16777216 "$NS_DEV"; then
	pass trim
else
	fail trim "blkdiscard failed"
fi
# the last block can be read, the one behind it cannot
if dd if="$NS_DEV" of=/dev/null bs="$LBA" iflag=direct skip=$((SIZE / LBA - 1)) 2>/dev/null; then
	pass last-block
else
	fail last-block "it cannot be read"
fi
finish
