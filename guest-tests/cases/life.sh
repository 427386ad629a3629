# shellcheck shell=bash
# What happens around a disk while it is used: the machine, QEMU and the daemon come and go.

_running() { # NAME: a guest that keeps the disk of DEVICE busy
	guest_start "$1" --timeout 140 -- "${DEVICE[@]}" -- "./running.sh ${2:-120}"
	guest_ready running 60
}

unplug_case() {
	daemon_single "$CASE_DIR" --namespace memory,size=256M
	local i
	guest_start vm --kernel "$1" --timeout 140 -- -device pcie-root-port,id=rp1,chassis=1,slot=1 \
		-device "vhost-user-nvme,id=disk,bus=rp1,socket=$NVME_SOCKET" -- "./hotplug.sh 2" ./dmesg-clean.sh
	for i in 1 2; do
		guest_ready "unplug $i" 60
		vm_qmp '{"execute":"device_del","arguments":{"id":"disk"}}' || broken "QEMU refuses to unplug"
		guest_ready "plug $i" 60
		_plug_again
	done
	guest_passes
	daemon_fine
}
# QEMU lets go of the old device a moment after the guest has.
_plug_again() {
	local i
	for i in {1..50}; do
		if vm_qmp "{\"execute\":\"device_add\",\"arguments\":{\"driver\":\"vhost-user-nvme\",\"id\":\"disk\",\"bus\":\"rp1\",\"socket\":\"$NVME_SOCKET\"}}"; then
			return 0
		fi
		sleep 0.2
	done
	broken "QEMU refuses to plug"
}

reset_case() {
	daemon_single "$CASE_DIR" --namespace memory,size=256M
	nvme_device "$NVME_SOCKET"
	guest_start vm --timeout 140 -- "${DEVICE[@]}" -action reboot=reset -- ./reboot.sh ./dmesg-clean.sh
	guest_ready reset 60
	vm_qmp '{"execute":"system_reset"}' || broken "QEMU refuses to reset"
	guest_passes
	daemon_fine
}

# daemon_gone_case SIGNAL: for ever; the guest must survive it, QEMU says what happened in one line
daemon_gone_case() {
	local signal=$1 lines
	daemon_single "$CASE_DIR" --namespace memory,size=256M
	nvme_device "$NVME_SOCKET" reconnect-delay=0
	# 30 s would be the driver's own patience
	guest_start vm --append nvme_core.io_timeout=8 -- "${DEVICE[@]}" -- ./gone.sh
	guest_ready gone 60
	if [[ $signal == KILL ]]; then
		kill -KILL "$DAEMON_PID"
		wait "$DAEMON_PID" || true
	else
		daemon_fine
	fi
	guest_passes
	lines=$(grep -c . "$VM_OUT/qemu.log" || true)
	((lines == 1)) || broken "QEMU printed $lines lines, not one"
	grep -q 'the disk is gone' "$VM_OUT/qemu.log" || broken "QEMU does not say that the disk is gone"
}

qemu_killed_case() {
	local pid i
	daemon_single "$CASE_DIR" --namespace memory,size=512M
	pid=$DAEMON_PID
	nvme_device "$NVME_SOCKET"
	for i in 1 2; do
		_running "killed$i"
		kill -KILL "$VM_PID"
		vm_stop
	done
	guest_run after --timeout 140 -- "${DEVICE[@]}" -- 'VERIFY_MIB=2 ./fio-verify.sh' ./dmesg-clean.sh
	[[ $DAEMON_PID == "$pid" ]] || broken "the daemon is another"
	daemon_fine
}

# Four controllers of one daemon, a guest with one disk and a guest with two at the same time, one of them killed; nobody has the fourth.
several_case() {
	local i socket=() devices=()
	{
		for i in 1 2 3 4; do
			socket+=("$CASE_DIR/$i.sock")
			printf '[[controller]]\nsocket-path = "%s"\n[[controller.namespace]]\nbackend = "memory"\nsize = "256M"\n\n' "$CASE_DIR/$i.sock"
		done
	} >"$CASE_DIR/daemon.toml"
	daemon_start "$CASE_DIR" "${socket[@]}" -- --config "$CASE_DIR/daemon.toml"
	nvme_device "${socket[0]}"
	_running busy
	guest_keep
	nvme_device "${socket[1]}"
	devices=("${DEVICE[@]}")
	nvme_device "${socket[2]}"
	guest_start two --smp 2 --timeout 140 -- "${devices[@]}" "${DEVICE[@]}" -- "./fio-verify.sh nvme0 & first=\$!; ./filesystem.sh nvme1; second=\$?; wait \$first && ((second == 0))" ./dmesg-clean.sh
	guest_keep
	sleep 8
	guest_back busy
	kill -KILL "$VM_PID"
	vm_stop
	guest_back two
	guest_passes
	daemon_fine
}

test_case unplug-plug-6.1 unplug_case 6.1
test_case unplug-plug-7.x unplug_case 7.x
test_case system-reset reset_case
test_case daemon-killed daemon_gone_case KILL
test_case daemon-terminated daemon_gone_case TERM
test_case --limit 250 qemu-killed qemu_killed_case
test_case --limit 200 several-guests several_case
