# shellcheck shell=bash
# VFIO: a guest with an IOMMU and SSDs that QEMU emulates; in it scripts/setup-host, the daemon's refusals, and our VFIO code.

cases_of ssd

# vfio_case KIND QEMU-ARGUMENT...: KIND is for guest/vfio.sh
vfio_case() {
	local kind=$1 tree=$CASE_DIR/tree n file
	shift
	guest_test_tree "$tree" "./vfio.sh $kind"
	collect_binary "$tree" "$DAEMON"
	if [[ -z $kind ]]; then
		cp -- "$(test_program src/lib.rs vhost_user_nvme)" "$CASE_DIR/library-tests"
		strip -- "$CASE_DIR/library-tests"
		collect_binary "$tree" "$CASE_DIR/library-tests"
		rm -f -- "$CASE_DIR/library-tests"
	fi
	mkdir -p "$tree/host/scripts/lib"
	cp -- scripts/setup-host "$tree/host/scripts/"
	for file in scripts/lib/{common,host_nvme}.sh; do cp -- "$file" "$tree/host/scripts/lib/"; done
	make_test_cpio "$tree" "$CASE_DIR/test.cpio"
	rm -rf -- "$tree"
	for n in 1 2 3; do truncate -s 64M "$CASE_DIR/ssd$n.img"; done
	vm_start --out "$CASE_DIR/vm" --kernel 6.12 --smp 2 --mem 1G --memory memfd --test "$CASE_DIR/test.cpio" --timeout 240 \
		--append "intel_iommu=on iommu=nopt" -- "$@" \
		-blockdev "driver=file,node-name=ssd1,filename=$CASE_DIR/ssd1.img" \
		-blockdev "driver=file,node-name=ssd2,filename=$CASE_DIR/ssd2.img" \
		-blockdev "driver=file,node-name=ssd3,filename=$CASE_DIR/ssd3.img" \
		-device nvme,serial=lone,drive=ssd1,addr=8.0 \
		-device nvme,serial=pair,drive=ssd2,addr=9.0,multifunction=on \
		-device nvme,serial=other,drive=ssd3,addr=9.1
	guest_passes
	measured "$(grep -cE '^PASS' "$VM_OUT/console.log") checks"
}

test_case --limit 260 vfio vfio_case '' -device intel-iommu,intremap=on,caching-mode=on
test_case vfio-no-remapping vfio_case no-remapping -device intel-iommu,intremap=off,caching-mode=on
test_case vfio-no-iommu vfio_case no-iommu
