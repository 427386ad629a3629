# shellcheck shell=bash
# KVM for real: a guest (L1) whose QEMU emulates a machine with SVM runs our daemon and our QEMU with -accel kvm; L2's own driver does
# the I/O. Memory slots, irqfds and exits are those of a real machine.

kvm_case() {
	local kind=$1 cpus=$2 tree=$CASE_DIR/tree options
	shift 2
	mapfile -t options < <(doorbells "$kind")
	guest_test_cpio "$CASE_DIR/l2.cpio" "DEMO_SECONDS=1 ./demo.sh" "$@" ./dmesg-clean.sh
	guest_test_tree "$tree" "vhost-user-nvme --socket-path /tmp/s --namespace memory,size=256M ${options[*]} >/results/daemon.log 2>&1 & daemon=\$!; \
./daemon-says.sh /results/daemon.log </dev/null >/dev/null 2>&1 & for i in {1..50}; do [[ -S /tmp/s ]] && break; sleep 0.2; done; ./l2.sh --seconds $((300 * ${VM_TIMEOUT_FACTOR:-1})) --smp $cpus -device vhost-user-nvme,socket=/tmp/s; rc=\$?; \
kill \$daemon && wait \$daemon || { echo 'FAIL daemon: it did not end well'; rc=1; }; ((rc == 0))"
	guest_l2_tree "$tree" 6.12 "$CASE_DIR/l2.cpio"
	collect_qemu "$tree" "$QEMU_BIN" / "$(dirname "$QEMU_BIN")/../share/qemu"
	collect_binary "$tree" "$DAEMON"
	make_test_cpio "$tree" "$CASE_DIR/l1.cpio"
	rm -rf -- "$tree"
	vm_start --out "$CASE_DIR/vm" --kernel 6.12 --smp 2 --mem 3G --memory memfd --test "$CASE_DIR/l1.cpio" --timeout 340
	nested_passes
	cat "$VM_OUT/results/daemon.log"
	! grep -aE 'panicked at' "$VM_OUT/results/daemon.log" || broken "a thread of the daemon panicked"
	grep -qE '^L2: demo: randread=[0-9]+' "$VM_OUT/console.log" || broken "L2 gave no result"
	measured "$(sed -nE 's/^L2: demo: (randread=[0-9]+ randwrite=[0-9]+).*/\1/p' "$VM_OUT/console.log") IOPS in L2"
}

test_case --limit 350 kvm-in-guest-shadow kvm_case shadow 2
test_case --limit 350 kvm-in-guest-mmio kvm_case mmio 1
