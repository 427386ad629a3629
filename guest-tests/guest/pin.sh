#!/bin/bash
# Verified I/O of a guest that has the interrupt pin and no MSI (pci=nomsi): it interrupts for the I/O, and Linux has not turned it off.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

# Interrupts of the pin so far, of all CPUs; nothing where there is no pin.
interrupts() { awk '/IO-APIC.*nvme/ {for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i; found = 1} END {if (found) print n}' /proc/interrupts; }

before=$(interrupts)
if [[ -z $before ]] || grep -qE 'MSI.*nvme' /proc/interrupts; then
	fail pin "the controller has other interrupts than the pin: $(grep nvme /proc/interrupts)"
	finish
fi
for depth in 1 32; do
	if run_fio "pin-$depth" 30 --ioengine=libaio --iodepth="$depth" --numjobs=2 --offset_increment=16m --size=2m --rw=randwrite \
		--bssplit="$LBA/30:4k/50:64k/20" --blockalign="$LBA" --verify=crc32c --verify_fatal=1 --do_verify=1 --randrepeat=0; then
		pass "verify-$depth"
	else
		fail "verify-$depth" "fio failed"
	fi
done
after=$(interrupts)
# What is polled after a timeout is a command in 30 s: these are interrupts.
if ((after >= before + 50)); then pass "interrupts ($((after - before)))"; else fail interrupts "only $((after - before)) of them"; fi
finish
