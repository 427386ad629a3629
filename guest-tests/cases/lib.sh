# shellcheck shell=bash
# lib.sh - what the cases share: a daemon, guests on it, the end of both. Needs scripts/lib/*.sh.
#
#   guest_start NAME VM-OPTION... -- QEMU-ARG... -- COMMAND...   boots a guest that runs the commands; VM_OUT is CASE_DIR/NAME
#   guest_passes                 waits for it; the case is broken if it does not end with status 0
#   guest_run ...                both
#   guest_ready WORD SECONDS     waits for the line "READY WORD"
#   guest_keep, guest_back NAME  with several guests: puts the present one aside; takes one up again
#   nvme_device SOCKET [PROPERTY,...]   the QEMU arguments of a disk, in the array DEVICE
#   daemon_fine                  the daemon still runs, has not panicked, and ends cleanly
# shellcheck disable=SC2034,SC2154 # the results are for the cases, the sources are scripts/lib/vm.sh

DEVICE=()
nvme_device() { DEVICE=(-device "vhost-user-nvme,socket=$1${2:+,$2}"); }

guest_start() {
	local name=$1 options=() args=()
	shift
	while [[ $1 != -- ]]; do
		options+=("$1")
		shift
	done
	shift
	while [[ $1 != -- ]]; do
		args+=("$1")
		shift
	done
	shift
	guest_test_cpio "$CASE_DIR/$name.cpio" "$@"
	vm_start --out "$CASE_DIR/$name" --test "$CASE_DIR/$name.cpio" --memory memfd "${options[@]}" -- "${args[@]}"
	rm -f -- "$CASE_DIR/$name.cpio"
}

guest_passes() {
	local rc=0
	vm_wait || rc=$?
	cat -- "$VM_OUT/console.log" || true
	cat -- "$VM_OUT/qemu.log" || true
	case $rc in
	0) ;;
	124) broken "the guest did not end in time" ;;
	125) broken "the guest died: $(grep -ahE 'panic|qemu-system' "$VM_OUT/console.log" "$VM_OUT/qemu.log" | sed -n 1p)" ;;
	*) broken "$(grep -aE '^FAIL' "$VM_OUT/console.log" | tr -d '\r' | cut -c 1-200 | sed -n 1p)" ;;
	esac
}

guest_run() {
	guest_start "$@"
	guest_passes
}

guest_ready() {
	vm_wait_line "^READY $1" "$2" || {
		cat -- "$VM_OUT/console.log" "$VM_OUT/qemu.log" || true
		broken "the guest did not say 'READY $1' in $2 s"
	}
}

declare -A _kept_guests=()
guest_keep() { _kept_guests[${VM_OUT##*/}]="VM_PID=$VM_PID VM_OUT=$VM_OUT _vm_deadline=$_vm_deadline _vm_qmp_in=$_vm_qmp_in _vm_qmp_out=$_vm_qmp_out"; }
guest_back() { eval "${_kept_guests[$1]}"; }

daemon_fine() {
	cat -- "$DAEMON_LOG"
	daemon_runs || broken "the daemon died: $(tail -n 1 "$DAEMON_LOG")"
	daemon_stop || broken "the daemon did not end cleanly: $(tail -n 1 "$DAEMON_LOG")"
	! grep -aE 'panicked at|RUST_BACKTRACE' "$DAEMON_LOG" || broken "a thread of the daemon panicked"
}

# doorbells KIND: the daemon's arguments for shadow doorbells (Doorbell Buffer Config), or for mmio ones only
doorbells() { [[ $1 == shadow ]] || echo --no-doorbell-buffer; }
