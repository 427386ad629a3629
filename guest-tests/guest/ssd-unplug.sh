#!/bin/bash
# Runs in a host (L1) with an IOMMU and two SSDs in hot-plug slots, with the serial numbers "sudden" and "polite". A guest (L2,
# ssd-l2.sh gone) has a disk on each and keeps both busy. The power of one slot is switched off under it; the host is asked for the other
# ("READY polite").
# shellcheck source=guest-tests/guest/ssd-lib.sh
. "$(dirname -- "$0")/ssd-lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }

# gone_from_host NAME ADDRESS: nobody holds the function back
gone_from_host() {
	local end=$((SECONDS + 40 * factor))
	while [[ -e /sys/bus/pci/devices/$2 ]] && ((SECONDS < end)); do sleep 0.2; done
	if [[ -e /sys/bus/pci/devices/$2 ]]; then fail "$1-let-go" "the host still has $2"; else pass "$1-let-go"; fi
}

factor=${1:-1}
huge_pages 384
sudden=$(ssd_function sudden) polite=$(ssd_function polite)
port=$(basename "$(dirname "$(readlink -f "/sys/bus/pci/devices/$sudden")")")
ssd_take "$sudden"
ssd_take "$polite"
for name in sudden polite; do
	printf '[[controller]]\nsocket-path = "/tmp/%s.sock"\n[[controller.namespace]]\nbackend = "nvme"\naddress = "%s"\n\n' "$name" "${!name}"
done >/tmp/unplug.toml
daemon_on /tmp/sudden.sock /tmp/polite.sock -- --config /tmp/unplug.toml
l2_start --seconds $((250 * factor)) --append "ssd.phase=gone ssd.factor=$factor" -device vhost-user-nvme,reply-timeout=180000,socket=/tmp/sudden.sock,addr=05.0 \
	-device vhost-user-nvme,reply-timeout=180000,socket=/tmp/polite.sock,addr=06.0
if l2_says '^READY sudden' $((180 * factor)); then
	# Slot Control: power indicator off, power off. QEMU takes the SSD away at that moment.
	setpci -s "$port" CAP_EXP+18.w=0700:0700
	if daemon_says "the SSD is given up.*$sudden" $((20 * factor)); then pass sudden-noticed; else fail sudden-noticed "the daemon did not give it up"; fi
fi
if l2_says '^READY polite' $((180 * factor)); then gone_from_host polite "$polite"; fi
l2_ends guest
# The kernel tries to reset what is closed for 65 s, unless it knows that it has gone.
daemon_off 90
finish
