# shellcheck shell=bash
# ssd.sh - a host with an IOMMU, huge pages and SSDs, as a guest (L1) that has guests of its own (L2). Needs common.sh, guest.sh, vm.sh
# and rust.sh; QEMU_BIN and DAEMON name the programs.
#
#   ssd_tree TREE L1-COMMAND... [-- L2-COMMAND...]   everything L1 needs; without L2-COMMANDs it is a host without guests
#   ssd_iommu                      the vIOMMU, which comes first, in the array SSD_ARGS
#   ssd_image FILE MIB             the file that an SSD's data is in
#   ssd_port ID                    adds a root port with the name ID: what is in it can be unplugged
#   ssd_add ID BUS NODE [NS-PROPERTY,...]   adds an SSD with one namespace (ID-ns) on the block node; its serial number is its ID
#   ssd_node NAME FILE             adds a block node of a file
#   ssd_start OPTION... [-- ARG...]   boots it with all that was added; VM_OUT is --out's DIR
# shellcheck disable=SC2034,SC2154 # the results are for the scripts that source this

SSD_ARGS=()
_ssd_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

ssd_tree() {
	local tree=$1 first=() tmp file
	shift
	while (($#)) && [[ $1 != -- ]]; do
		first+=("$1")
		shift
	done
	temp_dir tmp
	guest_test_tree "$tree" "${first[@]}"
	if (($#)); then
		shift
		guest_test_cpio "$tmp/l2.cpio" "$@"
		guest_l2_tree "$tree" 6.12 "$tmp/l2.cpio"
		collect_qemu "$tree" "$QEMU_BIN" / "$(dirname "$QEMU_BIN")/../share/qemu"
	fi
	collect_binary "$tree" "$DAEMON"
	mkdir -p "$tree/host/scripts/lib"
	cp -- "$_ssd_dir/scripts/setup-host" "$tree/host/scripts/"
	for file in "$_ssd_dir"/scripts/lib/*.sh; do cp -- "$file" "$tree/host/scripts/lib/"; done
	rm -rf -- "$tmp"
}

# caching-mode tells the vIOMMU of every mapping, which VFIO in L1 and the L1 kernel alike need for devices that QEMU emulates.
# Slots are PCI Express's own, as on real hosts, and not ACPI's: their power can be switched off.
ssd_iommu() { SSD_ARGS=(-device "intel-iommu,intremap=on,caching-mode=on" -global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off); }

ssd_image() { truncate -s "$2M" "$1"; }
ssd_node() { SSD_ARGS+=(-blockdev "driver=file,node-name=$1,filename=$2,discard=unmap"); }
_ssd_ports=0
ssd_port() {
	_ssd_ports=$((_ssd_ports + 1))
	SSD_ARGS+=(-device "pcie-root-port,id=$1,chassis=$_ssd_ports,slot=$_ssd_ports")
}
ssd_add() {
	SSD_ARGS+=(-device "nvme,id=$1,serial=$1,bus=$2,mdts=5" -device "nvme-ns,id=$1-ns,bus=$1,nsid=1,drive=$3${4:+,$4}")
}

# The frequency of a guest's clock that is told and not measured holds for L2 as well (l2.sh).
ssd_start() {
	local options=()
	while (($#)) && [[ $1 != -- ]]; do
		options+=("$1")
		shift
	done
	(($# == 0)) || shift
	vm_start --qemu "$QEMU_BIN" --kernel 6.12 --smp 2 --mem 3G --memory memfd --append "intel_iommu=on iommu=nopt" "${options[@]}" -- \
		"${SSD_ARGS[@]}" "$@"
}
