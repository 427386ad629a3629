# shellcheck shell=bash
# What the daemon costs when nothing is to be done: CPU time in 10 s, memory beyond the guest's and the namespaces'.

idle_case() {
	local options before after memory start seconds
	mapfile -t options < <(doorbells "$1")
	daemon_single "$CASE_DIR" --namespace memory,size=512M "${options[@]}"
	nvme_device "$NVME_SOCKET"
	guest_start vm --smp 2 -- "${DEVICE[@]}" -- "./running.sh --idle 17" ./dmesg-clean.sh
	guest_ready running 60
	sleep 2 # whatever the first I/O left behind
	before=$(process_cpu_us "$DAEMON_PID") start=$(now_us)
	sleep 10
	after=$(process_cpu_us "$DAEMON_PID") seconds=$(seconds_since "$start")
	memory=$(process_own_memory "$DAEMON_PID")
	cat "/proc/$DAEMON_PID/smaps_rollup"
	measured "$((after - before)) us CPU in $seconds s, $memory KiB of its own memory"
	guest_passes
	daemon_fine
	# 20 ms in 10 s: 0.2 % of one core
	((after - before <= 20000)) || broken "an idle guest costs $((after - before)) us of CPU in $seconds s"
	((memory < 64 * 1024)) || broken "$memory KiB of its own memory; 64 MiB are allowed"
}

test_case idle-shadow idle_case shadow
test_case idle-mmio idle_case mmio
