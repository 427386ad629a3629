# shellcheck shell=bash
# The whole mission: a host (L1) with an IOMMU, huge pages and SSDs that QEMU emulates; in it our daemon, which owns them through VFIO, and
# a guest (L2, under KVM) whose own driver does verified I/O on them. Needs scripts/lib/ssd.sh.
# shellcheck disable=SC2054,SC2154 # the commas are QEMU's; SSD_ARGS is of scripts/lib/ssd.sh

cases_of ssd

_ssd_factor=${VM_TIMEOUT_FACTOR:-1}

# _ssd_boot LIMIT L1-COMMAND [REGEX]: starts L1 with the SSDs that were added; REGEX is what its kernel may say besides
_ssd_boot() {
	local limit=$1 tree=$CASE_DIR/tree
	# QEMU's namespaces have no identifiers, and the kernel says so.
	ssd_tree "$tree" "$2 $_ssd_factor" "./dmesg-clean.sh 'Ignoring bogus Namespace Identifiers${3:+|$3}'" -- ./ssd-l2.sh "./dmesg-clean.sh 'callbacks suppressed'"
	if [[ -e $CASE_DIR/virtual-guest ]]; then collect_binary "$tree" "$CASE_DIR/virtual-guest"; fi
	make_test_cpio "$tree" "$CASE_DIR/l1.cpio"
	rm -rf -- "$tree" "$CASE_DIR/virtual-guest"
	ssd_start --out "$CASE_DIR/vm" --test "$CASE_DIR/l1.cpio" --timeout "$limit"
	rm -f -- "$CASE_DIR/l1.cpio"
}

# _ssd_gone: if one of the machines has died by itself, that is how the case ends
_ssd_gone() {
	sleep 1 # a QEMU that is ending
	if ! kill -0 "$VM_PID" 2>/dev/null || grep -q '^DIED' "$VM_OUT/console.log"; then nested_passes; fi
}

# _ssd_at READY-WORD SECONDS: waits until L2 says so
_ssd_at() {
	vm_wait_line "^L2: READY $1" "$2" || {
		_ssd_gone
		cat -- "$VM_OUT/console.log" "$VM_OUT/qemu.log" "$VM_OUT/results/daemon.log" 2>/dev/null || true
		broken "L2 did not say 'READY $1' in $2 s: $(grep -aE '^(L2: )?FAIL' "$VM_OUT/console.log" | tr -d '\r' | cut -c 1-200 | sed -n 1p)"
	}
}

# _ssd_qmp JSON WHAT: one command to QEMU, which may have gone
_ssd_qmp() {
	vm_qmp "$1" || {
		_ssd_gone
		broken "QEMU does not $2"
	}
}

_ssd_passes() {
	nested_passes
	cat -- "$VM_OUT/results/daemon.log"
	measured "$(grep -acE '^(L2: )?PASS' "$VM_OUT/console.log") checks"
}

# _bad_sector INDEX read|write SECTOR: one rule of blkdebug, in sectors of 512 bytes
_bad_sector() { echo "inject-error.$1.event=none,inject-error.$1.iotype=$2,inject-error.$1.errno=5,inject-error.$1.sector=$3"; }

_ssd_blocks=logical_block_size=4096,physical_block_size=4096

