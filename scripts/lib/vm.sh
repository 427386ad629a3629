# shellcheck shell=bash
# vm.sh - starts a test guest in a given QEMU, waits for it with a hard limit, brings its results home.
# Needs common.sh and guest.sh.
#
#   run_vm OPTION... [-- QEMU-ARGUMENT...]     start, wait; returns the guest's exit status, or 124 (time limit)
#                                             or 125 (the guest ended without a status: QEMU failed, kernel panic)
#   vm_start OPTION... [-- QEMU-ARGUMENT...]   the first half: VM_PID, VM_OUT
#   vm_wait                                   the second half; VM_STATUS is QEMU's own exit status
#   vm_wait_line REGEX SECONDS                until the console shows a line; status 1 if it does not
#   vm_qmp JSON                               one QMP command to the running guest, prints the answer
#   vm_hmp COMMAND                            one monitor command, prints its text
#   vm_stop                                   ends QEMU (by its pid)
#
# Options:
#   --out DIR         where console.log, qemu.log, results/ and the joined initrd go (created; required)
#   --qemu BIN        the QEMU (default: $VM_QEMU, else stock_qemu)
#   --kernel SERIES   6.1, 6.12 or 7.x (default: 6.12), or none: the firmware boots from a disk (no vm_wait then)
#   --test FILE       a cpio of make_test_cpio; without it the guest is a shell on its console
#   --smp N --mem M   vCPUs, and memory with its suffix (default: 2 and 1G); M may go on with ",slots=4,maxmem=4G"
#   --memory KIND     memfd, hugetlb (fails if there are too few pages) or auto (default: auto)
#   --cpu MODEL       default: max
#   --machine OPTS    appended to the machine q35
#   --append TEXT     more kernel arguments
#   --timeout S       hard limit in seconds (default: 120)
#   --interactive     the serial console is this terminal
#   --progress        while waiting, the console's last line every 10 s
#
# Environment: VM_ACCEL (default: kvm if a guest boots with it, else tcg,thread=multi), VM_QEMU, VM_TIMEOUT_FACTOR
# (an integer; multiplies every limit on a slow machine).
# shellcheck disable=SC2034 # the results are for the scripts that source this

_vm_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
VM_PID='' VM_OUT='' VM_STATUS='' _vm_deadline='' _vm_progress='' _vm_qmp_in='' _vm_qmp_out='' _vm_accel=''

run_vm() {
	vm_start "$@"
	vm_wait
}

