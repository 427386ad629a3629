#!/bin/bash
# The kernel log holds no warning, oops, hung task, NVMe timeout, failed I/O or complaint about the device's data, other than what
# the allow list below names. I/O errors between the marks of expect_errors (lib.sh) are expected; nothing else is, even there.
case ${1:-} in
--help | -h)
	sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
	echo "usage: dmesg-clean.sh [EXTENDED-REGEX-OF-MORE-ALLOWED-LINES]"
	exit 0
	;;
esac
set -euo pipefail

bad='WARNING:|BUG:|BUG |Oops|Call Trace|general protection|Kernel panic|UBSAN|KASAN|lockdep|RCU.*stall|rcu:.*stall|soft lockup|hard LOCKUP'
bad+='|blocked for more than|\[Firmware (Bug|Warn|Info)\]|nobody cared|Spurious|page allocation failure'
bad+='|nvme.*(timeout|timed out|not ready|removing after|controller is down|Abort|failed|fail|invalid|Ignoring|duplicate|missing|bogus|unable'
bad+='|unexpected|quirk|could not|Could not|mismatch|changed|error|reset controller)'
# what a failing command looks like; allowed while errors are expected
io='I/O [Ee]rror|Buffer I/O|critical (medium|target|space) error|I/O Cmd|Async.*error|lost async page write|JBD2|EXT4-fs (error|warning)'

# The machine, not the device: QEMU's q35 under emulation says these.
allow='^$'
allow+='|tsc: Unable to calibrate against PIT'
# The bus is told to take the function away while it is in use: that is the test's doing, and the line is the kernel's echo of it.
allow+='|guest-test:'
# A controller reset that the test asked for is told at this level since 6.1.
allow+='|nvme nvme[0-9]+: resetting controller$'
[[ -z ${1:-} ]] || allow+="|$1"

# through the environment, since awk -v would eat the backslashes
export bad io allow
found=$(dmesg | awk '
	BEGIN { bad = ENVIRON["bad"]; io = ENVIRON["io"]; allow = ENVIRON["allow"] }
	/guest-test: begin of expected I\/O errors/ { expected = 1 }
	/guest-test: end of expected I\/O errors/ { expected = 0 }
	$0 ~ allow { next }
	$0 ~ io { if (!expected) print; next }
	$0 ~ bad { print }')
if [[ -n $found ]]; then
	count=$(wc -l <<<"$found")
	echo "FAIL dmesg-clean: $count lines, the first ones:"
	head -n 20 <<<"$found"
	exit 1
fi
echo "PASS dmesg-clean"
