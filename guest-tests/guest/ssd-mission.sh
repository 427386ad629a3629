#!/bin/bash
# Runs in a host (L1) with an IOMMU and an SSD with the serial number "mission", of 256 MiB in blocks of 4096 bytes, block 57344 of which
# cannot be read and block 58368 not be written: the daemon owns it through VFIO, a guest (L2) uses it alone (ssd-l2.sh mission). What
# one side writes the other reads; errors keep their status; the SSD is reset, and later slow (said with "READY slow"), with I/O on it.
# shellcheck source=guest-tests/guest/ssd-lib.sh
. "$(dirname -- "$0")/ssd-lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }

factor=${1:-1}
huge_pages 384
SSD=$(ssd_function mission) DISK=$(ssd_disk "$SSD")
random_at "$DISK" 192 16
host_sum=$(sum_of "$DISK" 192 16)
expect_errors begin status
bad_read=$(nvme_status nvme read "$DISK" --start-block=57344 --block-count=0 --data-size=4096 --data=/tmp/bad)
bad_write=$(nvme_status nvme write "$DISK" --start-block=58368 --block-count=0 --data-size=4096 --data=/bin/busybox)
expect_errors end status
vwc=$(nvme id-ctrl "$DISK" -o json | jq -r .vwc)
echo "the SSD says: $bad_read reading a bad block, $bad_write writing one; VWC $vwc"
[[ $bad_read == 0x*281 ]] || fail bad-block "the SSD reads it with $bad_read"
[[ $bad_write == 0x*280 ]] || fail bad-block "the SSD writes it with $bad_write"
ssd_take "$SSD"

cat >/tmp/mission.toml <<TOML
[[ssd]]
address = "$SSD"
command-timeout-ms = 3000
abort-grace-ms = 5000
on-reset = "resubmit"

[[controller]]
socket-path = "/tmp/mission.sock"
[[controller.namespace]]
backend = "nvme"
address = "$SSD"
TOML
daemon_on /tmp/mission.sock -- --config /tmp/mission.toml
l2_start --seconds $((250 * factor)) --append "ssd.phase=mission ssd.factor=$factor ssd.host_sum=$host_sum ssd.bad_read=$bad_read ssd.bad_write=$bad_write ssd.vwc=$vwc" \
	-device vhost-user-nvme,reply-timeout=180000,socket=/tmp/mission.sock
if ! l2_says '^READY reset' $((180 * factor)); then
	fail reset "the guest did not get so far"
else
	sleep 1
	echo 1 >"/sys/bus/pci/devices/$SSD/reset"
	if daemon_says 'the controller serves again' $((30 * factor)); then pass reset; else fail reset "the daemon did not bring the SSD up again"; fi
fi
l2_ends guest
daemon_off
grep -aE 'WARN|ERROR|serves again' /results/daemon.log || true
if grep -qaE 'WARN.* overdue' /results/daemon.log; then pass slow-was-noticed; else fail slow-was-noticed "no command was overdue"; fi
no_stray_dma dma-of-one-guest
ssd_give_back "$SSD"
DISK=$(ssd_disk "$SSD")
same guest-data-read-by-host "$(l2_value guest_sum)" "$(sum_of "$DISK" 208 16)"
same host-data-untouched "$host_sum" "$(sum_of "$DISK" 192 16)"

forwarded=$(grep -aoE 'forwarded: [0-9]+ of [0-9]+ transfers' /results/daemon.log | tail -n 1)
if [[ $forwarded =~ ^forwarded:\ ([1-9][0-9]*)\ of\ ([0-9]+) && ${BASH_REMATCH[1]} == "${BASH_REMATCH[2]}" ]]; then
	pass "every-prp-untouched (${BASH_REMATCH[1]} transfers)"
else
	fail every-prp-untouched "$forwarded"
fi
finish
