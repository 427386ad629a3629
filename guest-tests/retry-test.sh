#!/bin/bash
# Which ends of a nested guest are run again, and how often: cases whose machines are text (consoles as they were seen), through the very
# runner and the very judgement that the real ones have.
# usage: retry-test.sh
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. scripts/lib/common.sh
. scripts/lib/cases.sh
. guest-tests/cases/lib.sh

top=''
temp_dir top
mkdir "$top/work" "$top/logs" "$top/count"

# The machine that is not there: vm_wait tells what the case wrote.
vm_wait() { return "$_status"; }

# ends NAME STATUS QEMU-STATUS CONSOLE: a case whose machine ends that way, each time
# once NAME STATUS QEMU-STATUS CONSOLE: only the first time; then well
# shellcheck disable=SC2034,SC2031 # VM_STATUS is for lib.sh, CASE_DIR of the runner
ends() {
	echo run >>"$top/count/$1"
	VM_OUT=$CASE_DIR VM_STATUS=$3 _status=$2
	printf '%b' "$4" >"$CASE_DIR/console.log"
	: >"$CASE_DIR/qemu.log"
	nested_passes
}
once() {
	if [[ -e $top/count/$1 ]]; then set -- "$1" 0 0 'guest: exit 0\n'; fi
	ends "$@"
}

l1='guest: kernel 6.12\n'
died='DIED L2 ended without a status: reset\nguest: exit 1\n'
# a death: run again, and passes
test_case l1-once once l1-once 125 0 "$l1"
test_case l2-once once l2-once 1 0 "$l1$died"
test_case expected-error once expected-error 1 0 "${l1}L2: guest-test: begin of expected I/O errors: x\nL2: I/O error, dev nvme0n1\nL2: guest-test: end of expected I/O errors: x\n$died"
test_case daemon-warns once daemon-warns 125 0 "${l1}daemon: x  WARN overdue\n"
# a death each time
test_case l1-always ends l1-always 125 0 "$l1"
# no death, or not it alone: never run again
test_case failed once failed 1 0 "${l1}FAIL x/y: z\n"
test_case failed-and-died once failed-and-died 1 0 "${l1}L2: FAIL ssd-l2/verify: fio ended with status 1\n$died"
test_case verify once verify 125 0 "${l1}L2: verify: bad header offset 0\n"
test_case io-error once io-error 125 0 "${l1}L2: [ 1.0] I/O error, dev nvme0n1, sector 8\n"
test_case error-after-expected once error-after-expected 125 0 "${l1}guest-test: begin of expected\nguest-test: end of expected\nI/O error, dev nvme0n1\n"
test_case timeout once timeout 125 0 "${l1}L2: nvme nvme0: I/O tag 1 (1001) QID 1 timeout, aborting\n"
test_case hung-task once hung-task 1 0 "${l1}L2: INFO: task fio:99 blocked for more than 20 seconds.\n$died"
test_case daemon-panics once daemon-panics 1 0 "${l1}daemon: thread 'poller' panicked at src/x.rs:1:1\n$died"
test_case daemon-error once daemon-error 125 0 "${l1}daemon: 2026 ERROR the SSD is given up\n"
test_case qemu-crashed once qemu-crashed 125 139 "$l1"
test_case limit once limit 124 0 "$l1"
test_case limit-and-died once limit-and-died 124 0 "$l1$died"

run_cases 3 "$top/work" "$top/logs" '' >"$top/out" 2>&1

bad=0
# so NAME RUNS VERDICT-REGEX
so() {
	local runs notes line
	runs=$(wc -l <"$top/count/$1")
	notes=$(grep -cE "^NOTE $1: nested guest died by itself .*; run again\$" "$top/out" || true)
	line=$(grep -E "^(PASS|FAIL|SKIP) $1 " "$top/out" || true)
	if [[ $runs != "$2" || $notes != $(($2 - 1)) || ! $line =~ $3 ]]; then
		echo "FAIL $1: $runs runs (wanted $2), $notes notes, '$line' (wanted '$3')"
		bad=1
	fi
}
for name in l1-once l2-once expected-error daemon-warns; do so "$name" 2 '^PASS .*\(run 2 of at most 3\)$'; done
so l1-always 3 '^FAIL .*died by itself, 3 times of 3 \(L1 ended without a status\)'
for name in failed failed-and-died verify io-error error-after-expected timeout hung-task daemon-panics daemon-error qemu-crashed \
	limit limit-and-died; do so "$name" 1 '^FAIL '; done
[[ -e $top/logs/l1-once.died-1/console.log ]] || { echo "FAIL: the log of a run that died is not kept" && bad=1; }
if final_line >"$top/last" || [[ $(<"$top/last") != '4 passed, 13 failed' ]]; then
	echo "FAIL: the sum is '$(<"$top/last")'"
	bad=1
fi
((bad == 0)) || { cat "$top/out" && exit 1; }
echo "$(find "$top/count" -type f | wc -l) ends of a nested guest, judged as they should be"
