#!/bin/bash
# Verified I/O: every block size from the LBA size to 1 MiB at depths 1 to 64, two jobs at once, crc32c over every block;
# then mixed sizes, reads among writes, over libaio and io_uring. VERIFY_MIB=2: fewer bytes of each size and depth, where it is done for
# the way they go and not for them.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

# fio is started once per depth (starting it is what costs under emulation); the block sizes are phases of one run. Each job has
# its own 64 MiB.
span=$((64 << 20)) most=$((${VERIFY_MIB:-6} << 20))
((SIZE >= 2 * span)) || {
	fail size "$NS_DEV has $SIZE bytes, 128 MiB are needed"
	finish
}

job_file() {
	local depth=$1 engine=$2 bs count size
	cat <<-GLOBAL
		[global]
		filename=$NS_DEV
		direct=1
		ioengine=$engine
		iodepth=$depth
		numjobs=2
		offset_increment=$span
		group_reporting=1
		rw=randwrite
		verify=crc32c
		verify_fatal=1
		do_verify=1
		randrepeat=0
	GLOBAL
	for bs in $(at_least "$LBA" 512 1024 4096 16384 65536 131072 262144 524288 1048576); do
		# enough requests to fill the depth, few enough bytes to be quick under emulation
		count=$((depth > 32 ? 192 : 96))
		size=$((bs * count))
		((size <= most)) || size=$most
		((depth < 64 || size >= bs * 32)) || size=$((bs * 32))
		printf '[bs%d-qd%d]\nstonewall\nbs=%d\nsize=%d\n' "$bs" "$depth" "$bs" "$size"
	done
}

for depth in 1 2 8 32 64; do
	engine=libaio
	case $depth in 8 | 64) engine=io_uring ;; esac
	job_file "$depth" "$engine" >"/tmp/qd$depth.fio"
	start=$SECONDS
	if timeout 150 fio --output="/tmp/qd$depth.out" "/tmp/qd$depth.fio"; then
		pass "qd$depth ($engine, $((SECONDS - start)) s)"
	else
		fail "qd$depth" "fio with $engine ended with status $?"
		grep -E 'verify|error|err=|bad' "/tmp/qd$depth.out" | head -n 20
	fi
done

small=$LBA
# sizes that are no power of two: PRP lists that start and end within pages
if run_fio mixed 60 --ioengine=io_uring --iodepth=16 --numjobs=2 --offset_increment=$span --size=8m --rw=randrw --rwmixwrite=60 \
	--bssplit="$small/20:$((small * 3))/20:$((small * 7))/10:4k/20:20k/10:68k/10:132k/5:1m/5" --bs_unaligned=0 --blockalign="$small" \
	--verify=crc32c --verify_fatal=1 --verify_backlog=64 --randrepeat=0; then
	pass mixed
else
	fail mixed "sizes mixed, reads among writes"
fi

# buffered, with the page cache's own request sizes and flushes
if run_fio buffered 60 --direct=0 --ioengine=psync --numjobs=2 --offset_increment=$span --size=4m --rw=write --bs=4k --fsync=128 \
	--end_fsync=1 --verify=crc32c --verify_fatal=1; then
	pass buffered
else
	fail buffered "through the page cache, with fsync"
fi
finish
