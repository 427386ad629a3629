# shellcheck shell=bash
# A daemon that is killed and started again, again and again, under a guest that does verified I/O and is to notice nothing.
# shellcheck disable=SC2054,SC2154 # the commas are QEMU's; what is not assigned here is of scripts/lib

cases_of recovery

# daemon_disturbed: what happens to the daemon, once. Another kind of disturbance is another function for recovery_case.
daemon_killed() {
	daemon_again
	# Sometimes while it comes up, or recovers.
	if ((RANDOM % 5 == 0)); then
		sleep "0.0$((RANDOM % 9))"
		daemon_again
	fi
}

# A new process takes over, which is asked for as an operator does.
daemon_upgraded() {
	daemon_upgrade >"$CASE_DIR/upgrade" || broken "no upgrade: $(cat "$CASE_DIR/upgrade")"
	cat "$CASE_DIR/upgrade"
}

# Nothing: what the guest's slowest commands are without any of it.
daemon_left_alone() { sleep 0.1; }

# recovery_case memory|file DISTURBANCE COUNT [PERCENT]: the guest is busy for COUNT seconds, or so many percent of that, and the
# disturbance happens so often meanwhile. RECOVERY_LOAD=one: with only the reader that tells how long I/O stood still.
recovery_case() {
	local backend=$1 disturb=$2 count=$3 seconds state i namespace=memory,size=96M
	seconds=$(((count * ${4:-70} / 100 + 1) * ${VM_TIMEOUT_FACTOR:-1}))
	# What survives the process is on tmpfs.
	state=$(mktemp -d /dev/shm/vhost-user-nvme-test.XXXXXX)
	on_exit rm -rf -- "$state"
	if [[ $backend == file ]]; then
		truncate -s 96M "$CASE_DIR/disk.img"
		namespace=file,path=$CASE_DIR/disk.img
	fi
	daemon_single "$CASE_DIR" --state-dir "$state" --namespace "$namespace"
	nvme_device "$NVME_SOCKET"
	guest_start vm --timeout $((seconds + 90)) -- "${DEVICE[@]}" -msg timestamp=on -- "./recovery.sh $seconds $count ${RECOVERY_LOAD:-all}" ./dmesg-clean.sh
	guest_ready running 60
	for ((i = 0; i < count; i++)); do
		sleep "0.$((RANDOM % 5 + 1))$((RANDOM % 10))"
		daemon_runs || broken "the daemon died by itself: $(tail -n 1 "$DAEMON_LOG")"
		! grep -qE '^(PASS|FAIL) recovery/' "$VM_OUT/console.log" || broken "the guest was done after $i of $count: $(grep -aE '^FAIL' "$VM_OUT/console.log" | tr -d '\r' | cut -c 1-200 | sed -n 1p)"
		"$disturb"
	done
	guest_passes
	measured "$count times; the guest's I/O stood still: $(sed -nE 's/^value standstill (.*)/\1/p' "$VM_OUT/console.log" | tr -d '\r'); QEMU was alone: $(_away "$VM_OUT/qemu.log")"
	daemon_fine
}
_away() {
	sed -nE 's/.*the daemon is back after ([0-9]+) ms.*/\1/p' "$1" | sort -n |
		awk '{ms[NR] = $1} END {printf "p50 %d ms, max %d ms of %d\n", ms[int((NR + 1) / 2)], ms[NR], NR}'
}

