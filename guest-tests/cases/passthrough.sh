# shellcheck shell=bash
# NVMe passthrough: a guest with an SSD that QEMU emulates, and in it our daemon, its tests, and the virtual guest.

passthrough_case() {
	local tree=$CASE_DIR/tree n
	# QEMU's own namespaces have no identifiers
	guest_test_tree "$tree" ./passthrough.sh "./dmesg-clean.sh 'Ignoring bogus Namespace Identifiers'"
	collect_binary "$tree" "$DAEMON"
	# their own names have a hash in them
	cp -- "$(test_program src/lib.rs vhost_user_nvme)" "$CASE_DIR/backend-tests"
	cp -- "$(test_program tests/virtual_guest/main.rs virtual_guest)" "$CASE_DIR/virtual-guest"
	strip -- "$CASE_DIR/backend-tests" "$CASE_DIR/virtual-guest"
	collect_binary "$tree" "$CASE_DIR/backend-tests"
	collect_binary "$tree" "$CASE_DIR/virtual-guest"
	make_test_cpio "$tree" "$CASE_DIR/test.cpio"
	rm -rf -- "$tree" "$CASE_DIR/backend-tests" "$CASE_DIR/virtual-guest"
	for n in 1 2 3 4; do truncate -s 16M "$CASE_DIR/ssd$n.img"; done
	# mdts=5 is 128 KiB: the guest's transfers of 1 MiB have to be split
	vm_start --out "$CASE_DIR/vm" --kernel 6.12 --smp 2 --mem 1536M --memory memfd --test "$CASE_DIR/test.cpio" --timeout 240 \
		--append nvme.poll_queues=1 -- \
		-blockdev "driver=file,node-name=ssd1,filename=$CASE_DIR/ssd1.img,discard=unmap" \
		-blockdev "driver=file,node-name=ssd2,filename=$CASE_DIR/ssd2.img,discard=unmap" \
		-blockdev "driver=file,node-name=ssd3,filename=$CASE_DIR/ssd3.img" \
		-blockdev "driver=file,node-name=file4,filename=$CASE_DIR/ssd4.img" \
		-blockdev "driver=blkdebug,node-name=ssd4,image=file4,$(bad_block 0 read 2048),$(bad_block 1 write 4096)" \
		-device nvme,id=ssd,serial=ssd,mdts=5 \
		-device nvme-ns,bus=ssd,nsid=1,drive=ssd1,logical_block_size=512,physical_block_size=512 \
		-device nvme-ns,bus=ssd,nsid=2,drive=ssd2,logical_block_size=4096,physical_block_size=4096 \
		-device nvme-ns,bus=ssd,nsid=3,drive=ssd3,ms=8 \
		-device nvme-ns,bus=ssd,nsid=4,drive=ssd4,logical_block_size=512,physical_block_size=512
	guest_passes
	measured "$(sed -nE "s/^time: ([0-9]+) s for .*passthrough.*/\1/p" "$VM_OUT/console.log" | tr -d '\r' | sed -n 1p) s in the guest"
}

# bad_block INDEX read|write SECTOR: one rule of blkdebug
bad_block() { echo "inject-error.$1.event=none,inject-error.$1.iotype=$2,inject-error.$1.errno=5,inject-error.$1.sector=$3"; }

test_case --limit 260 nvme-passthrough passthrough_case
