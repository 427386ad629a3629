# shellcheck shell=bash
# host_nvme.sh - `scripts/setup-host nvme`: gives an SSD to vfio-pci, so that the daemon can drive it, and takes it back. Needs common.sh.
#
# What it finds out it reads from sysfs and procfs; a refusal ends it with the exit status that docs/SSD.md has for it (the same as the
# daemon's, and 'vhost-user-nvme check').

host_nvme_usage() {
	cat <<-USAGE
		usage: scripts/setup-host nvme [ADDRESS] [--user NAME] [--apply | --undo]

		Without ADDRESS: lists the NVMe controllers of this machine, and who has them. With the PCI address of one, such as
		0000:01:00.0: shows what would be done to give it to vfio-pci, from where 'vhost-user-nvme --namespace nvme:ADDRESS' takes
		it. A controller with a disk that is mounted, used as swap, a part of something else or opened by a process is refused.
		Nothing is changed without --apply or --undo, which need root.

		  --user NAME   let this user run the daemon: it gets the group's file in /dev/vfio, and may lock memory
		  --apply       do it; it holds until the next boot: the lines to make it last are printed
		  --undo        give it back to the kernel's own driver
		  --help        this text
	USAGE
}

_sys=/sys/bus/pci/devices

# refuse STATUS TEXT MEND
refuse() {
	printf 'error: %s\n       %s\n' "$2" "$3" >&2
	exit "$1"
}

_link_name() { if [[ -L $1 ]]; then basename "$(readlink "$1")"; fi; }
_driver_of() { _link_name "$_sys/$1/driver"; }
_group_of() { _link_name "$_sys/$1/iommu_group"; }
_class_of() { sed 's/^0x//' "$_sys/$1/class"; }

# The disks of a controller: nvme0n1; also when the kernel names the way to it, nvme0c1n1.
_disks_of() {
	local dir name
	for dir in "$_sys/$1"/nvme/nvme*/nvme*n*; do
		name=${dir##*/}
		if [[ $name =~ ^nvme([0-9]+)(c[0-9]+)?n([0-9]+)$ ]]; then echo "nvme${BASH_REMATCH[1]}n${BASH_REMATCH[3]}"; fi
	done | sort -u
}

# One process of each mount namespace but our own. Those of other users show to root only.
_others_mounts() {
	local own id file
	own=$(stat -Lc %i /proc/self/ns/mnt)
	{ stat -Lc '%i %n' /proc/[0-9]*/ns/mnt 2>/dev/null || true; } | sort -u -k 1,1 | while read -r id file; do
		[[ $id == "$own" ]] || echo "${file%/ns/mnt}/mountinfo"
	done
}

# _mounts_in PART NUMBER MOUNTINFO: where it is mounted, a line each
_mounts_in() {
	awk -v number="$2" -v device="/dev/$1" '
		{ source = ""; for (i = 1; i <= NF; i++) if ($i == "-") source = $(i + 2) }
		$3 == number || source == device {
			split(FILENAME, path, "/")
			print substr(device, 6) " is mounted at " $5 (path[3] == "self" ? "" : " for process " path[3])
		}' "$3" 2>/dev/null || true
}

# The same with what may be mounted where nobody of us sees it: in the namespace of a container, or in none any more, but with files open.
_mounts_of() {
	local part=$1 number=$2 found file dir
	found=$(_mounts_in "$part" "$number" /proc/self/mountinfo)
	if [[ -z $found ]]; then
		found=$(_others_mounts | while read -r file; do _mounts_in "$part" "$number" "$file"; done)
	fi
	if [[ -z $found ]]; then
		for dir in "/sys/fs"/*/"$part" "/sys/fs/btrfs"/*/devices/"$part"; do
			[[ ! -e $dir ]] || found="$part holds a file system that is still in use"
		done
	fi
	[[ -z $found ]] || echo "$found"
}

# What the host uses a disk for, a line each.
_uses_of() {
	local disk=$1 part dir holder pid fd
	for dir in "/sys/class/block/$disk" "/sys/class/block/$disk/$disk"p*; do
		[[ -e $dir/dev ]] || continue
		part=${dir##*/}
		_mounts_of "$part" "$(<"$dir/dev")"
		awk -v device="/dev/$part" '$1 == device { print substr(device, 6) " is used as swap" }' /proc/swaps
		for holder in "$dir"/holders/*; do
			[[ ! -e $holder ]] || echo "$part is a part of ${holder##*/}"
		done
	done
	# Who has it open shows to root only.
	for fd in /proc/[0-9]*/fd/*; do
		case $(readlink "$fd" 2>/dev/null) in
		"/dev/$disk" | "/dev/$disk"p[0-9]* | "/dev/ng${disk#nvme}")
			pid=${fd#/proc/}
			pid=${pid%%/*}
			echo "$disk is opened by process $pid ($(cat "/proc/$pid/comm" 2>/dev/null || true))"
			;;
		esac
	done | sort -u
}

_all_uses() {
	local disk
	for disk in $(_disks_of "$1"); do _uses_of "$disk"; done
}

# Processes that have the group's file or the device open.
_users_of_group() {
	local fd pid
	for fd in /proc/[0-9]*/fd/*; do
		if [[ $(readlink "$fd" 2>/dev/null) == "/dev/vfio/$1" ]]; then
			pid=${fd#/proc/}
			echo "${pid%%/*}"
		fi
	done | sort -un
}

# Members of a group that another driver than vfio-pci uses, but for bridges.
_in_the_way() {
	local member driver class
	for member in "/sys/kernel/iommu_groups/$2/devices"/*; do
		member=${member##*/}
		[[ $member != "$1" && -e $_sys/$member/class ]] || continue
		driver=$(_driver_of "$member") class=$(_class_of "$member")
		case $driver in
		'' | vfio-pci | pci-stub | pcieport) ;;
		*) [[ $class == 06* ]] || echo "$member is bound to $driver" ;;
		esac
	done
}

