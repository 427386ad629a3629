#!/bin/bash
# Memory that is plugged while the guest runs: waits for it ("READY memory" on the console), puts it online as movable memory, which the
# kernel gives to programs first, and does verified I/O whose buffers lie in it; then waits until it has been taken away again
# ("READY unplug") and does I/O once more.
# usage: memory.sh MIB   (what will be plugged)
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
mib=$1
subject

total() { awk '$1 == "MemTotal:" {print int($2 / 1024)}' /proc/meminfo; }
# pages of the movable zone in use
movable_used() { awk '/^Node/ {zone = $4} zone == "Movable" && $1 == "managed" {m += $2} zone == "Movable" && $1 == "pages" {f += $3} END {print m - f}' /proc/zoneinfo; }
# buffers of 4 jobs x 32 x 1 MiB
buffers=128
verify() {
	fio --output="/tmp/fio-$1.out" --direct=1 --filename="$NS_DEV" --name="$1" --ioengine=libaio --iodepth=32 --numjobs=4 --bs=1m \
		--offset_increment=64m --size=64m --rw=randwrite --verify=crc32c --verify_fatal=1 --group_reporting=1 --loops="${2:-1}"
}

if [[ ! -w /sys/devices/system/memory/auto_online_blocks ]]; then
	skip hotplug "this kernel cannot take memory"
	echo "READY memory"
	echo "READY unplug"
	finish
fi
echo online_movable >/sys/devices/system/memory/auto_online_blocks
before=$(total)
echo "READY memory"
end=$((SECONDS + 30))
while (($(total) < before + mib * 9 / 10 && SECONDS < end)); do sleep 0.2; done
if (($(total) < before + mib * 9 / 10)); then
	fail plugged "$before MiB before, $(total) MiB after 30 s"
	echo "READY unplug"
	finish
fi
pass "plugged ($before to $(total) MiB)"

idle=$(movable_used)
verify plugged 2 &
fio=$!
most=0
while kill -0 $fio 2>/dev/null; do
	now=$(movable_used)
	((now <= most)) || most=$now
	sleep 0.2
done
if wait $fio; then
	pass io
else
	fail io "$(grep -E 'verify|error|err=|bad' /tmp/fio-plugged.out | sed -n 1p)"
fi
# in pages of 4 KiB: a good part of the buffers was there
used=$(((most - idle) / 256))
if ((used >= buffers / 2)); then
	pass "in-new-memory ($used MiB of buffers)"
else
	fail in-new-memory "only $used MiB of the plugged memory were in use"
fi

echo "READY unplug"
end=$((SECONDS + 30))
while (($(total) > before + 16 && SECONDS < end)); do sleep 0.2; done
if (($(total) > before + 16)); then
	fail unplugged "$(total) MiB after 30 s"
else
	pass "unplugged ($(total) MiB)"
fi
if run_fio after 60 --ioengine=libaio --iodepth=16 --numjobs=2 --offset_increment=32m --size=8m --rw=randwrite --bs=64k --verify=crc32c \
	--verify_fatal=1; then
	pass after
else
	fail after "I/O fails after the memory is gone"
fi
finish
