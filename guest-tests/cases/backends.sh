# shellcheck shell=bash
# The backends below the same guest, and several namespaces on one controller.

file_case() {
	local lba=$1
	truncate -s 512M "$CASE_DIR/disk.img"
	daemon_single "$CASE_DIR" --namespace "file,path=$CASE_DIR/disk.img,block-size=$lba"
	nvme_device "$NVME_SOCKET"
	guest_run vm --timeout 240 -- "${DEVICE[@]}" -- ./fio-verify.sh ./discard.sh ./filesystem.sh ./dmesg-clean.sh
	daemon_fine
	# what the guest's file system holds is in the file
	[[ $(dd if="$CASE_DIR/disk.img" bs=1 skip=1080 count=2 status=none | od -An -tx2 | tr -d ' ') == ef53 ]] ||
		broken "there is no ext4 in the file"
}

null_case() {
	daemon_single "$CASE_DIR" --namespace null,size=64T
	nvme_device "$NVME_SOCKET"
	guest_run vm -- "${DEVICE[@]}" -- ./io.sh ./dmesg-clean.sh
	daemon_fine
}

namespaces_case() {
	truncate -s 96M "$CASE_DIR/disk.img"
	daemon_single "$CASE_DIR" --namespace memory,size=128M,block-size=512 --namespace memory,size=160M,block-size=4096 \
		--namespace "file,path=$CASE_DIR/disk.img,block-size=4096"
	nvme_device "$NVME_SOCKET"
	guest_run vm -- "${DEVICE[@]}" -- "./namespaces.sh 1:512:$((128 << 20)) 2:4096:$((160 << 20)) 3:4096:$((96 << 20))" ./dmesg-clean.sh
	daemon_fine
}

test_case --limit 250 backend-file-512 file_case 512
test_case --limit 250 backend-file-4096 file_case 4096
test_case backend-null null_case
test_case namespaces-512-4096 namespaces_case
