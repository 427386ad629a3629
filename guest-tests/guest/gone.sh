#!/bin/bash
# The daemon goes away while fio runs ("READY gone" on the console asks for it). fio must get an error in bounded time, the driver must
# give the disk up, and the rest of the guest must go on living.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject

expect_errors begin gone
timeout 100 fio --output=/tmp/gone.out --direct=1 --filename="$NS_DEV" --name=gone --ioengine=libaio --iodepth=16 --numjobs=2 --rw=randrw \
	--bs=4k --norandommap --time_based --runtime=90 2>/dev/null &
fio=$!
sleep 1
echo "READY gone"
start=$SECONDS
while kill -0 $fio 2>/dev/null && ((SECONDS - start < 80)); do sleep 0.2; done
if kill -0 $fio 2>/dev/null; then
	fail io "fio still waits after 80 s"
elif wait $fio; then
	fail io "fio saw nothing of it"
else
	pass "io (errors after $((SECONDS - start)) s)"
fi
# The driver keeps a dead disk of no size until its function is taken away.
end=$((SECONDS + 20))
alive() { [[ -e $NS_DEV && $(cat "/sys/class/nvme/$CTRL/state" 2>/dev/null) == live ]]; }
while alive && ((SECONDS < end)); do sleep 0.2; done
if alive; then
	fail disk "the driver still holds it for live"
elif dd if="$NS_DEV" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null && [[ $(blockdev --getsize64 "$NS_DEV" 2>/dev/null) != 0 ]]; then
	fail disk "it can still be read"
else
	pass disk
fi
# life goes on: processes, memory, timers
if [[ $(seq 1 2000 | md5sum) == "$(seq 1 2000 | md5sum)" ]] && dd if=/dev/zero of=/tmp/life bs=1M count=16 2>/dev/null && sleep 0.2; then
	pass life
else
	fail life "the guest is not well"
fi
if dmesg | grep -E 'BUG:|Oops|Kernel panic|blocked for more than|Call Trace'; then
	fail dmesg "the kernel complains"
else
	pass dmesg
fi
finish
