# shellcheck shell=bash disable=SC2034 # what is set here is for the scripts that source it
# ssd-lib.sh - what the scripts share that run in a host with SSDs (L1): who has an SSD, the daemon, a guest of our own. Sources lib.sh.
#
#   huge_pages MIB            reserves huge pages of 2 MiB
#   ssd_function SERIAL       prints the PCI address of the SSD with this serial number, which the kernel's driver must have
#   ssd_disk ADDRESS          waits for the kernel's driver on it: prints its block device
#   ssd_take ADDRESS          from the kernel's driver to vfio-pci, with scripts/setup-host
#   ssd_give_back ADDRESS     and back: waits until the disk is there again
#   random_at DISK MIB-OFFSET MIB   random data there
#   sum_of DISK MIB-OFFSET MIB      md5 of what is there, read past the page cache
#   daemon_on SOCKET... -- ARG...   starts it, waits for the sockets; DAEMON_PID, the log is /results/daemon.log
#   daemon_off [SECONDS]      ends it; a FAIL if it does not end by itself (in 10 s), or a thread panicked
#   daemon_says REGEX SECONDS waits for a line of its log
#   l2_start ARG...           l2.sh in the background, with huge pages
#   l2_says REGEX SECONDS     waits for a line of L2's console; status 1 if it does not come; ends the script if L2 died by itself
#   l2_value NAME             what a line "value NAME TEXT" of its console says
#   l2_ends NAME              waits for its end: PASS or FAIL; ends the script if L2 died by itself
#   nvme_status COMMAND...    the status that nvme-cli shows of a command, such as 0x281, or 0
#   same NAME WANTED GOT      PASS if the two are the same
#   no_stray_dma NAME         PASS if the IOMMU had nothing to refuse since the last time
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

DAEMON_PID='' L2_PID='' L2_STATUS=''
# However a script ends, nobody stays behind who has an SSD.
trap 'kill $DAEMON_PID $L2_PID 2>/dev/null || true' EXIT
# Nor does one end without a word.
trap 'echo "FAIL $suite/line-$LINENO: $BASH_COMMAND"' ERR

same() { if [[ $2 == "$3" ]]; then pass "$1"; else fail "$1" "'$3', not '$2'"; fi; }

huge_pages() {
	echo $(($1 / 2)) >/proc/sys/vm/nr_hugepages
	if (($(</proc/sys/vm/nr_hugepages) != $1 / 2)); then
		fail huge-pages "the kernel has $(</proc/sys/vm/nr_hugepages) of $(($1 / 2))"
		finish
	fi
}

ssd_function() {
	local dir
	for _ in {1..100}; do
		for dir in /sys/class/nvme/nvme*; do
			if [[ -e $dir/serial && $(<"$dir/serial") =~ ^$1\ *$ ]]; then
				basename "$(readlink -f "$dir/device")"
				return 0
			fi
		done
		sleep 0.1
	done
	echo "no SSD with the serial number $1" >&2
	return 1
}

ssd_disk() (
	PCI=$1
	wait_subject 20 || exit 1
	echo "$NS_DEV"
)

ssd_take() {
	/host/scripts/setup-host nvme "$1" --apply >/tmp/setup-host.out 2>&1 || {
		cat /tmp/setup-host.out
		fail take "setup-host does not give $1 to vfio-pci"
		finish
	}
}
ssd_give_back() {
	if ! /host/scripts/setup-host nvme "$1" --undo >/tmp/setup-host.out 2>&1 || ! ssd_disk "$1" >/dev/null; then
		cat /tmp/setup-host.out
		fail give-back "the kernel has $1 not again"
		finish
	fi
}

random_at() { dd if=/dev/urandom of="$1" bs=1M seek="$2" count="$3" oflag=direct conv=fsync 2>/dev/null; }
sum_of() { dd if="$1" bs=1M skip="$2" count="$3" iflag=direct 2>/dev/null | md5sum | cut -d ' ' -f 1; }

