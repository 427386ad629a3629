#!/bin/bash
# The machine is reset while fio runs ("READY reset" on the console asks for it) and boots again: what was written and flushed before is
# there, and I/O works. The same script runs in both boots and knows the second by a mark on the disk.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject

at=$((64 << 20)) # behind what fio writes to
read_at() { dd if="$NS_DEV" bs=4096 iflag=direct,skip_bytes skip=$((at + $1)) count="$2" 2>/dev/null; }
if [[ $(read_at 0 1 | head -c 12 | tr -d "\0") != vhost-reboot ]]; then
	head -c $((1 << 20)) /dev/urandom >/tmp/data
	dd if=/tmp/data of="$NS_DEV" bs=4096 oflag=direct,seek_bytes seek=$((at + 4096)) 2>/dev/null
	{
		printf 'vhost-reboot %s\n' "$(md5sum </tmp/data | cut -d ' ' -f 1)"
		head -c 4096 /dev/zero
	} | head -c 4096 >/tmp/mark
	dd if=/tmp/mark of="$NS_DEV" bs=4096 oflag=direct,seek_bytes seek=$at conv=fsync 2>/dev/null
	fio --output=/dev/null --direct=1 --filename="$NS_DEV" --name=reboot --ioengine=libaio --iodepth=32 --numjobs=2 --size=60m --rw=randrw --bs=16k \
		--norandommap --time_based --runtime=90 &
	sleep 1
	echo "READY reset"
	sleep 60
	fail reset "nobody reset the machine"
	finish
fi
sum=$(read_at 0 1 | head -n 1 | cut -d ' ' -f 2)
if [[ $(read_at 4096 256 | md5sum | cut -d ' ' -f 1) == "$sum" ]]; then
	pass data
else
	fail data "what was written before the reset is not what is read after it"
fi
if run_fio after 40 --ioengine=libaio --iodepth=16 --numjobs=2 --offset_increment=16m --size=8m --rw=randwrite --bs=8k --verify=crc32c \
	--verify_fatal=1; then
	pass io
else
	fail io "I/O fails after the reset"
fi
finish
