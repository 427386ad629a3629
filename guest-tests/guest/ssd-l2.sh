#!/bin/bash
# Runs in a guest (L2) of a host (L1) whose SSD the daemon drives. The kernel's command line has what the host knows (ssd.NAME=VALUE), and what
# is to be done (ssd.phase=mission, shared, gone or late).
# shellcheck disable=SC2317 # what is called by name
# shellcheck source=guest-tests/guest/ssd-lib.sh
. "$(dirname -- "$0")/ssd-lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }
told() { tr ' ' '\n' </proc/cmdline | sed -n "s/^ssd\.$1=//p"; }
PHASE=$(told phase)
# for a slow machine
factor=$(told factor)
[[ $PHASE == gone || $PHASE == late ]] || subject
[[ $PHASE == gone || $PHASE == late ]] || echo "$NS_DEV: $((SIZE >> 20)) MiB in blocks of $LBA bytes, largest transfer $(<"/sys/block/$NS/queue/max_hw_sectors_kb") KiB"

# One fio: starting it is what costs under emulation. Sizes from a block to beyond what the SSD moves with one command, each at several
# depths, written in random order and read back.
verified() {
	local name=$1 depth bs
	shift
	{
		printf '[global]\nfilename=%s\ndirect=1\nrw=randwrite\nverify=crc32c\nverify_fatal=1\nrandrepeat=0\n' "$NS_DEV"
		for depth in "$@"; do
			for bs in 4096 16384 65536 131072 1048576; do
				printf '[bs%d-qd%d]\nstonewall\nioengine=%s\niodepth=%d\nbs=%d\nsize=%d\n' "$bs" "$depth" \
					"$( ((depth == 8)) && echo io_uring || echo libaio)" "$depth" "$bs" \
					$((bs * 48 < 6 << 20 ? bs * 48 : 6 << 20))
			done
		done
	} >"/tmp/$name.fio"
	if timeout $((100 * factor)) fio --output="/tmp/$name.out" "/tmp/$name.fio"; then
		pass "$name"
	else
		grep -E 'verify|error|err=|bad' "/tmp/$name.out" | head -n 20
		fail "$name" "fio ended with status $?"
	fi
}

# steady NAME READY SECONDS: verified I/O while the host does something; the line "READY ..." tells it when
steady() {
	local name=$1 rc=0
	timeout $((90 * factor)) fio --output="/tmp/$name.out" --name="$name" --filename="$NS_DEV" --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw \
		--bsrange=4k-128k --blockalign=4k --offset=64m --size=32m --verify=crc32c --verify_fatal=1 --verify_backlog=16 --randrepeat=0 \
		--time_based --runtime=$(($3 * factor)) &
	sleep 1
	echo "READY $2"
	wait $! || rc=$?
	((rc == 0)) || grep -E 'verify|error|err=|bad' "/tmp/$name.out" | head -n 10
	same "$name" 0 "$rc"
}

status_of() { nvme_status timeout $((20 * factor)) nvme "$@"; }
# code_of ...: type and code alone, without Do Not Retry and More
code_of() {
	local status
	status=$(status_of "$@")
	if [[ $status =~ ^(0|0x[0-9a-f]+)$ ]]; then printf '0x%x\n' $((status & 0x7ff)); else echo "$status"; fi
}

mission() {
	same size 256 $((SIZE >> 20))
	same block-size 4096 "$LBA"
	same vwc "$(told vwc)" "$(nvme id-ctrl "$CTRL_DEV" -o json | jq -r .vwc)"
	same host-data-read-by-guest "$(told host_sum)" "$(sum_of "$NS_DEV" 192 16)"
	verified sizes-and-depths 1 8 32
	steady reset-in-mid-io reset 6
	steady slow-in-mid-io slow 8

	expect_errors begin status
	same bad-read "$(told bad_read)" \
		"$(status_of read "$NS_DEV" --start-block=57344 --block-count=0 --data-size=4096 --data=/tmp/bad)"
	same bad-write "$(told bad_write)" \
		"$(status_of write "$NS_DEV" --start-block=58368 --block-count=0 --data-size=4096 --data=/bin/busybox)"
	if dd if="$NS_DEV" of=/dev/null bs=4096 skip=57344 count=1 iflag=direct 2>/dev/null; then
		fail bad-block "the kernel could read it"
	elif dmesg | grep -q 'critical medium error'; then
		pass bad-block
	else
		fail bad-block "the kernel did not take it for a medium error"
	fi
	expect_errors end status
	if nvme error-log "$CTRL_DEV" -e 8 -o json | jq -e '.errors[] | select(.lba == 57344)' >/tmp/error.json; then
		pass error-log
	else
		nvme error-log "$CTRL_DEV" -e 8 | head -n 40
		fail error-log "block 57344 is in no entry"
	fi
	dd if="$NS_DEV" of=/dev/null bs=4096 skip=57345 count=64 iflag=direct 2>/dev/null || fail after-errors "the next block cannot be read"

	random_at "$NS_DEV" 208 16
	echo "value guest_sum $(sum_of "$NS_DEV" 208 16)"
}