_list_controllers() {
	local dir address found=''
	for dir in "$_sys"/*; do
		address=${dir##*/}
		[[ $(_class_of "$address") == 010802 ]] || continue
		found=1
		row "$address" "$(_describe "$address")"
		_all_uses "$address" | sed 's/^/                         /'
	done
	[[ -n $found ]] || echo 'this machine has no NVMe controller'
}

_describe() {
	local driver group node disks
	driver=$(_driver_of "$1") group=$(_group_of "$1") node=$(cat "$_sys/$1/numa_node" 2>/dev/null || echo -1)
	disks=$(_disks_of "$1" | paste -sd ' ' -)
	if [[ -n $group ]]; then group="IOMMU group $group"; fi
	printf 'driver %s, %s' "${driver:-none}" "${group:-no IOMMU}"
	((node < 0)) || printf ', NUMA node %s' "$node"
	printf '%s\n' "${disks:+, disks $disks}"
}

host_nvme() {
	local address='' user='' action='' group driver text uses
	while (($#)); do
		case $1 in
		--help | -h) host_nvme_usage && exit 0 ;;
		--apply | --undo)
			[[ -z $action || $action == "$1" ]] || fail "--apply and --undo exclude each other"
			action=$1
			;;
		--user)
			[[ -n ${2:-} ]] || fail "--user needs a name"
			user=$2
			shift
			;;
		-*) fail "unknown argument '$1' (try 'scripts/setup-host nvme --help')" ;;
		*)
			[[ -z $address ]] || fail "one SSD at a time: '$address' or '$1'?"
			address=${1,,}
			;;
		esac
		shift
	done
	if [[ -z $address ]]; then
		[[ -z $action ]] || fail "$action needs the address of an SSD"
		_list_controllers
		exit 0
	fi
	[[ $address =~ ^[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$ ]] && address=0000:$address
	[[ $address =~ ^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$ ]] ||
		fail "'$address' is no PCI address; write it as lspci -D does, for example 0000:01:00.0"
	if [[ -n $user ]] && ! id -u -- "$user" >/dev/null 2>&1; then fail "there is no user '$user'"; fi

	[[ -e $_sys/$address ]] || refuse 20 "there is no PCI device $address" "'scripts/setup-host nvme' lists the NVMe controllers of this machine"
	[[ $(_class_of "$address") == 010802 ]] ||
		refuse 21 "$address is no NVMe controller (its class is $(_class_of "$address"))" "'scripts/setup-host nvme' lists those of this machine"
	row "$address" "$(_describe "$address")"
	group=$(_group_of "$address") driver=$(_driver_of "$address")
	if [[ $action == --undo ]]; then
		_undo "$address" "$group" "$driver"
		return
	fi
	[[ -n $group ]] || refuse 22 "$address is behind no IOMMU: nothing would keep the SSD inside the memory it is shown" \
		"switch the IOMMU on in the firmware, and in the kernel with intel_iommu=on (Intel) or amd_iommu=on (AMD)"
	uses=$(_all_uses "$address")
	[[ -z $uses ]] || refuse 23 "$address is in use by this host: ${uses//$'\n'/, }" \
		"unmount it, swapoff it, take it out of its RAID or volume group, or end the process first"
	text=$(_in_the_way "$address" "$group")
	[[ -z $text ]] || refuse 25 "$address cannot be separated from other devices of IOMMU group $group: ${text//$'\n'/, }" \
		"give those to vfio-pci as well, or put the SSD into a slot with a group of its own"
	_plan "$address" "$group" "$driver" "$user" "$action"
}

_limits_file=/etc/security/limits.d/81-vhost-user-nvme-ssd.conf

