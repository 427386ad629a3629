#!/bin/bash
# Runs in a guest that has an emulated SSD, and in it our daemon with the SSD's namespaces passed through: the conformance suite of the
# backends on two formats and on a polled block device, the virtual guest on a whole disk with the kernel's own driver as the witness, errors of the medium, and what
# is refused. Namespaces: 1 with blocks of 512 bytes, 2 of 4096, 3 with metadata, 4 with bad blocks.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }

# The kernel's numbers are not the NSIDs: SSD[nsid] is the generic device, DISK[nsid] the block device.
SSD=() DISK=()
find_namespaces() {
	local dir name
	for dir in /sys/block/nvme0n*; do
		[[ -e $dir/nsid ]] || continue
		name=${dir##*/}
		DISK[$(<"$dir/nsid")]=/dev/$name SSD[$(<"$dir/nsid")]=/dev/ng${name#nvme}
	done
}
for _ in {1..50}; do
	find_namespaces
	((${#SSD[@]} < 4)) || break
	sleep 0.1
done
for n in 1 2 3 4; do
	[[ -c ${SSD[n]:-} && -b ${DISK[n]} ]] || fail "namespace-$n" "it has no generic device"
done
((failures == 0)) || finish

# check NAME VARIABLE=VALUE... PROGRAM TEST: one test of a test program; it must have run
check() {
	local name=$1 out=/tmp/$1.out
	shift
	local program=${*: -2:1} test=${*: -1}
	if env TMPDIR=/tmp VHOST_USER_NVME_BIN=/bin/vhost-user-nvme "${@:1:$#-2}" "$program" --exact "$test" --nocapture >"$out" 2>&1 &&
		grep -q '1 passed' "$out" && ! grep -q 'NOT TESTED' "$out"; then
		pass "$name"
	else
		tail -n 30 "$out"
		fail "$name" "see above"
	fi
}
# refused NAME REGEX PATH
refused() {
	local name=$1 regex=$2 out
	if out=$(vhost-user-nvme --socket-path /tmp/refused.sock --check-config --namespace "nvme-passthrough,path=$3" 2>&1); then
		fail "$name" "it was taken: $out"
	elif [[ $out =~ $regex ]]; then
		pass "$name"
	else
		fail "$name" "it says: $out"
	fi
}

refused metadata 'bytes of metadata' "${SSD[3]}"
refused no-generic-device 'is no NVMe generic device' /dev/nvme0
check conformance "VHOST_USER_NVME_TEST_SSDS=${SSD[1]}:${SSD[2]}" backend-tests backend::tests::devices::passed_through_ssds_conform
if [[ $(<"/sys/block/${DISK[1]#/dev/}/queue/io_poll") == 1 ]]; then
	check iopoll "VHOST_USER_NVME_TEST_IOPOLL=${DISK[1]}" backend-tests backend::tests::devices::polled_devices_conform
else
	fail iopoll "nvme.poll_queues gave the disk no queues to be polled"
fi
for n in 1 2; do
	check "data-$n" "VHOST_USER_NVME_TEST_SSD=${SSD[n]}" virtual-guest \
		passthrough::what_the_guest_writes_is_on_the_ssd_and_the_other_way_round
done
expect_errors begin passthrough
check errors "VHOST_USER_NVME_TEST_BAD_SSD=${SSD[4]}" virtual-guest passthrough::errors_of_the_ssd_are_the_guests
expect_errors end passthrough

# Somebody who has it mounted keeps it.
mkdir -p /mnt/ssd
if mkfs.ext4 -q "${DISK[1]}" && mount -t ext4 "${DISK[1]}" /mnt/ssd; then
	refused mounted "in use through ${DISK[1]}" "${SSD[1]}"
	umount /mnt/ssd
	if vhost-user-nvme --socket-path /tmp/s --check-config --namespace "nvme-passthrough,path=${SSD[1]}" >/tmp/again.out 2>&1; then
		pass unmounted
	else
		fail unmounted "$(</tmp/again.out)"
	fi
else
	fail mounted "no file system could be made and mounted"
fi
finish
