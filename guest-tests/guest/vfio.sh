#!/bin/bash
# Runs in a guest that has an IOMMU and emulated SSDs: "lone" in an IOMMU group of its own, "pair" in one with another SSD. What
# setup-host refuses and does; what stands in the way of the daemon, each with its message and status; and our VFIO code with the SSD.
# usage: vfio.sh [no-iommu | no-remapping]   what such a host lacks, and nothing else
# shellcheck source=guest-tests/guest/lib.sh disable=SC2317 # what is called by name
. "$(dirname -- "$0")/lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }

setup() { /host/scripts/setup-host nvme "$@"; }

# says NAME STATUS REGEX COMMAND...: a command ends with that status, and its output has that in it
says() {
	local name=$1 status=$2 regex=$3 out rc=0
	shift 3
	out=$("$@" 2>&1) || rc=$?
	if [[ $rc == "$status" && $out =~ $regex ]]; then
		pass "$name"
	else
		fail "$name" "status $rc (wanted $status): $out"
	fi
}
# check NAME VARIABLE=VALUE... TEST: one of the hardware tests
check() {
	local name=$1 test=${*: -1}
	says "$name" 0 '1 passed' in_test_program "${@:2:$#-2}" "$test"
}
in_test_program() {
	local out rc=0
	out=$(env "${@:1:$#-1}" library-tests --exact "driver::vfio::hardware::${*: -1}" --nocapture 2>&1) || rc=$?
	echo "$out"
	[[ $rc == 0 && $out != *'NOT TESTED'* ]]
}
# as_tester COMMAND...: as an ordinary user
as_tester() { su -s /bin/bash tester -c '"$@"' -- x "$@"; }
# holds NAME COMMAND...: a PASS if it succeeds
holds() { if "${@:2}"; then pass "$1"; else fail "$1" "not so: ${*:2}"; fi; }
# soon COMMAND...: within 10 s
soon() {
	for _ in {1..100}; do
		if "$@"; then return 0; fi
		sleep 0.1
	done
	return 1
}

