#!/bin/bash
# Runs in a host (L1) with an IOMMU and two SSDs, "again" and "fails", each the daemon's and a disk of a guest (L2, ssd-l2.sh late). At the
# line "READY late" somebody makes them slower than they may be: a command is not done in time, an Abort does not help, and each is reset.
# Then they are fast again.
# shellcheck source=guest-tests/guest/ssd-lib.sh
. "$(dirname -- "$0")/ssd-lib.sh"
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }

factor=${1:-1}
huge_pages 384
again=$(ssd_function again) fails=$(ssd_function fails)
ssd_take "$again"
ssd_take "$fails"
ssd() {
	printf '[[ssd]]\naddress = "%s"\non-reset = "%s"\ncommand-timeout-ms = 2000\nabort-grace-ms = 2000\n\n' "${!1}" "$2"
	printf '[[controller]]\nsocket-path = "/tmp/%s.sock"\n[[controller.namespace]]\nbackend = "nvme"\naddress = "%s"\n\n' "$1" "${!1}"
}
{
	ssd again resubmit
	ssd fails fail
} >/tmp/late.toml
daemon_on /tmp/again.sock /tmp/fails.sock -- --config /tmp/late.toml
l2_start --seconds $((250 * factor)) --append "ssd.phase=late ssd.factor=$factor nvme_core.max_retries=0" \
	-device vhost-user-nvme,reply-timeout=180000,socket=/tmp/again.sock,addr=05.0 \
	-device vhost-user-nvme,reply-timeout=180000,socket=/tmp/fails.sock,addr=06.0
if l2_says '^READY late' $((180 * factor)); then
	for name in again fails; do
		if daemon_says "is reset ssd=.*${!name}.*a command was not done in time" $((30 * factor)); then
			pass "$name-is-reset"
		else
			fail "$name-is-reset" "it is waited for for ever"
		fi
		if daemon_says "the SSD serves again.*${!name}" $((30 * factor)); then pass "$name-serves"; else fail "$name-serves" "it does not come back"; fi
	done
fi
l2_ends guest
daemon_off
grep -aE 'WARN|ERROR|serves again' /results/daemon.log || true
finish