_plan() {
	local address=$1 group=$2 driver=$3 user=$4 action=$5 changes=()
	if [[ ! -d /sys/bus/pci/drivers/vfio-pci || ! -e /dev/vfio/vfio ]] || [[ ! -d /sys/module/vfio_iommu_type1 ]]; then
		changes+=("load the modules vfio-pci and vfio_iommu_type1")
	fi
	if [[ $driver != vfio-pci ]]; then
		changes+=("set driver_override of $address to vfio-pci")
		[[ -z $driver ]] || changes+=("unbind it from $driver: its disks ($(_disks_of "$address" | paste -sd ' ' -)) disappear from this host")
		changes+=("bind it to vfio-pci")
	fi
	if [[ -n $user ]]; then
		[[ $(stat -c %U "/dev/vfio/$group" 2>/dev/null) == "$user" ]] || changes+=("make $user the owner of /dev/vfio/$group")
		[[ $user == root ]] || grep -qs "^$user - memlock " "$_limits_file" ||
			changes+=("let $user lock memory: '$user - memlock unlimited' in $_limits_file (from the next login on)")
	fi
	if ((${#changes[@]} == 0)); then
		echo 'nothing to change'
		return
	fi
	printf '%s:\n' "$([[ -n $action ]] && echo changing || echo 'with --apply')"
	printf '  %s\n' "${changes[@]}"
	[[ -n $action ]] || return 0
	_apply "$address" "$group" "$user"
}

_apply() {
	local address=$1 group=$2 user=$3 uses
	((EUID == 0)) || refuse 27 "changing this needs root" "run it with sudo"
	modprobe -a vfio-pci vfio_iommu_type1 2>/dev/null || true
	[[ -e /dev/vfio/vfio || ! -e /dev/iommu ]] ||
		refuse 26 "this kernel has VFIO by /dev/iommu only, which setup-host does not know" "bind it to vfio-pci by hand (docs/SSD.md)"
	[[ -d /sys/bus/pci/drivers/vfio-pci && -e /dev/vfio/vfio ]] ||
		refuse 26 "this kernel offers no VFIO" "modprobe vfio-pci (the kernel needs CONFIG_VFIO_PCI and CONFIG_VFIO_IOMMU_TYPE1)"
	if [[ $(_driver_of "$address") != vfio-pci ]]; then
		step "give $address to vfio-pci"
		echo vfio-pci >"$_sys/$address/driver_override"
		# Somebody may have come since.
		uses=$(_all_uses "$address")
		if [[ -n $uses ]]; then
			echo >"$_sys/$address/driver_override"
			refuse 23 "$address is in use by this host: ${uses//$'\n'/, }" "nothing was changed"
		fi
		if [[ -e $_sys/$address/driver ]]; then echo "$address" >"$_sys/$address/driver/unbind"; fi
		echo "$address" >/sys/bus/pci/drivers_probe
		[[ $(_driver_of "$address") == vfio-pci ]] || fail "vfio-pci does not take it: see dmesg"
		ok
	fi
	if [[ -n $user ]]; then
		step "let $user use it"
		_wait_for_file "/dev/vfio/$group"
		chown -- "$user" "/dev/vfio/$group" || fail "/dev/vfio/$group cannot be given away"
		if [[ $user != root ]] && ! grep -qs "^$user - memlock " "$_limits_file"; then
			mkdir -p -- "${_limits_file%/*}"
			echo "$user - memlock unlimited" >>"$_limits_file"
		fi
		ok
	fi
	cat <<-LAST
		To make it last, as root:
		  echo vfio-pci > /etc/modules-load.d/80-vhost-user-nvme.conf
		  echo 'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="$address", ATTR{driver_override}="vfio-pci"' >> /etc/udev/rules.d/80-vhost-user-nvme.rules
	LAST
	if [[ -n $user && $user != root ]]; then
		cat <<-LAST
			  echo 'SUBSYSTEM=="vfio", KERNEL=="$group", OWNER="$user"' >> /etc/udev/rules.d/80-vhost-user-nvme.rules
			A service needs LimitMEMLOCK=infinity (or the memory of all guests of the SSD and 64 MiB) besides User=$user.
		LAST
	fi
}

# udev, or the kernel itself, makes it a moment later.
_wait_for_file() {
	local i
	for ((i = 0; i < 50; i++)); do
		[[ ! -e $1 ]] || return 0
		sleep 0.1
	done
	fail "there is no $1"
}

_undo() {
	local address=$1 group=$2 driver=$3 users='' override
	override=$(cat "$_sys/$address/driver_override" 2>/dev/null || true)
	[[ $override != '(null)' ]] || override=
	if [[ $driver != vfio-pci && -z $override ]]; then
		echo 'nothing to undo: it is not with vfio-pci'
		return
	fi
	[[ -z $group ]] || users=$(_users_of_group "$group" | paste -sd ' ' -)
	[[ -z $users ]] || refuse 28 "$address is in use by process $users" "end it first"
	((EUID == 0)) || refuse 27 "changing this needs root" "run it with sudo"
	step "give $address back to the kernel"
	echo >"$_sys/$address/driver_override"
	if [[ -e $_sys/$address/driver ]]; then echo "$address" >"$_sys/$address/driver/unbind"; fi
	modprobe nvme 2>/dev/null || true
	echo "$address" >/sys/bus/pci/drivers_probe
	[[ $(_driver_of "$address") != vfio-pci ]] || fail "it is still with vfio-pci"
	ok
	row "$address" "$(_describe "$address")"
	if [[ -e $_limits_file ]]; then echo "Users may still lock memory: remove $_limits_file if no other SSD needs it"; fi
}
