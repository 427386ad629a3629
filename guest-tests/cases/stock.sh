# shellcheck shell=bash
# Debian's own QEMU, nothing of ours in it: the same cases over vfio-user.
# shellcheck disable=SC2154 # _note_oacs is of matrix.sh

cases_of vfio-user

# A directory with a socket named cntrl in it, which is what some clients are given.
cntrl_case() {
	mkdir -p -- "$CASE_DIR/vm1"
	daemon_start "$CASE_DIR" "$CASE_DIR/vm1/cntrl" -- --transport vfio-user --socket-path "$CASE_DIR/vm1" --namespace memory,size=128M
	nvme_device "$CASE_DIR/vm1/cntrl"
	guest_run vm --smp 1 -- "${DEVICE[@]}" -- ./io.sh ./dmesg-clean.sh
	daemon_fine
}

# A guest without MSI has the interrupt pin, and keeps it: Linux turns off one that interrupts for nothing.
pin_case() {
	daemon_single "$CASE_DIR" --namespace memory,size=64M,block-size=512
	nvme_device "$NVME_SOCKET"
	guest_run vm --kernel 6.12 --smp 2 --append pci=nomsi -- "${DEVICE[@]}" -- "$_note_oacs" ./pin.sh ./dmesg-clean.sh
	_doorbells_as_wanted mmio
	daemon_fine
}

for _kernel in "${GUEST_SERIES[@]}"; do
	case $_kernel in 6.12) _kind=mmio _mib=6 ;; *) _kind=shadow _mib=2 ;; esac
	test_case --limit 250 "stock-verify-$_kernel-$_kind" over_vfio_user matrix_case "$_kernel" 2 "$_kind" 512 "$_note_oacs" "VERIFY_MIB=$_mib ./fio-verify.sh"
done
test_case --limit 250 stock-sgl-6.12 over_vfio_user sgl_case 6.12
test_case --limit 250 stock-storage-6.12 over_vfio_user matrix_case 6.12 2 shadow 4096 "$_note_oacs" ./filesystem.sh ./discard.sh
test_case --limit 250 stock-driver-6.12 over_vfio_user matrix_case 6.12 2 shadow 4096 "$_note_oacs" ./driver.sh
test_case --limit 250 stock-driver-7.x over_vfio_user matrix_case 7.x 2 mmio 512 "$_note_oacs" ./driver.sh
test_case --limit 250 stock-nvme-cli-6.12 over_vfio_user matrix_case 6.12 1 mmio 512 "$_note_oacs" ./nvme-cli.sh
test_case --limit 100 stock-seabios-boot over_vfio_user seabios_case
test_case stock-system-reset over_vfio_user reset_case
test_case --limit 250 stock-qemu-killed over_vfio_user qemu_killed_case
test_case stock-cntrl over_vfio_user cntrl_case
test_case --limit 100 stock-pin-6.12 over_vfio_user pin_case
test_case --alone stock-hugetlb over_vfio_user hugetlb_case
test_case --limit 260 stock-hotplug-6.12 over_vfio_user hotplug_case 6.12
