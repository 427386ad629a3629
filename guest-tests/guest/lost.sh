#!/bin/bash
# Verified I/O while the daemon comes back without its state ("READY lost" asks for that): the controller says that it failed, the driver
# resets it once a command has taken its time, and all goes on: no I/O error, and what was written is there.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

mib=$((1 << 20))
dd if=/dev/urandom of=/tmp/pattern bs=1M count=8 2>/dev/null
dd if=/tmp/pattern of="$NS_DEV" bs=1M oflag=direct 2>/dev/null
: >/tmp/lost.rounds
# Again and again, until it is enough.
busy() {
	until [[ -e /tmp/lost.done ]]; do
		run_fio lost 150 --ioengine=libaio --iodepth=16 --bs=4k --rw=randrw --norandommap --verify=crc32c --verify_fatal=1 \
			--verify_backlog=64 --offset=$((16 * mib)) --size=32m --time_based --runtime=4 || return
		echo >>/tmp/lost.rounds
	done
}
busy &
fio=$!
sleep 1
echo "READY lost"

said() { dmesg | grep -qE 'controller is down; will reset'; }
end=$((SECONDS + 90))
while ! said && kill -0 "$fio" 2>/dev/null && ((SECONDS < end)); do sleep 0.2; done
if said; then pass reset; else fail reset "the driver has not reset the controller"; fi
if wait_subject 60; then pass live; else fail live "the controller does not come back"; fi
# One that was under way, and a whole one.
rounds() { wc -l </tmp/lost.rounds; }
before=$(rounds) end=$((SECONDS + 60))
while (($(rounds) < before + 2)) && kill -0 "$fio" 2>/dev/null && ((SECONDS < end)); do sleep 0.2; done
if (($(rounds) < before + 2)); then fail goes-on "no I/O after the reset"; else pass goes-on; fi
touch /tmp/lost.done
if wait "$fio"; then pass fio; else fail fio "an error, or wrong data"; fi
if dd if="$NS_DEV" bs=1M count=8 iflag=direct 2>/dev/null | cmp - /tmp/pattern; then pass compare; else fail compare "the data is not what was written"; fi
finish
