# shellcheck shell=bash disable=SC2034 # what is set here is for the scripts that source it
# lib.sh - what the scripts that run inside the guest share: which disk, and how a verdict looks.
#
# A script sources it, calls `subject "$@"` and ends with `finish`. Each check prints one line, `PASS name` or
# `FAIL name: reason` (`SKIP name: reason` where the subject or the guest does not offer the thing), and the script's exit
# status is 1 if there was any FAIL.
set -euo pipefail

failures=0
suite=$(basename -- "$0" .sh)
# A `--without a,b` list: checks that are known not to hold for a subject (a peer's device, never ours).
without=','

pass() { echo "PASS $suite/$1"; }
fail() {
	echo "FAIL $suite/$1: ${*:2}"
	failures=$((failures + 1))
}
skip() { echo "SKIP $suite/$1: ${*:2}"; }
# wanted NAME: is this check to be run?
wanted() {
	[[ $without != *,$1,* ]] || { skip "$1" "left out by --without" && return 1; }
}
finish() {
	((failures == 0)) || exit 1
	exit 0
}

# subject ARG...: sets PCI (address), CTRL (nvme0), CTRL_DEV, NS (nvme0n1), NS_DEV, LBA (bytes), SIZE (bytes).
# The subject may be named as a controller, a namespace or a PCI address; the default is the first NVMe controller.
subject() {
	local want='' link
	while (($#)); do
		case $1 in
		--without)
			without=,$2,
			shift
			;;
		--help | -h)
			sed -n '/^# shellcheck/d; 2,/^[^#]/s/^# \{0,1\}//p' "$0"
			echo "usage: $suite.sh [--without CHECK,...] [nvme0 | nvme0n1 | PCI-ADDRESS]"
			exit 0
			;;
		-*)
			echo "$suite: unknown option $1" >&2
			exit 2
			;;
		*) want=${1#/dev/} ;;
		esac
		shift
	done
	PCI=
	case $want in
	????:??:??.?) PCI=$want ;;
	nvme*) want=$(echo "$want" | sed -E 's/^(nvme[0-9]+).*/\1/') ;;
	'') ;;
	*)
		echo "$suite: '$want' is no NVMe device" >&2
		exit 2
		;;
	esac
	if [[ -z $PCI ]]; then
		for link in /sys/class/nvme/${want:-nvme*}/device; do
			[[ -e $link ]] || continue
			PCI=$(basename "$(readlink -f "$link")")
			break
		done
	fi
	if [[ -z $PCI ]] || ! wait_subject 10; then
		fail subject "there is no NVMe controller ${want:-in this guest} with a namespace"
		finish
	fi
}

# wait_subject SECONDS: (again) finds the controller and its first namespace behind PCI; numbers change over a rebind.
# Status 1 if it is not live, with a namespace that can be opened, in time.
wait_subject() {
	local end=$((SECONDS + $1)) dir path
	while ((SECONDS <= end)); do
		CTRL='' NS=''
		for dir in "/sys/bus/pci/devices/$PCI/nvme/"nvme*; do
			[[ -e $dir/state && $(<"$dir/state") == live ]] || continue
			CTRL=${dir##*/}
			# nvme0n1, or with multipath nvme0c1n1, whose disk is nvme0n1
			for path in "$dir"/nvme*n*; do
				[[ -e $path ]] || continue
				NS=$(basename "$path" | sed -E 's/c[0-9]+n/n/')
				break
			done
		done
		if [[ -n $NS && -b /dev/$NS ]] && SIZE=$(blockdev --getsize64 "/dev/$NS" 2>/dev/null) && ((SIZE > 0)); then
			CTRL_DEV=/dev/$CTRL NS_DEV=/dev/$NS
			LBA=$(<"/sys/block/$NS/queue/logical_block_size")
			NSID=$(<"/sys/block/$NS/nsid")
			return 0
		fi
		sleep 0.1
	done
	return 1
}

# at_least MIN VALUE...: the values of at least MIN.
at_least() {
	local min=$1 v
	shift
	for v in "$@"; do ((v < min)) || echo "$v"; done
}

# run_fio NAME SECONDS ARG...: fio on the subject; its output is shown only when it fails.
run_fio() {
	local name=$1 limit=$2 out rc=0
	shift 2
	out=/tmp/fio-$name.out
	timeout "$limit" fio --output="$out" --direct=1 --filename="$NS_DEV" --group_reporting=1 --name="$name" "$@" || rc=$?
	((rc == 0)) || {
		echo "fio $name ended with status $rc:"
		tail -n 30 "$out" 2>/dev/null || true
	}
	return "$rc"
}

# expect_errors begin|end TEXT: marks in the kernel log a time in which failing I/O is expected; dmesg-clean.sh knows it.
expect_errors() { echo "guest-test: $1 of expected I/O errors: $2" >/dev/kmsg; }
