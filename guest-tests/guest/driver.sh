#!/bin/bash
# The driver's life: controller reset, rescan, function reset in the middle of verified I/O (no error may be seen), unbind and bind
# between I/O and in the middle of it (errors are expected then, a hang is not), PCI remove and rescan.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

driver=/sys/bus/pci/drivers/nvme
device=/sys/bus/pci/devices/$PCI
fio_pid=

# start_fio ARG...: in the background; what it says goes to a file
start_fio() {
	timeout 90 fio --output=/tmp/driver.out --direct=1 --filename="$NS_DEV" --name=driver --ioengine=libaio --numjobs=2 \
		--offset_increment=32m --bs=4k --rw=randwrite --group_reporting=1 --randrepeat=0 "$@" 2>/tmp/driver.err &
	fio_pid=$!
	sleep 0.7
}
# writes for about 3 s at a steady rate, then reads all of it back and checks it
steady=(--iodepth=8 --size=4m --rate_iops=400 --verify=crc32c --verify_fatal=1 --do_verify=1)
# as much as goes, until an error ends it
full=(--iodepth=32 --size=32m --norandommap --time_based --runtime=15)
fio_runs() { kill -0 "$fio_pid" 2>/dev/null; }
end_fio() {
	local rc=0
	wait "$fio_pid" || rc=$?
	if ((rc)); then cat /tmp/driver.err /tmp/driver.out | grep -E 'verify|error|err=|bad' | head -n 10 || true; fi
	return "$rc"
}
quick_verify() {
	run_fio quick 40 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=8k --size=2m --verify=crc32c --verify_fatal=1
}

# disturb NAME CMD...: CMD again and again while fio verifies; fio must not see any of it.
disturb() {
	local name=$1 times=0 bad='' rc=0
	shift
	start_fio "${steady[@]}"
	while fio_runs && ((times < 12)); do
		if ! "$@" 2>/tmp/disturb.err; then
			bad="'$*' failed: $(tail -n 1 /tmp/disturb.err)"
			break
		fi
		times=$((times + 1))
		if ! wait_subject 20; then
			bad="the controller is not live again after '$*' number $times"
			break
		fi
		sleep 0.4
	done
	end_fio || rc=$?
	if [[ -n $bad ]]; then
		fail "$name" "$bad"
	elif ((rc)); then
		fail "$name" "fio saw errors (status $rc) over $times times"
	elif ((times < 2)); then
		fail "$name" "fio ended before there was anything to see"
	else
		pass "$name ($times times)"
	fi
}

if wanted reset; then disturb reset nvme reset "$CTRL_DEV"; fi
if wanted rescan; then disturb rescan nvme ns-rescan "$CTRL_DEV"; fi
if wanted function-reset; then
	if [[ -w $device/reset ]]; then
		# shellcheck disable=SC2317 # called by name
		function_reset() { echo 1 >"$device/reset"; }
		disturb function-reset function_reset
	else
		skip function-reset "the function has no reset method"
	fi
fi

unbind() { echo "$PCI" >$driver/unbind; }
bind() { echo "$PCI" >$driver/bind; }

if wanted rebind; then
	bad=
	for i in 1 2 3; do
		unbind || bad="unbind number $i failed"
		[[ ! -e $NS_DEV ]] || bad="$NS_DEV is still there after unbind number $i"
		bind || bad="bind number $i failed"
		wait_subject 20 || bad="no namespace after bind number $i"
		[[ -z $bad ]] || break
		quick_verify || bad="I/O fails after bind number $i"
	done
	if [[ -n $bad ]]; then fail rebind "$bad"; else pass rebind; fi
fi

# unbind_under_io NAME HOW BACK: takes the device away under a running fio
unbind_under_io() {
	local name=$1 how=$2 back=$3 i bad='' start
	expect_errors begin "$name"
	for i in 1 2; do
		start_fio "${full[@]}"
		start=$SECONDS
		"$how" || bad="$how number $i failed"
		while fio_runs && ((SECONDS - start < 40)); do sleep 0.2; done
		if fio_runs; then
			bad="fio hangs since $how number $i"
			break
		fi
		if wait "$fio_pid"; then bad="fio saw nothing of $how number $i"; fi
		"$back" || bad="$back number $i failed"
		wait_subject 20 || bad="no namespace after $back number $i"
		[[ -z $bad ]] || break
	done
	expect_errors end "$name"
	if [[ -z $bad ]] && ! quick_verify; then bad="I/O fails afterwards"; fi
	if [[ -n $bad ]]; then fail "$name" "$bad"; else pass "$name"; fi
}

if wanted unbind-under-io; then unbind_under_io unbind-under-io unbind bind; fi
# shellcheck disable=SC2317 # called by name
pci_remove() { echo 1 >"$device/remove"; }
# shellcheck disable=SC2317 # called by name
pci_rescan() { echo 1 >/sys/bus/pci/rescan; }
if wanted remove-under-io; then unbind_under_io remove-under-io pci_remove pci_rescan; fi
finish
