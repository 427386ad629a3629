# shellcheck shell=bash
# lib.sh - what the cases share: a daemon, guests on it, the end of both. Needs scripts/lib/*.sh.
#
#   guest_start NAME VM-OPTION... -- QEMU-ARG... -- COMMAND...   boots a guest that runs the commands; VM_OUT is CASE_DIR/NAME
#   guest_passes                 waits for it; the case is broken if it does not end with status 0
#   nested_passes                the same of a guest that has a guest of its own, whose emulated machine may die by itself (see nested_death)
#   guest_run ...                both
#   guest_ready WORD SECONDS     waits for the line "READY WORD"
#   guest_keep, guest_back NAME  with several guests: puts the present one aside; takes one up again
#   nvme_device SOCKET [PROPERTY=NUMBER]   the QEMU arguments of a disk, in the array DEVICE
#   over_vfio_user FUNCTION ARG...   runs a case with a stock QEMU and vfio-user instead of our device and vhost-user
#   daemon_fine                  the daemon still runs, has not panicked, and ends cleanly
# shellcheck disable=SC2034,SC2154 # the results are for the cases, the sources are scripts/lib/vm.sh

DEVICE=()
nvme_device() {
	case ${NVME_TRANSPORT:-vhost-user} in
	vhost-user) DEVICE=(-device "vhost-user-nvme,socket=$1${2:+,$2}") ;;
	vfio-user)
		local more=${2:+",\"${2%%=*}\":${2#*=}"}
		DEVICE=(-device "{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"$1\"}$more}")
		;;
	esac
}

over_vfio_user() {
	stock_qemu
	VM_QEMU=$STOCK_QEMU NVME_TRANSPORT=vfio-user
	"$@"
}

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
	[[ -z ${NESTED:-} ]] || nested_death "$rc"
	case $rc in
	0) ;;
	124) broken "the guest did not end in time" ;;
	125) broken "the guest died: $(grep -ahE 'panic|qemu-system' "$VM_OUT/console.log" "$VM_OUT/qemu.log" | sed -n 1p)" ;;
	*) broken "$(grep -aE '^FAIL' "$VM_OUT/console.log" | tr -d '\r' | cut -c 1-200 | sed -n 1p)" ;;
	esac
}

# Nested virtualization is emulated, and not without fault: now and then the inner machine (L2) or the outer one (L1) is reset out of
# nowhere. Nothing of ours is judged by such a run: the case says that it died, and is run again. It is no such thing if anything else is
# amiss: a check that failed, in L1 or L2, an I/O error that was not asked for, a task that hangs, a daemon that panicked, logged an error or
# did not end well, a QEMU that crashed. Nor is reaching the time limit.
nested_passes() {
	NESTED=1
	guest_passes
}

# nested_death STATUS: ends the case as died if that is what happened to a guest that ended with STATUS (of vm_wait)
nested_death() {
	local console=$VM_OUT/console.log reason wrong
	reason=$(sed -nE 's/^DIED //p' "$console" | tr -d '\r' | sed -n 1p)
	if [[ -z $reason && $1 == 125 ]]; then reason='L1 ended without a status'; fi
	[[ -n $reason && $1 != 124 && $1 != 0 ]] || return 0
	wrong=$(unexpected_lines "$console")
	[[ -z $wrong ]] || broken "${wrong:0:200} (and: $reason)"
	((VM_STATUS == 0)) || broken "$reason: QEMU ended with status $VM_STATUS"
	died "$reason"
}

# unexpected_lines CONSOLE: what shows that something went wrong, other than that a machine was reset
unexpected_lines() {
	tr -d '\r' <"$1" | awk '
		{ who = /^L2: / ? 2 : 1 }
		/guest-test: begin of expected/ { expected[who] = 1; next }
		/guest-test: end of expected/ { expected[who] = 0; next }
		/^(L2: )?(FAIL|verify:)/ || /panicked at/ || /^daemon: .* ERROR / || /blocked for more than/ { print; next }
		/(I\/O|critical .*) error|nvme.*(timeout|aborting|controller is down)|DMAR:.*fault/ && !expected[who] { print }' | sed -n 1p
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
