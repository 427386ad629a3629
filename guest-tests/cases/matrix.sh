# shellcheck shell=bash
# Every kernel, one and two vCPUs, with and without Doorbell Buffer Config: verified I/O of every size and depth, a clean kernel log.
# On each kernel: file system, trims, the driver's life, nvme-cli.

matrix_case() {
	local kernel=$1 cpus=$2 kind=$3 lba=$4 options
	shift 4
	mapfile -t options < <(doorbells "$kind")
	daemon_single "$CASE_DIR" --namespace "memory,size=512M,block-size=$lba" "${options[@]}"
	nvme_device "$NVME_SOCKET"
	guest_run vm --kernel "$kernel" --smp "$cpus" --timeout 240 -- "${DEVICE[@]}" -- "$@" ./dmesg-clean.sh
	_doorbells_as_wanted "$kind"
	daemon_fine
}

# The driver's own word for it
_doorbells_as_wanted() {
	local oacs
	oacs=$(cat "$VM_OUT/results/oacs" 2>/dev/null || echo none)
	case $1:$oacs in
	shadow:1 | mmio:0) ;;
	*) broken "Doorbell Buffer Config: wanted $1, the controller says $oacs" ;;
	esac
}
# shellcheck disable=SC2016 # the guest's shell expands it
_note_oacs='echo $(($(nvme id-ctrl /dev/nvme0 -o json | jq .oacs) >> 8 & 1)) >/results/oacs'

# Every transfer of a guest that is more than one or two pages by SGL: verified, and the daemon has seen them.
sgl_case() {
	daemon_single "$CASE_DIR" --namespace memory,size=256M,block-size=512 --log-level info,vhost_user_nvme::poller=debug
	nvme_device "$NVME_SOCKET"
	guest_run vm --kernel "$1" --smp 2 --append nvme.sgl_threshold=1 -- "${DEVICE[@]}" -- \
		"nvme id-ctrl /dev/nvme0 | grep -E 'sgls *: 0xff02'" ./fio-verify.sh ./dmesg-clean.sh
	grep -aq 'a guest uses SGLs' "$DAEMON_LOG" || broken "the guest has used no SGL"
	daemon_fine
}

for _kernel in "${GUEST_SERIES[@]}"; do
	for _cpus in 2 1; do
		for _kind in shadow mmio; do
			# every byte once for each kernel
			case $_cpus$_kind in 2shadow) _mib=6 ;; *) _mib=2 ;; esac
			test_case --limit 250 "verify-$_kernel-${_cpus}cpu-$_kind" matrix_case "$_kernel" "$_cpus" "$_kind" 512 "$_note_oacs" "VERIFY_MIB=$_mib ./fio-verify.sh"
		done
	done
	# each kernel with both kinds, in turn
	case $_kernel in 6.12) _a=mmio _b=shadow ;; *) _a=shadow _b=mmio ;; esac
	test_case --limit 250 "storage-$_kernel-$_a" matrix_case "$_kernel" 2 "$_a" 4096 "$_note_oacs" ./filesystem.sh ./discard.sh
	test_case --limit 250 "driver-$_kernel-$_a" matrix_case "$_kernel" 2 "$_a" 4096 "$_note_oacs" ./driver.sh
	test_case --limit 250 "nvme-cli-$_kernel-$_b" matrix_case "$_kernel" 1 "$_b" 512 "$_note_oacs" ./nvme-cli.sh
done
test_case --limit 250 sgl-7.x sgl_case 7.x
test_case --limit 250 driver-6.12-shadow matrix_case 6.12 2 shadow 512 "$_note_oacs" ./driver.sh