shared() {
	same size 96 $((SIZE >> 20))
	same host-data-read-by-guest "$(told host_sum)" "$(sum_of "$NS_DEV" 32 16)"
	steady beside-a-neighbour neighbour "$(told seconds)"
	verified sizes-and-depths 1 32
	# what is not ours
	expect_errors begin foreign
	same next-block 0x80 "$(code_of read "$NS_DEV" --start-block=$((SIZE / LBA)) --block-count=0 --data-size=4096 --data=/tmp/bad)"
	same last-block 0x0 "$(code_of read "$NS_DEV" --start-block=$((SIZE / LBA - 1)) --block-count=0 --data-size=4096 --data=/tmp/bad)"
	same format 0x1 "$(code_of admin-passthru "$CTRL_DEV" --opcode=0x80 --namespace-id=1)"
	same vendor-specific 0x1 "$(code_of admin-passthru "$CTRL_DEV" --opcode=0xc0 --namespace-id=1)"
	expect_errors end foreign
	random_at "$NS_DEV" 80 16
	echo "value guest_sum $(sum_of "$NS_DEV" 80 16)"
}

# gone_within NAME PID OUTPUT: fio ends, with an error, and soon
gone_within() {
	local start=$SECONDS
	while kill -0 "$2" 2>/dev/null && ((SECONDS - start < 60 * factor)); do sleep 0.2; done
	if kill -0 "$2" 2>/dev/null; then
		fail "$1" "fio still waits after $((60 * factor)) s"
		kill -KILL "$2"
	elif wait "$2"; then
		fail "$1" "fio saw nothing of it"
	else
		pass "$1 (an error after $((SECONDS - start)) s)"
	fi
}
busy() { # NAME PCI-ADDRESS: sets DISK and FIO
	subject "$2"
	DISK=$NS_DEV
	timeout $((120 * factor)) fio --output="/tmp/$1.out" --direct=1 --filename="$DISK" --name="$1" --ioengine=libaio --iodepth=16 --rw=randrw --bs=4k \
		--norandommap --time_based --runtime=$((100 * factor)) 2>/dev/null &
	FIO=$!
}
# The disk of slot 5 goes away without a word, then that of slot 6 after it was asked for.
gone() {
	local sudden sudden_fio polite polite_fio start=$SECONDS
	expect_errors begin gone
	busy sudden 0000:00:05.0
	sudden=$DISK sudden_fio=$FIO
	busy polite 0000:00:06.0
	polite=$DISK polite_fio=$FIO
	sleep 1
	echo "READY sudden"
	gone_within sudden "$sudden_fio"
	if kill -0 "$polite_fio" 2>/dev/null; then pass neighbour-goes-on; else fail neighbour-goes-on "its fio has ended"; fi
	echo "READY polite"
	gone_within polite "$polite_fio"
	start=$SECONDS
	for disk in "$sudden" "$polite"; do
		! timeout $((30 * factor)) dd if="$disk" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null || fail dead "$disk can still be read"
	done
	if ((SECONDS - start < 20 * factor)); then pass refused-at-once; else fail refused-at-once "it took $((SECONDS - start)) s"; fi
}

# Both disks' SSDs are slower than they may be, and are reset for it: that of slot 5 takes up what was out again, that of slot 6 lets it fail.
# The guest itself tries nothing twice.
late() {
	local fails_fio data
	same no-retries 0 "$(</sys/module/nvme_core/parameters/max_retries)"
	expect_errors begin late
	busy fails 0000:00:06.0
	fails_fio=$FIO
	subject 0000:00:05.0
	steady again late 16
	gone_within fails "$fails_fio"
	expect_errors end late
	subject 0000:00:06.0
	random_at "$NS_DEV" 16 8
	data=$(sum_of "$NS_DEV" 16 8)
	same fails-serves-again "$data" "$(sum_of "$NS_DEV" 16 8)"
}

case $PHASE in
mission | shared | gone | late) "$PHASE" ;;
*)
	echo "ssd-l2: unknown phase '$PHASE'" >&2
	exit 2
	;;
esac
finish