vm_start() {
	local qemu=${VM_QEMU:-} kernel=6.12 test='' smp=2 mem=1G memory=auto cpu=max machine='' append='' timeout=120
	local interactive='' args backend console=(console=ttyS0) boot=()
	VM_OUT='' _vm_progress=''
	while (($#)); do
		case $1 in
		--progress)
			_vm_progress=1
			shift
			continue
			;;
		--out) VM_OUT=$2 ;;
		--qemu) qemu=$2 ;;
		--kernel) kernel=$2 ;;
		--test) test=$2 ;;
		--smp) smp=$2 ;;
		--mem) mem=$2 ;;
		--memory) memory=$2 ;;
		--cpu) cpu=$2 ;;
		--machine) machine=$2 ;;
		--append) append=$2 ;;
		--timeout) timeout=$2 ;;
		--interactive)
			interactive=1
			shift
			continue
			;;
		--)
			shift
			break
			;;
		*) fail "run_vm: unknown option '$1'" ;;
		esac
		shift 2
	done
	[[ -n $VM_OUT ]] || fail "run_vm: --out is missing"
	mkdir -p -- "$VM_OUT" || fail "no directory for the guest's results"
	rm -rf -- "$VM_OUT"/{console.log,qemu.log,results,results.tar,qmp.in,qmp.out}
	if [[ -z $qemu ]]; then
		stock_qemu
		qemu=$STOCK_QEMU
	fi
	_vm_choose_accel "$qemu"
	if [[ $kernel != none ]]; then
		guest_userland
		guest_kernel "$kernel"
		cat -- "$GUEST_USERLAND" "$GUEST_MODULES" ${test:+"$test"} >"$VM_OUT/initrd" ||
			fail "the guest's initrd cannot be put together"
		boot=(-kernel "$GUEST_VMLINUZ" -initrd "$VM_OUT/initrd"
			-append "${console[*]} panic=-1 loglevel=5 iomem=relaxed $(_vm_clock) ${append}")
	fi

	backend=memory-backend-memfd,id=mem,size=${mem%%,*},share=on
	case $memory in
	memfd) ;;
	hugetlb) backend+=,hugetlb=on,hugetlbsize=2M ;;
	auto) if _vm_hugepages_for "${mem%%,*}"; then backend+=,hugetlb=on,hugetlbsize=2M; fi ;;
	*) fail "run_vm: no memory kind '$memory' (there are: memfd, hugetlb, auto)" ;;
	esac

	mkfifo "$VM_OUT/qmp.in" "$VM_OUT/qmp.out" || fail "no pipes for QEMU's monitor"
	# shellcheck disable=SC2054 # the commas are QEMU's
	args=(
		-nodefaults -no-user-config -display none -no-reboot
		-machine "q35,memory-backend=mem${machine:+,$machine}" -accel "$_vm_accel" -cpu "$cpu" -smp "$smp" -m "$mem"
		-object "$backend"
		"${boot[@]}"
		-qmp "pipe:$VM_OUT/qmp"
		-chardev "file,id=results,path=$VM_OUT/results.tar"
	)
	if [[ -n $interactive ]]; then
		args+=(-chardev "stdio,id=console,mux=on,signal=off,logfile=$VM_OUT/console.log" -serial chardev:console)
	else
		args+=(-serial "file:$VM_OUT/console.log")
	fi
	# shellcheck disable=SC2054
	# The subject's devices come before ours, as a vIOMMU must; a bare machine keeps the slots where a test expects them.
	args+=("$@" -device virtio-serial-pci -device virtserialport,chardev=results,name=results)
	printf '%q ' "$qemu" "${args[@]}" >"$VM_OUT/command"
	_vm_deadline=$(($(now_us) + timeout * ${VM_TIMEOUT_FACTOR:-1} * 1000000))
	if [[ -n $interactive ]]; then
		"$qemu" "${args[@]}" <&0 2>"$VM_OUT/qemu.log" &
	else
		"$qemu" "${args[@]}" </dev/null >"$VM_OUT/qemu.log" 2>&1 &
	fi
	VM_PID=$!
	on_exit _end_child "$VM_PID"
	_vm_qmp_in='' _vm_qmp_out=''
}

vm_wait() {
	local rc=124 start next=10
	start=$(now_us)
	while kill -0 "$VM_PID" 2>/dev/null; do
		if [[ -n $_vm_progress ]] && (($(now_us) - start > next * 1000000)); then
			info "... after $next s: $(tail -n 1 "$VM_OUT/console.log" 2>/dev/null | tr -cd '[:print:]' | cut -c 1-90)"
			next=$((next + 10))
		fi
		if (($(now_us) > _vm_deadline)); then
			vm_stop
			warn "the guest was ended at its time limit; the end of its console:"
			tail -n 15 "$VM_OUT/console.log" >&2 || true
			return 124
		fi
		sleep 0.1
	done
	_vm_reap
	if [[ -s $VM_OUT/results.tar ]]; then
		mkdir -p "$VM_OUT/results"
		tar -C "$VM_OUT/results" -xf "$VM_OUT/results.tar" || warn "the guest's results cannot be unpacked"
	fi
	rc=$(sed -nE 's/^guest: exit ([0-9]+).*/\1/p' "$VM_OUT/console.log" 2>/dev/null | tail -n 1)
	if [[ -z $rc ]]; then
		warn "the guest ended without an exit status; QEMU says:"
		tail -n 15 "$VM_OUT/qemu.log" >&2 || true
		tail -n 15 "$VM_OUT/console.log" >&2 || true
		rc=125
	fi
	return "$rc"
}

vm_stop() {
	local i
	[[ -n $VM_PID ]] || return 0
	kill "$VM_PID" 2>/dev/null || true
	for ((i = 0; i < 50; i++)); do
		kill -0 "$VM_PID" 2>/dev/null || break
		sleep 0.1
	done
	kill -KILL "$VM_PID" 2>/dev/null || true
	_vm_reap
}

_vm_reap() {
	VM_STATUS=0
	wait "$VM_PID" 2>/dev/null || VM_STATUS=$?
	_forget_exit _end_child "$VM_PID"
	[[ -z $_vm_qmp_in ]] || exec {_vm_qmp_in}>&-
	[[ -z $_vm_qmp_out ]] || exec {_vm_qmp_out}>&-
	_vm_qmp_in='' _vm_qmp_out=''
	rm -f -- "$VM_OUT/qmp.in" "$VM_OUT/qmp.out" "$VM_OUT/initrd"
}

