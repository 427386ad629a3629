#!/bin/bash
# Deallocate and Write Zeroes: what was discarded reads as the namespace promises, its neighbours stay, it can be written again.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

region=$((4 << 20))
# nonzero OFFSET LENGTH: how many bytes of the range are not zero, read from the device
nonzero() { dd if="$NS_DEV" iflag=direct,skip_bytes,count_bytes bs=64k skip="$1" count="$2" 2>/dev/null | tr -d '\0' | wc -c; }
sum() { dd if="$NS_DEV" iflag=direct,skip_bytes,count_bytes bs=64k skip="$1" count="$2" 2>/dev/null | md5sum; }
fill() { head -c "$2" /dev/zero | tr '\0' '\245' | dd of="$NS_DEV" oflag=direct,seek_bytes iflag=fullblock bs=256k seek="$1" 2>/dev/null; }

if [[ $(<"/sys/block/$NS/queue/discard_max_bytes") == 0 ]]; then
	skip discard "the namespace has no deallocate"
	finish
fi
dlfeat=$(nvme id-ns "$NS_DEV" -o json | jq .dlfeat)
zeroes=
((dlfeat % 8 == 1)) && zeroes=1
granularity=$(<"/sys/block/$NS/queue/discard_granularity")

fill 0 $((2 * region))
[[ $(nonzero 0 $region) == "$region" ]] || fail fill "the pattern does not read back"

after=$(sum $region $region)
if ! blkdiscard -o 0 -l $region "$NS_DEV"; then
	fail range "blkdiscard ended with status $?"
elif [[ -n $zeroes && $(nonzero 0 $region) != 0 ]]; then
	fail range "DLFEAT promises zeroes, but $(nonzero 0 $region) bytes are not"
elif [[ $(sum $region $region) != "$after" ]]; then
	fail range "the blocks after the range have changed"
else
	pass "range (DLFEAT $dlfeat)"
fi

# one granule in the middle of written blocks
at=$((region + 4 * granularity))
before=$(sum $region $((4 * granularity)))
behind=$(sum $((at + granularity)) $((4 * granularity)))
if ! blkdiscard -o $at -l "$granularity" "$NS_DEV"; then
	fail granule "blkdiscard ended with status $?"
elif [[ $(sum $region $((4 * granularity))) != "$before" || $(sum $((at + granularity)) $((4 * granularity))) != "$behind" ]]; then
	fail granule "a neighbour has changed"
elif [[ -n $zeroes && $(nonzero $at "$granularity") != 0 ]]; then
	fail granule "DLFEAT promises zeroes"
else
	pass "granule ($granularity bytes)"
fi

if run_fio again 60 --ioengine=libaio --iodepth=8 --rw=randwrite --bs=16k --size=$region --verify=crc32c --verify_fatal=1; then
	pass write-again
else
	fail write-again "what was discarded does not keep new data"
fi

fill 0 $region
if ! blkdiscard -z -o "$LBA" -l $((region - 2 * LBA)) "$NS_DEV"; then
	fail zeroes "write zeroes ended with status $?"
elif [[ $(nonzero "$LBA" $((region - 2 * LBA))) != 0 ]]; then
	fail zeroes "the range is not zero"
elif [[ $(nonzero 0 "$LBA") != "$LBA" || $(nonzero $((region - LBA)) "$LBA") != "$LBA" ]]; then
	fail zeroes "the block before or after the range has changed"
else
	pass zeroes
fi

# trims among writes, every block checked
if run_fio mixed 60 --ioengine=io_uring --iodepth=16 --rw=randtrimwrite --bs=64k --size=$region --verify=crc32c --verify_fatal=1; then
	pass trim-write
else
	fail trim-write "trims among writes"
fi

# all of it
if ! blkdiscard "$NS_DEV"; then
	fail whole "blkdiscard of the whole namespace ended with status $?"
elif [[ -n $zeroes && ($(nonzero 0 $region) != 0 || $(nonzero $((SIZE - LBA)) "$LBA") != 0) ]]; then
	fail whole "DLFEAT promises zeroes"
else
	pass whole
fi
finish