declare -A SSD=()
for _ in {1..100}; do
	for dir in /sys/class/nvme/nvme*; do
		[[ -e $dir/serial ]] || continue
		read -r serial <"$dir/serial"
		SSD[$serial]=$(basename "$(readlink -f "$dir/device")")
	done
	((${#SSD[@]} < 3)) || break
	sleep 0.1
done
A=${SSD[lone]} B=${SSD[pair]}
disk_of() { local d=(/sys/bus/pci/devices/"$1"/nvme/nvme*/nvme*n1) && [[ -e ${d[0]} ]] && echo "/dev/$(basename "${d[0]}" | sed 's/c[0-9]*n/n/')"; }
D=$(disk_of "$A")
driver() { basename "$(readlink "/sys/bus/pci/devices/$A/driver")"; }
echo 'tester:x:1000:1000::/tmp:/bin/bash' >>/etc/passwd
echo 'root:x:0:
tester:x:1000:' >/etc/group
modprobe -a vfio-pci vfio_iommu_type1

check_host() { vhost-user-nvme check "$@"; }
# the daemon with a namespace on an SSD, which it does not get
daemon() { timeout 20 vhost-user-nvme --socket-path /tmp/vfio.sock --namespace "nvme:$1"; }

if [[ ${1:-} == no-iommu ]]; then
	says setup-host 22 'behind no IOMMU' setup "$A" --apply
	says check 22 'mend: .*intel_iommu=on' check_host "$A"
	says daemon 22 'behind no IOMMU' daemon "$A"
	finish
elif [[ ${1:-} == no-remapping ]]; then
	says setup-host 0 'To make it last' setup "$A" --apply
	says daemon 29 'does not remap interrupts.*allow_unsafe_interrupts' daemon "$A"
	finish
fi

# ---------------------------------------------------------------- what setup-host says, refuses and does

says lists 0 "$A +driver nvme, IOMMU group [0-9]+, disks ${D#/dev/}" setup
says usage 1 'no PCI address' setup nonsense
says wrong-address 20 'no PCI device' setup 0000:77:00.0
says not-nvme 21 'no NVMe controller' setup 0000:00:00.0
says check-bad-address 2 'no PCI address' check_host nonsense
says check-wrong-address 20 "NVMe controllers of this machine: $A, " check_host 0000:77:00.0
says check-not-nvme 21 'mend: name an NVMe controller' check_host 0000:00:00.0
says daemon-bad-address 2 'nonsense' daemon nonsense
says daemon-wrong-address 20 "NVMe controllers of this machine: $A, " daemon 0000:77:00.0
says daemon-not-nvme 21 'no NVMe controller' daemon 0000:00:00.0
mkfs.ext4 -q "$D"
mount "$D" /mnt
says mounted 23 'is mounted at /mnt' setup "$A" --apply
says check-mounted 23 'FAIL +0000.* is mounted at /mnt.*mend: unmount.*FAIL +0000.* bound to the driver nvme' check_host "$A"
says daemon-mounted 23 'is mounted at /mnt' daemon "$A"
umount /mnt
unshare -m bash -c "mount $D /mnt && touch /tmp/mounted-elsewhere && exec sleep 1000" &
holds mounts-elsewhere soon test -e /tmp/mounted-elsewhere
says mounted-elsewhere 23 "is mounted at /mnt for process $!" setup "$A" --apply
kill $!
wait $! || true
mount "$D" /mnt
exec 9>/mnt/open
umount -l /mnt
says unmounted-in-use 23 'holds a file system that is still in use' setup "$A" --apply
exec 9>&-
unused() { [[ ! -e /sys/fs/ext4/${D#/dev/} ]]; }
holds unused soon unused
tail -f /dev/null 9<"$D" &
says opened 23 "is opened by process $! \\(tail\\)" setup "$A" --apply
kill $!
printf 'o\nn\np\n1\n\n+8M\nw\n' | fdisk "$D" >/dev/null 2>&1 || true
if soon test -b "${D}p1" && mkswap "${D}p1" >/dev/null && swapon "${D}p1"; then
	says swap 23 'p1 is used as swap' setup "$A" --apply
	swapoff "${D}p1"
else
	fail swap "no swap space can be made"
fi
says group-in-use 25 'is bound to nvme' setup "$B" --apply
says check-group 24 'FAIL .*bound to the driver nvme.*FAIL .* group [0-9]+, 0000:00:09.1 is bound to nvme' check_host "$B"
says daemon-not-bound 24 'scripts/setup-host nvme' daemon "$A"
says shown 0 'with --apply:.*unbind it from nvme' setup "$A"
holds shown-only test "$(driver)" = nvme
says needs-root 27 'needs root' as_tester /host/scripts/setup-host nvme "$A" --apply
says applied 0 'To make it last' setup "$A" --apply
says applied-twice 0 'nothing to change' setup "$A" --apply
holds bound test "$(driver)" = vfio-pci
holds disk-gone test ! -b "$D"

says check-good 0 'ok +0000:00:08.0 +behind an IOMMU, in group.*ok +locked memory +unlimited.*this host can serve it' check_host "$A"

# ---------------------------------------------------------------- the SSD through VFIO

ON="VHOST_USER_NVME_TEST_VFIO=$A" EXPECT=VHOST_USER_NVME_TEST_VFIO_STATUS
check driven "$ON" an_ssd_is_taken_driven_and_given_back
check wanted-back "$ON" an_ssd_the_host_wants_back_is_let_go

limits=/sys/module/vfio_iommu_type1/parameters/dma_entry_limit
before=$(<$limits)
echo 1 >$limits
says daemon-dma-entry-limit 31 'dma_entry_limit' daemon "$A"
check dma-entry-limit "$ON" $EXPECT=31 limits_are_told_at_opening
echo "$before" >$limits
with_files() { (ulimit -n "$1" && in_test_program "${@:2}"); }
says descriptors 0 '1 passed' with_files 24 "$ON" $EXPECT=32 limits_are_told_at_opening

# ---------------------------------------------------------------- an ordinary user

in_test_as_tester() { as_tester bash -c "ulimit -l $1; shift; env \"\$@\" library-tests --exact driver::vfio::hardware::limits_are_told_at_opening --nocapture" "$@"; }
says no-permission 0 '1 passed' in_test_as_tester unlimited "$ON" $EXPECT=27
says daemon-no-permission 27 "no permission to open /dev/vfio/" as_tester vhost-user-nvme --socket-path /tmp/t.sock --namespace "nvme:$A"
says check-no-permission 27 'mend: .*--user NAME' as_tester vhost-user-nvme check "$A"
says for-a-user 0 'To make it last' setup "$A" --user tester --apply
says for-a-user-twice 0 'nothing to change' setup "$A" --user tester
holds memlock-line grep -q '^tester - memlock unlimited$' /etc/security/limits.d/81-vhost-user-nvme-ssd.conf
ulimit -l 8192
says memlock 0 '1 passed' in_test_as_tester 1024 "$ON" $EXPECT=30
says check-memlock 30 'too little for an SSD' as_tester vhost-user-nvme check "$A"
says daemon-memlock 30 'limit of locked memory is too small' as_tester bash -c "ulimit -l 1024; vhost-user-nvme --socket-path /tmp/t.sock --namespace nvme:$A"
says memlock-enough 0 '1 passed' in_test_as_tester 8192 "$ON" $EXPECT=0
ulimit -l unlimited

# ---------------------------------------------------------------- a daemon that has it

vhost-user-nvme --log-level debug --socket-path /tmp/vfio.sock --namespace "nvme:$A" >/results/daemon.log 2>&1 &
pid=$!
holds daemon-starts soon test -S /tmp/vfio.sock
says daemon-busy 28 'in use by another process' vhost-user-nvme --socket-path /tmp/t.sock --namespace "nvme:$A"
# The host takes it back, though nobody asked the daemon.
override=/sys/bus/pci/devices/$A/driver_override
echo >"$override"
holds taken-back timeout 20 bash -c "echo $A >/sys/bus/pci/drivers/vfio-pci/unbind"
echo "$A" >/sys/bus/pci/drivers/nvme/bind || true
holds with-the-kernel-again test "$(driver)" = nvme
holds daemon-lives kill -0 $pid
kill $pid
holds daemon-ends wait $pid
holds daemon-says grep -aq 'the host takes the device back' /results/daemon.log
if grep -aE 'panicked|vfio_ioctls' /results/daemon.log; then fail daemon-log "see above"; fi
echo "$A" >/sys/bus/pci/drivers/nvme/unbind
echo vfio-pci >"$override"
echo "$A" >/sys/bus/pci/drivers_probe

# ---------------------------------------------------------------- and back

exec 9<>"/dev/vfio/$(basename "$(readlink "/sys/bus/pci/devices/$A/iommu_group")")"
says check-busy 0 'note .*in use by a process now' check_host "$A"
says undo-in-use 28 'in use by process [0-9]+' setup "$A" --undo
exec 9<&-
says undone 0 'driver nvme' setup "$A" --undo
says undone-twice 0 'nothing to undo' setup "$A" --undo
disk_back() { D=$(disk_of "$A") && [[ -b $D ]]; }
holds disk-back soon disk_back
# ---------------------------------------------------------------- what setup-host would not do

# to_vfio ADDRESS: by hand
to_vfio() {
	echo vfio-pci >"/sys/bus/pci/devices/$1/driver_override"
	echo "$1" >"/sys/bus/pci/devices/$1/driver/unbind"
	echo "$1" >/sys/bus/pci/drivers_probe
}
to_vfio "$B"
says daemon-group 25 'group [0-9]+, 0000:00:09.1 is bound to nvme' daemon "$B"
says undone-pair 0 'driver nvme' setup "$B" --undo
to_vfio "$A"
rmmod vfio_iommu_type1
says daemon-no-vfio 26 'modprobe vfio-pci' daemon "$A"
says undone-without-vfio 0 'driver nvme' setup "$A" --undo
holds disk-back-again soon disk_back

# The test's pattern: byte i is i / 7.
first=$(dd if="$D" bs=512 skip=8 count=1 iflag=direct 2>/dev/null | od -An -tu1 -N 15 | tr -s ' \n' ' ')
if [[ $first == ' 0 0 0 0 0 0 0 1 1 1 1 1 1 1 2 ' ]]; then
	pass read-back-by-the-kernel
else
	fail read-back-by-the-kernel "it reads$first"
fi
finish