ssd_mission_case() {
	local slow='{"execute":"qom-set","arguments":{"path":"/objects/slow","property":"limits","value":{"iops-total":'
	ssd_image "$CASE_DIR/ssd.img" 256
	ssd_iommu
	# Errors, and slowness, under the SSD. Sectors 458752 and 466944 are the blocks 57344 and 58368.
	SSD_ARGS+=(-object throttle-group,id=slow
		-blockdev "driver=file,node-name=file,filename=$CASE_DIR/ssd.img,discard=unmap"
		-blockdev "driver=blkdebug,node-name=bad,image=file,$(_bad_sector 0 read 458752),$(_bad_sector 1 write 466944)"
		-blockdev driver=throttle,node-name=disk,throttle-group=slow,file=bad)
	ssd_port mission-slot
	ssd_add mission mission-slot disk "$_ssd_blocks"
	_ssd_boot 320 ./ssd-mission.sh
	_ssd_at slow 250
	sleep 1
	_ssd_qmp "${slow}2}}}" "slow the SSD down"
	# Longer than the timeout (3 s), so that commands are aborted and submitted again; shorter than two of them (6 s), the second of which
	# would be a command's last chance, and than with the grace (8 s): a reset would have QEMU count all that it lets go of against the limit,
	# so that what is submitted again waits for many seconds more.
	sleep 4.2
	_ssd_qmp "${slow}0}}}" "let the SSD be fast again"
	_ssd_passes
	# On the medium, by the machine under L1, is what L2 wrote.
	[[ $(dd if="$CASE_DIR/ssd.img" bs=1M skip=208 count=16 status=none | md5sum | cut -d ' ' -f 1) == \
		"$(sed -nE 's/^L2: value guest_sum ([0-9a-f]+).*/\1/p' "$VM_OUT/console.log")" ]] || broken "the image has not what the guest wrote"
}

ssd_shared_case() {
	ssd_image "$CASE_DIR/ssd.img" 256
	ssd_iommu
	ssd_node disk "$CASE_DIR/ssd.img"
	ssd_port mission-slot
	ssd_add mission mission-slot disk "$_ssd_blocks"
	cp -- "$(test_program tests/virtual_guest/main.rs virtual_guest)" "$CASE_DIR/virtual-guest"
	strip -- "$CASE_DIR/virtual-guest"
	_ssd_boot 320 ./ssd-shared.sh
	_ssd_passes
}

ssd_unplug_case() {
	local name
	ssd_iommu
	for name in sudden polite; do
		ssd_image "$CASE_DIR/$name.img" 64
		ssd_node "$name-disk" "$CASE_DIR/$name.img"
		ssd_port "$name-slot"
		ssd_add "$name" "$name-slot" "$name-disk" "$_ssd_blocks"
	done
	# Whoever closes an SSD that is not there any more waits while the kernel resets it in vain.
	_ssd_boot 320 ./ssd-unplug.sh 'blocked for more than 20|Call Trace'
	_ssd_at polite 250
	sleep 1
	_ssd_qmp '{"execute":"device_del","arguments":{"id":"polite"}}' "unplug the SSD"
	_ssd_passes
}

# _ssd_speed ID IOPS: how fast the namespace of an SSD is; 0 is as fast as can be
_ssd_speed() {
	_ssd_qmp '{"execute":"block_set_io_throttle","arguments":{"id":"'"$1"'-ns","bps":0,"bps_rd":0,"bps_wr":0,"iops":'"$2"',"iops_rd":0,"iops_wr":0}}' \
		"change the speed of $1"
}

ssd_late_case() {
	local name bus=1
	ssd_iommu
	for name in again fails; do
		ssd_image "$CASE_DIR/$name.img" 128
		ssd_node "$name-disk" "$CASE_DIR/$name.img"
		ssd_port "$name-slot"
		ssd_add "$name" "$name-slot" "$name-disk" "$_ssd_blocks"
	done
	_ssd_boot 320 ./ssd-late.sh
	_ssd_at late 250
	for name in again fails; do _ssd_speed "$name" 1; done
	# As soon as it is reset, or what is submitted again is late as well, and fails.
	for name in again fails; do
		vm_wait_line "^daemon: .* is reset ssd=.0000:0$bus:00.0" 40 || true
		_ssd_speed "$name" 0
		bus=$((bus + 1))
	done
	_ssd_passes
}

test_case --limit 330 ssd-mission ssd_mission_case
test_case --limit 330 ssd-shared ssd_shared_case
test_case --limit 330 ssd-unplug ssd_unplug_case
test_case --limit 330 ssd-late ssd_late_case
