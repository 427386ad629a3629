#!/bin/bash
# The block devices of PCI functions, for bench.sh: prints LABEL=/dev/NAME for each LABEL=SLOT (as in -device ...,addr=SLOT).
set -euo pipefail
for arg in "$@"; do
	function=/sys/bus/pci/devices/0000:00:${arg#*=}.0
	name=
	for path in "$function"/nvme/nvme*/nvme*n1 "$function"/virtio*/block/*; do
		# with multipath nvme0c0n1, whose disk is nvme0n1
		[[ ! -e $path ]] || name=$(basename "$path" | sed -E 's/c[0-9]+n/n/')
	done
	[[ -n $name ]] || {
		echo "by-slot: no disk at $function" >&2
		exit 1
	}
	echo "${arg%%=*}=/dev/$name"
done
