# shellcheck shell=bash
# The guest's memory: in huge pages, and memory that comes and goes while the guest runs.

_pages=/proc/sys/vm/nr_hugepages
hugetlb_case() {
	local before need=640 free
	before=$(<"$_pages") free=$(</sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)
	if ((free < need)); then
		[[ -w $_pages ]] || skip "huge pages are not there and cannot be reserved (scripts/setup-host tells how)"
		on_exit _restore_pages "$before"
		echo $((before + need - free)) >"$_pages"
		free=$(</sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)
		((free >= need)) || skip "the kernel found only $free of $need huge pages"
	fi
	daemon_single "$CASE_DIR" --namespace memory,size=256M
	nvme_device "$NVME_SOCKET"
	guest_run vm --memory hugetlb --mem 768M --timeout 140 -- "${DEVICE[@]}" -- ./fio-verify.sh ./dmesg-clean.sh
	grep -q 'hugetlb=on' "$VM_OUT/command" || broken "the guest had no huge pages"
	daemon_fine
}
_restore_pages() { echo "$1" >"$_pages"; }

hotplug_case() {
	daemon_single "$CASE_DIR" --namespace memory,size=512M
	nvme_device "$NVME_SOCKET"
	guest_start vm --kernel "$1" --mem 512M,slots=2,maxmem=4G --timeout 240 -- "${DEVICE[@]}" -- "./memory.sh 512" ./dmesg-clean.sh
	guest_ready memory 60
	vm_qmp '{"execute":"object-add","arguments":{"qom-type":"memory-backend-memfd","id":"more","size":536870912,"share":true}}' ||
		broken "QEMU gives no memory"
	vm_qmp '{"execute":"device_add","arguments":{"driver":"pc-dimm","id":"dimm","memdev":"more"}}' || broken "the memory cannot be plugged"
	# 256 MiB written, read and summed by an emulated CPU, beside another guest
	guest_ready unplug 180
	vm_qmp '{"execute":"device_del","arguments":{"id":"dimm"}}' || broken "the memory cannot be unplugged"
	guest_passes
	daemon_fine
}

test_case --alone memory-hugetlb hugetlb_case
test_case --limit 260 memory-hotplug-6.12 hotplug_case 6.12
test_case --limit 260 memory-hotplug-7.x hotplug_case 7.x