vm_wait_line() {
	local end=$(($(now_us) + $2 * ${VM_TIMEOUT_FACTOR:-1} * 1000000))
	until grep -qE -- "$1" "$VM_OUT/console.log" 2>/dev/null; do
		if (($(now_us) > end)) || ! kill -0 "$VM_PID" 2>/dev/null; then return 1; fi
		sleep 0.1
	done
}

# Answers are lines; events that come between are passed over.
vm_qmp() {
	local line
	if [[ -z $_vm_qmp_in ]]; then
		exec {_vm_qmp_in}<>"$VM_OUT/qmp.in" {_vm_qmp_out}<>"$VM_OUT/qmp.out"
		echo '{"execute":"qmp_capabilities"}' >&"$_vm_qmp_in"
		_vm_qmp_answer line || return 1
	fi
	echo "$1" >&"$_vm_qmp_in"
	_vm_qmp_answer line || return 1
	printf '%s\n' "$line"
	[[ $line != *'"error"'* ]]
}
_vm_qmp_answer() {
	local _line
	while IFS= read -r -t 20 -u "$_vm_qmp_out" _line; do
		case $_line in
		*'"QMP"'* | *'"event"'*) ;;
		*)
			printf -v "$1" '%s' "$_line"
			return 0
			;;
		esac
	done
	warn "no answer from QEMU's monitor"
	return 1
}

vm_hmp() {
	local answer text=$1
	text=${text//\\/\\\\} text=${text//\"/\\\"}
	answer=$(vm_qmp "{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"$text\"}}") || return 1
	answer=${answer#*'"return": "'}
	answer=${answer%'"}'*}
	printf '%b' "${answer//\\r/}"
}

# ---------------------------------------------------------------- what this machine can do

# _vm_hugepages_for SIZE: are there free 2 MiB pages for a guest of this size?
_vm_hugepages_for() {
	local free=/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages
	[[ -r $free ]] && (($(<"$free") * 2 * 1024 * 1024 >= $(numfmt --from=iec "$1")))
}

# An emulated guest has this machine's time stamp counter, and measures its frequency at boot: on a busy machine wrongly,
# by up to a factor of three, and all its time limits with it. So it is told. It also panics if the timer does not tick
# within 10 ms of its first look, which on such a machine it may not: it is told not to look.
_vm_clock() {
	[[ $_vm_accel == tcg* ]] || return 0
	need_packages gcc libc6-dev >&2
	cached "tsc-$(hash_of "@$_vm_dir/tsc-khz.c" "$(</proc/sys/kernel/random/boot_id)")" _measure_tsc
	echo "no_timer_check tsc=reliable tsc_early_khz=$(<"$CACHED/khz")"
}
_measure_tsc() {
	gcc -O2 -o "$1/tsc-khz" "$_vm_dir/tsc-khz.c"
	"$1/tsc-khz" >"$1/khz"
}

# KVM is used only where a guest boots with it: a machine can have /dev/kvm and yet run no stock kernel (a host whose
# KVM knows paravirtual guests only). Tried once per boot of the machine and QEMU binary.
_vm_choose_accel() {
	local qemu=$1 verdict
	if [[ -n ${VM_ACCEL:-} ]]; then
		_vm_accel=$VM_ACCEL
		return 0
	fi
	_vm_accel=tcg,thread=multi
	[[ -r /dev/kvm && -w /dev/kvm ]] || return 0
	cached "kvm-works-$(hash_of "$qemu" "$(</proc/sys/kernel/random/boot_id)")" _try_kvm "$qemu"
	verdict=$(<"$CACHED/verdict")
	[[ $verdict != yes ]] || _vm_accel=kvm
}

_try_kvm() {
	local out=$1 tmp verdict=no
	temp_dir tmp
	info "trying KVM with $2"
	mkdir -p "$tmp/tree/test"
	echo 'exit 0' >"$tmp/tree/test/run.sh"
	make_test_cpio "$tmp/tree" "$tmp/test.cpio"
	if (
		exec 2>"$tmp/log"
		VM_ACCEL=kvm run_vm --out "$tmp/vm" --qemu "$2" --kernel 6.12 --test "$tmp/test.cpio" \
			--smp 1 --mem 512M --memory memfd --timeout 10
	); then verdict=yes; fi
	info "KVM boots a guest here: $verdict"
	echo "$verdict" >"$out/verdict"
}