nvme_status() {
	local out
	if out=$("$@" 2>&1); then
		echo 0
	elif [[ $out =~ \((0x[0-9a-f]+)\) ]]; then
		echo "${BASH_REMATCH[1]}"
	else
		echo "$out"
	fi
}

_dma_refused=0
no_stray_dma() {
	local now
	now=$(dmesg | grep -cE 'DMAR:.*(fault addr|Request device)' || true)
	if ((now == _dma_refused)); then
		pass "$1"
	else
		dmesg | grep -E 'DMAR:.*(fault addr|Request device)' | tail -n $((now - _dma_refused)) | head -n 5
		fail "$1" "the IOMMU refused $((now - _dma_refused)) accesses of the SSD"
	fi
	_dma_refused=$now
}

daemon_on() {
	local sockets=() socket
	while [[ $1 != -- ]]; do
		sockets+=("$1")
		shift
	done
	shift
	rm -f -- "${sockets[@]}"
	vhost-user-nvme "$@" >>/results/daemon.log 2>&1 </dev/null &
	DAEMON_PID=$!
	./daemon-says.sh /results/daemon.log </dev/null >/dev/null 2>&1 &
	for _ in {1..200}; do
		kill -0 "$DAEMON_PID" 2>/dev/null || break
		for socket in "${sockets[@]}"; do [[ -S $socket ]] || { sleep 0.1 && continue 2; }; done
		return 0
	done
	tail -n 5 /results/daemon.log
	fail daemon "it does not start"
	finish
}
daemon_off() {
	local pid=$DAEMON_PID rc=0 status=0 end=$((SECONDS + ${1:-10}))
	DAEMON_PID=
	if ! kill -TERM "$pid" 2>/dev/null; then rc='gone before'; fi
	while kill -0 "$pid" 2>/dev/null && ((SECONDS < end)); do sleep 0.1; done
	if kill -KILL "$pid" 2>/dev/null; then rc="not ended after ${1:-10} s"; fi
	wait "$pid" || status=$?
	# Another process handed over to it, so it is no child of this shell: its log tells how it ended.
	if ((status == 127)) && tail -n 3 /results/daemon.log | grep -qa stopped; then status=0; fi
	((status == 0)) || rc="$rc, status $status"
	if grep -a 'panicked at' /results/daemon.log; then rc+=', a panic'; fi
	if [[ $rc != 0 ]]; then tail -n 20 /results/daemon.log; fi
	same daemon-ends 0 "$rc"
}
daemon_says() {
	local end=$((SECONDS + $2))
	until grep -qaE -- "$1" /results/daemon.log; do
		((SECONDS < end)) || return 1
		sleep 0.1
	done
}

# Memory is filled before the daemon pins it, which QEMU waits for as long as reply-timeout says.
l2_start() {
	: >/tmp/l2-console
	./l2.sh --backend memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on,prealloc=on --mem 352M "$@" &
	L2_PID=$!
}
l2_says() {
	local end=$((SECONDS + $2))
	until grep -qaE -- "$1" /tmp/l2-console; do
		if ! kill -0 "$L2_PID" 2>/dev/null; then
			_l2_status
			return 1
		fi
		((SECONDS < end)) || return 1
		sleep 0.1
	done
}
# _l2_status: waits for L2: L2_STATUS. Nothing that the script would find out is worth anything if L2 died by itself; but the daemon must
# have taken it well.
_l2_status() {
	[[ -n $L2_PID ]] || return 0
	L2_STATUS=0
	wait "$L2_PID" || L2_STATUS=$?
	L2_PID=
	if ((L2_STATUS == 76)); then
		[[ -z $DAEMON_PID ]] || daemon_off 90
		((failures == 0)) || finish
		exit 76
	fi
}
l2_value() { tr -d '\r' </tmp/l2-console | sed -nE "s/^value $1 (.*)/\1/p" | tail -n 1; }
l2_ends() {
	_l2_status
	same "$1" 0 "$L2_STATUS"
}
