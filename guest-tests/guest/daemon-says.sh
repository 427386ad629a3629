#!/bin/bash
# Runs in a host (L1): what the daemon's log says of trouble comes out on the console as well, each line after "daemon: ", so that it is known
# even if this machine ends without a word.
# usage: daemon-says.sh LOG
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }
tail -n +1 -f "$1" 2>/dev/null | awk '/ (WARN|ERROR) |panicked at/ { print "daemon: " $0; fflush() }' >/dev/console
