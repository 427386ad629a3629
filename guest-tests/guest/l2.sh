#!/bin/bash
# Runs in a guest (L1) and boots a guest of its own (L2) with KVM: /bin/qemu with the kernel and initrd in /l2. L2's console comes out
# here, each line after "L2: "; the exit status is that of L2's test. L2's results are left in /results/l2.tar. A machine that was reset
# by itself, with nothing said to be wrong before, is no test that failed: the line "DIED ..." and status 76.
# usage: l2.sh [--seconds LIMIT] [--smp N] [--mem SIZE] [--backend QEMU-MEMORY-BACKEND] [--append TEXT] [QEMU-ARGUMENT...]
set -euo pipefail

limit=120 smp=1 mem=512M append='' backend=memory-backend-memfd,share=on
while (($#)); do
	case $1 in
	--seconds) limit=$2 && shift ;;
	--smp) smp=$2 && shift ;;
	--mem) mem=$2 && shift ;;
	--backend) backend=$2 && shift ;;
	--append) append=$2 && shift ;;
	--help | -h)
		sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
		exit 0
		;;
	*) break ;;
	esac
	shift
done

modprobe -a kvm-amd 2>/dev/null || modprobe -a kvm-intel 2>/dev/null || true
if [[ ! -c /dev/kvm ]]; then
	echo "FAIL l2: this guest has no KVM (its QEMU needs -cpu max)"
	exit 1
fi
console=/tmp/l2-console
: >$console
qemu -nodefaults -no-user-config -display none -no-reboot -machine q35,memory-backend=mem -accel kvm -cpu host -smp "$smp" -m "$mem" \
	-object "$backend,id=mem,size=$mem" -kernel /l2/vmlinuz -initrd /l2/initrd \
	-append "console=ttyS0 panic=-1 loglevel=5 tsc=reliable iomem=relaxed $append" -serial file:$console \
	-chardev file,id=results,path=/results/l2.tar "$@" \
	-device virtio-serial-pci -device virtserialport,chardev=results,name=results >/tmp/l2-qemu.log 2>&1 </dev/null &
pid=$!
tail -f $console 2>/dev/null | awk '{ print "L2: " $0; fflush() }' &
follow=$!
end=$((SECONDS + limit))
# A machine that the emulated processor refuses to enter stands still.
refused() { grep -qE '^KVM: entry failed|^KVM internal error' /tmp/l2-qemu.log; }
while kill -0 $pid 2>/dev/null && ((SECONDS < end)) && ! refused; do sleep 0.3; done
late='' status=0
if kill -0 $pid 2>/dev/null; then
	refused || late=1
	kill -KILL $pid
fi
wait $pid 2>/dev/null || status=$?
sleep 0.5
kill $follow 2>/dev/null || true
rc=$(sed -nE 's/^guest: exit ([0-9]+).*/\1/p' $console | tail -n 1)
if [[ -n $late ]]; then
	echo "FAIL l2: ended at its limit of $limit s"
	exit 1
elif [[ -z $rc ]] && { ((status == 0)) || refused; }; then
	# An oops or a panic says how it died; so does a bare reset, of which only the monitor of the outer machine knew.
	why=$(grep -aoE '(Kernel panic|BUG:|Oops:|PANIC:).*' $console | tr -d '\r' | sed -n 1p)
	if refused; then why=$(sed -n 1p /tmp/l2-qemu.log); fi
	echo "DIED L2 ended without a status: ${why:-reset}"
	exit 76
elif [[ -z $rc ]]; then
	echo "FAIL l2: its QEMU ended with status $status and says:"
	tail -n 10 /tmp/l2-qemu.log
	exit 1
elif ((rc)); then
	echo "FAIL l2: status $rc"
	exit 1
fi
echo "PASS l2"
