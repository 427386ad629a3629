#!/bin/bash
# Two namespaces of one controller, of 512 and 4096 bytes a block: each has its own size and blocks, verified I/O on both at once, and
# neither sees what the other holds.
# usage: namespaces.sh NSID:BLOCK-SIZE:BYTES...
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
wants=("$@")
subject

declare -A disk=()
for want in "${wants[@]}"; do
	IFS=: read -r nsid lba bytes <<<"$want"
	for dir in /sys/block/nvme*n*; do
		[[ -e $dir/nsid && $(<"$dir/nsid") == "$nsid" ]] && disk[$nsid]=/dev/${dir##*/}
	done
	if [[ -z ${disk[$nsid]:-} ]]; then
		fail "namespace-$nsid" "there is no disk for it"
		finish
	fi
	dev=${disk[$nsid]}
	if (($(blockdev --getss "$dev") != lba || $(blockdev --getsize64 "$dev") != bytes)); then
		fail "namespace-$nsid" "$dev: blocks of $(blockdev --getss "$dev"), $(blockdev --getsize64 "$dev") bytes; wanted $want"
	else
		pass "namespace-$nsid ($dev)"
	fi
done

# Different ids, and found again under names that do not move
if (($(for dev in "${disk[@]}"; do cat "/sys/block/${dev##*/}/wwid"; done | sort -u | wc -l) == ${#disk[@]})); then
	pass wwid
else
	fail wwid "the namespaces share one"
fi

# The last block of each is its own: a mark at both ends that the other's I/O must not touch
declare -A mark=()
for nsid in "${!disk[@]}"; do
	dev=${disk[$nsid]} size=$(blockdev --getsize64 "${disk[$nsid]}")
	head -c 4096 /dev/urandom >"/tmp/mark-$nsid"
	dd if="/tmp/mark-$nsid" of="$dev" bs=4096 oflag=direct 2>/dev/null
	dd if="/tmp/mark-$nsid" of="$dev" bs=4096 oflag=direct,seek_bytes seek=$((size - 4096)) 2>/dev/null
	mark[$nsid]=$(md5sum <"/tmp/mark-$nsid")
done
jobs=()
for nsid in "${!disk[@]}"; do
	timeout 90 fio --output="/tmp/fio-$nsid.out" --direct=1 --filename="${disk[$nsid]}" --name="ns$nsid" --ioengine=libaio --iodepth=16 \
		--offset=4k --size=12m --rw=randwrite --bssplit=4k/60:32k/30:256k/10 --verify=crc32c --verify_fatal=1 --randrepeat=0 &
	jobs+=("$!")
done
i=0
for nsid in "${!disk[@]}"; do
	if wait "${jobs[i]}"; then
		pass "verify-$nsid"
	else
		fail "verify-$nsid" "$(grep -E 'verify|error|err=|bad' "/tmp/fio-$nsid.out" | sed -n 1p)"
	fi
	i=$((i + 1))
done
for nsid in "${!disk[@]}"; do
	dev=${disk[$nsid]} size=$(blockdev --getsize64 "${disk[$nsid]}")
	first=$(dd if="$dev" bs=4096 count=1 iflag=direct 2>/dev/null | md5sum)
	last=$(dd if="$dev" bs=4096 count=1 iflag=direct,skip_bytes skip=$((size - 4096)) 2>/dev/null | md5sum)
	if [[ $first == "${mark[$nsid]}" && $last == "${mark[$nsid]}" ]]; then
		pass "alone-$nsid"
	else
		fail "alone-$nsid" "its first or last blocks have changed"
	fi
done
finish
