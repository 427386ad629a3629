#!/bin/bash
# Runs in a guest (L2): bench.sh on the disks that the kernel's command line names (bench.slots=LABEL=SLOT,..., bench.seconds, bench.rounds).
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }
told() { tr ' ' '\n' </proc/cmdline | sed -n "s/^bench\.$1=//p"; }
slots=$(told slots)
# shellcheck disable=SC2086,SC2046 # lists
exec ./bench.sh --seconds "$(told seconds)" --rounds "$(told rounds)" $(./by-slot.sh ${slots//,/ })
