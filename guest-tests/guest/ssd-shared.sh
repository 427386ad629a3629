#!/bin/bash
# Runs in a host (L1) with an IOMMU and an SSD with the serial number "mission", of 256 MiB: a guest (L2, ssd-l2.sh shared) has the
# first 96 MiB, the virtual guest the next 96, nobody the rest. The virtual guest tries all it can to get at what is not its own while the
# other does verified I/O. Then the virtual guest has the whole SSD to itself, and aims where it must not.
# shellcheck source=guest-tests/guest/ssd-lib.sh
. "$(dirname -- "$0")/ssd-lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }

# virtual_guest NAME VARIABLE TEST: a test of the virtual guest, with the sockets
virtual_guest() {
	if env TMPDIR=/tmp "$2" virtual-guest --exact "ssd::$3" --nocapture >"/tmp/$1.out" 2>&1 && grep -q '1 passed' "/tmp/$1.out" &&
		! grep -q 'NOT TESTED' "/tmp/$1.out"; then
		pass "$1"
	else
		tail -n 30 "/tmp/$1.out"
		fail "$1" "$(grep -A 3 'panicked at' "/tmp/$1.out" | paste -sd ' ' -)"
	fi
}

factor=${1:-1}
huge_pages 384
SSD=$(ssd_function mission) DISK=$(ssd_disk "$SSD")
random_at "$DISK" 32 16
random_at "$DISK" 192 32
host_sum=$(sum_of "$DISK" 32 16) nobodys_sum=$(sum_of "$DISK" 192 32)
ssd_take "$SSD"
cat >/tmp/shared.toml <<TOML
[[controller]]
socket-path = "/tmp/first.sock"
[[controller.namespace]]
backend = "nvme"
address = "$SSD"
size = "96M"

[[controller]]
socket-path = "/tmp/second.sock"
[[controller.namespace]]
backend = "nvme"
address = "$SSD"
offset = "96M"
size = "96M"
TOML
daemon_on /tmp/first.sock /tmp/second.sock -- --config /tmp/shared.toml
l2_start --seconds $((250 * factor)) --append "ssd.phase=shared ssd.factor=$factor ssd.host_sum=$host_sum ssd.seconds=10" -device vhost-user-nvme,reply-timeout=180000,socket=/tmp/first.sock
if l2_says '^READY neighbour' $((180 * factor)); then
	virtual_guest neighbour VHOST_USER_NVME_TEST_NEIGHBOUR=/tmp/second.sock a_neighbour_gets_at_nothing_of_the_other
fi
l2_ends guest
daemon_off
no_stray_dma dma-of-two-guests

# A guest that has the SSD to itself names its device addresses itself: it must come to no harm but its own.
daemon_on /tmp/alone.sock -- --socket-path /tmp/alone.sock --namespace "nvme:$SSD"
virtual_guest alone-and-wild VHOST_USER_NVME_TEST_ALONE=/tmp/alone.sock a_wild_guest_harms_only_itself
daemon_off

ssd_give_back "$SSD"
DISK=$(ssd_disk "$SSD")
same guest-data "$(l2_value guest_sum)" "$(sum_of "$DISK" 80 16)"
same nobodys-data "$nobodys_sum" "$(sum_of "$DISK" 192 32)"
finish
