#!/bin/bash
# Verified I/O while the daemon is killed and started again ("READY running" tells when it may begin): several sizes and depths, two jobs,
# fsync, and a reader with one command at a time, whose slowest commands say how long the guest's I/O stood still. Nothing may fail, nothing may be
# wrong, the kernel may notice nothing. What is wanted of the times is those of the COUNT slowest commands: one for each kill.
# usage: recovery.sh SECONDS COUNT all|one [CONTROLLER]      one: with nothing beside the reader
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
[[ ${1:-} =~ ^[0-9]+$ && ${2:-} =~ ^[0-9]+$ && ${3:-} =~ ^(all|one)$ ]] || set -- --help
seconds=$1 count=$2 load=$3
shift 3
subject "$@"

# 8 MiB of random data, then a copy of it that is made again and again; fio has what follows.
mib=$((1 << 20))
dd if=/dev/urandom of=/tmp/pattern bs=1M count=8 2>/dev/null
dd if=/tmp/pattern of="$NS_DEV" bs=1M oflag=direct 2>/dev/null

cat >/tmp/recovery.fio <<FIO
[global]
filename=$NS_DEV
direct=1
time_based
runtime=$seconds
randrepeat=0
norandommap
verify=crc32c
verify_fatal=1
verify_backlog=64
rw=randrw

FIO
if [[ $load == all ]]; then
	cat >>/tmp/recovery.fio <<FIO
[small]
ioengine=libaio
iodepth=32
numjobs=2
bs=4k
offset=$((16 * mib))
offset_increment=$((16 * mib))
size=16m

[mixed]
ioengine=io_uring
iodepth=8
bsrange=4k-256k
blockalign=4k
offset=$((48 * mib))
size=16m

[synced]
ioengine=psync
bs=16k
fsync=8
rw=randwrite
offset=$((64 * mib))
size=8m

FIO
fi
cat >>/tmp/recovery.fio <<FIO
[one]
ioengine=psync
verify=0
rw=randread
bs=4k
offset=0
size=8m
write_lat_log=/tmp/one
FIO
(cd /tmp && exec timeout $((seconds + 60)) fio --output=/tmp/recovery.out /tmp/recovery.fio) &
fio=$!
sleep 1
kill -0 "$fio" 2>/dev/null || { cat /tmp/recovery.out && fail fio "it did not start"; }
echo "READY running"

copies=0
while kill -0 "$fio" 2>/dev/null; do
	dd if="$NS_DEV" of="$NS_DEV" bs=256k count=32 seek=32 iflag=direct oflag=direct 2>/dev/null || fail copy "dd failed"
	copies=$((copies + 1))
done
if wait "$fio"; then
	pass "fio ($copies copies beside it)"
else
	grep -E 'verify|error|err=|bad' /tmp/recovery.out | head -n 20
	fail fio "it ended with status $?"
fi
for at in 0 8; do
	if dd if="$NS_DEV" bs=1M skip=$at count=8 iflag=direct 2>/dev/null | cmp - /tmp/pattern; then pass "compare-$at"; else fail "compare-$at" "the data is not what was written"; fi
done
errors=$(dmesg | grep -iE 'nvme.*(timeout|reset|abort|fail|removing)|I/O error|blocked for more' | head -n 5 || true)
if [[ -z $errors ]]; then pass kernel-noticed-nothing; else fail kernel-noticed-nothing "$errors"; fi

# time in ms, latency in ns, ...
sort -t , -k 2 -n -r /tmp/one_lat.*.log >/tmp/slowest
awk -F , -v count="$count" '
	NR <= count { ms[NR] = $2 / 1e6; n = NR }
	function at(share) { return ms[int(n * (1 - share)) + 1] }
	END { printf "value standstill p50 %d ms, p90 %d ms, p99 %d ms, max %d ms of %d\n", at(0.5), at(0.9), at(0.99), ms[1], n }' /tmp/slowest
finish
