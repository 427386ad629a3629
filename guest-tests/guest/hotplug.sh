#!/bin/bash
# The disk is taken away and put back by the machine while fio runs on it, as often as is said: "READY unplug" and "READY plug" on the
# console ask for it. fio must see the end of the disk and not hang; each new disk does verified I/O.
# usage: hotplug.sh TIMES
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
times=$1
subject

expect_errors begin hotplug
for ((i = 1; i <= times; i++)); do
	timeout 60 fio --output="/tmp/hotplug-$i.out" --direct=1 --filename="$NS_DEV" --name=hotplug --ioengine=libaio --iodepth=16 --numjobs=2 \
		--rw=randrw --bs=4k --norandommap --time_based --runtime=45 2>/dev/null &
	fio=$!
	sleep 1
	echo "READY unplug $i"
	end=$((SECONDS + 30))
	while [[ -e /sys/bus/pci/devices/$PCI ]] && ((SECONDS < end)); do sleep 0.1; done
	if [[ -e /sys/bus/pci/devices/$PCI ]]; then
		fail "unplug-$i" "the function is still there after 30 s"
		finish
	fi
	end=$((SECONDS + 20))
	while kill -0 $fio 2>/dev/null && ((SECONDS < end)); do sleep 0.1; done
	if kill -0 $fio 2>/dev/null; then
		fail "unplug-$i" "fio hangs"
		finish
	fi
	if wait $fio; then fail "unplug-$i" "fio saw nothing of it"; else pass "unplug-$i"; fi
	echo "READY plug $i"
	if ! wait_subject 30; then
		fail "plug-$i" "no disk 30 s after it was to be plugged"
		finish
	fi
	if run_fio "again-$i" 40 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=8k --size=4m --verify=crc32c --verify_fatal=1; then
		pass "plug-$i"
	else
		fail "plug-$i" "I/O fails on the new disk"
	fi
done
expect_errors end hotplug
finish
