#!/bin/bash
# A file system on the namespace: mkfs.ext4, copy a tree, sync, unmount, mount again, compare, trim, check.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

mnt=/mnt/fs
mkdir -p $mnt
sums() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 md5sum); }
drop_caches() {
	blockdev --flushbufs "$NS_DEV"
	echo 3 >/proc/sys/vm/drop_caches
}

if ! mkfs.ext4 -q -F "$NS_DEV" >/tmp/mkfs.log 2>&1; then
	fail mkfs "$(tail -n 3 /tmp/mkfs.log)"
	finish
fi
pass mkfs
mount -t ext4 "$NS_DEV" $mnt || {
	fail mount "the new file system does not mount"
	finish
}
# the guest's own programs, and many small files
mkdir -p $mnt/tree/small
cp -a /bin /lib $mnt/tree/
for i in {1..300}; do
	printf 'file %d\n%s\n' "$i" "$RANDOM$RANDOM$RANDOM" >"$mnt/tree/small/$i"
done
head -c 8388608 /dev/urandom >$mnt/tree/random
sync
sums $mnt/tree >/tmp/before
umount $mnt
drop_caches
mount -t ext4 "$NS_DEV" $mnt
sums $mnt/tree >/tmp/after
count=$(wc -l </tmp/before)
if ((count < 300)); then
	fail compare "only $count files were copied"
elif cmp -s /tmp/before /tmp/after; then
	pass "compare ($count files)"
else
	fail compare "$(diff /tmp/before /tmp/after | head -n 3)"
fi

rm -rf $mnt/tree/lib $mnt/tree/random
sync
if [[ $(<"/sys/block/$NS/queue/discard_max_bytes") == 0 ]]; then
	skip trim "the namespace has no deallocate"
elif fstrim $mnt; then
	pass trim
else
	fail trim "fstrim ended with status $?"
fi
umount $mnt
drop_caches
mount -t ext4 "$NS_DEV" $mnt
sums $mnt/tree >/tmp/after
if grep -vE ' \./(lib/|random$)' /tmp/before | cmp -s - /tmp/after; then
	pass after-trim
else
	fail after-trim "the files that were kept are not what they were"
fi
umount $mnt
if e2fsck -f -n "$NS_DEV" >/tmp/e2fsck.log 2>&1; then
	pass e2fsck
else
	fail e2fsck "$(tail -n 5 /tmp/e2fsck.log)"
fi
finish