# The daemon comes back without its state: the guest's driver has to reset the controller, and does.
lost_case() {
	local state
	state=$(mktemp -d /dev/shm/vhost-user-nvme-test.XXXXXX)
	on_exit rm -rf -- "$state"
	daemon_single "$CASE_DIR" --state-dir "$state" --namespace memory,size=96M
	nvme_device "$NVME_SOCKET"
	# 30 s is the driver's own patience, after which it looks at CSTS.
	guest_start vm --append nvme_core.io_timeout=8 --timeout 240 -- "${DEVICE[@]}" -- ./lost.sh "./dmesg-clean.sh 'ommand line:|controller is down; will reset'"
	guest_ready lost 60
	kill -KILL "$DAEMON_PID"
	wait "$DAEMON_PID" 2>/dev/null || true
	rm -- "$state"/*/state
	_forget_exit _daemon_end "$DAEMON_PID"
	_daemon_spawn
	guest_passes
	grep -q "the guest's queues cannot be found again" "$DAEMON_LOG" || broken "the daemon does not say what happened"
	daemon_fine
}

# late_case boot|plug: the disk is there before the daemon. At boot the firmware is the first that waits for it, at a hot plug the driver.
late_case() {
	local when=$1 disk=() before=()
	NVME_SOCKET=$CASE_DIR/nvme.sock
	if [[ $when == boot ]]; then
		nvme_device "$NVME_SOCKET" wait=off
		disk=("${DEVICE[@]}")
	else
		disk=(-device "pcie-root-port,id=rp1,chassis=1,slot=1")
		before=(./late.sh)
	fi
	# Without a daemon the device has the ids of QEMU's own controller, for which Linux has that quirk.
	guest_start vm --timeout 200 -- "${disk[@]}" -- "${before[@]}" ./fio-verify.sh ./dmesg-clean.sh
	if [[ $when == boot ]]; then
		# It runs, which is all there is to see of it.
		vm_qmp '{"execute":"query-status"}' | grep -q '"running": true' || broken "the machine does not run without the daemon"
		sleep 3
	else
		guest_ready plug 60
		vm_qmp "{\"execute\":\"device_add\",\"arguments\":{\"driver\":\"vhost-user-nvme\",\"id\":\"disk\",\"bus\":\"rp1\",\"socket\":\"$NVME_SOCKET\",\"wait\":false}}" ||
			broken "QEMU refuses to plug"
		guest_ready late 60
	fi
	daemon_single "$CASE_DIR" --namespace memory,size=256M
	guest_passes
	daemon_fine
}

# recovery_ssd_case kill|upgrade LEAST SECONDS: as often as it can be in that time
recovery_ssd_case() {
	local tree=$CASE_DIR/tree disturbance=$1 least=$2 seconds=$3 name said
	ssd_image "$CASE_DIR/ssd.img" 96
	ssd_iommu
	ssd_node disk "$CASE_DIR/ssd.img"
	ssd_port mission-slot
	ssd_add mission mission-slot disk logical_block_size=4096,physical_block_size=4096
	ssd_tree "$tree" "./ssd-recovery.sh $least $seconds $disturbance ${VM_TIMEOUT_FACTOR:-1}" "./dmesg-clean.sh 'Ignoring bogus Namespace Identifiers'" -- \
		"./recovery.sh $seconds $least all" "./dmesg-clean.sh 'callbacks suppressed'"
	if [[ $disturbance == upgrade ]]; then
		# What starts itself anew is to find itself, and not its loader.
		need_packages patchelf
		patchelf --set-interpreter /opt/vhost-user-nvme/lib/ld.so --set-rpath /opt/vhost-user-nvme/lib "$tree/opt/vhost-user-nvme/vhost-user-nvme"
		ln -sf /opt/vhost-user-nvme/vhost-user-nvme "$tree/bin/vhost-user-nvme"
	fi
	make_test_cpio "$tree" "$CASE_DIR/l1.cpio"
	rm -rf -- "$tree"
	ssd_start --out "$CASE_DIR/vm" --test "$CASE_DIR/l1.cpio" --timeout $((seconds + 160))
	rm -f -- "$CASE_DIR/l1.cpio"
	nested_passes
	cat -- "$VM_OUT/results/daemon.log"
	for name in kills standstill away ssd hand-over; do
		said=$(sed -nE "s/^value $name (.*)/\1/p" "$VM_OUT/console.log" | tr -d '\r')
		[[ -z $said ]] || measured "$name: $said"
	done
}

_kills=${RECOVERY_VM_KILLS:-50} _upgrades=${RECOVERY_UPGRADES:-20}
test_case --limit $((110 + _kills)) recovery-memory recovery_case memory daemon_killed "$_kills"
test_case --limit $((110 + _kills)) recovery-file recovery_case file daemon_killed "$_kills"
test_case --limit $((110 + 2 * _upgrades)) recovery-upgrade recovery_case memory daemon_upgraded "$_upgrades" 100
test_case --limit 260 recovery-lost lost_case
test_case --limit 230 recovery-late-boot late_case boot
test_case --limit 230 recovery-late-plug late_case plug
# alone: L2's clock stands still while this machine is busy with others
_ssd_kills=${RECOVERY_SSD_KILLS:-50} _ssd_seconds=$((2 * ${RECOVERY_SSD_KILLS:-50} + 5))
test_case --alone --limit $((200 + _ssd_seconds)) recovery-ssd recovery_ssd_case "${RECOVERY_SSD:-kill}" "$_ssd_kills" "$_ssd_seconds"
