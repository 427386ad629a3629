#!/bin/bash
# Runs in a host (L1) with an SSD with the serial number "mission": a guest (L2, recovery.sh) has it through our daemon, which is killed and started
# again, until the guest has done I/O for SECONDS: how often that is depends on how long the SSD takes to come up here, but LEAST times.
# With "upgrade" it hands over to a new process instead.
# usage: ssd-recovery.sh LEAST SECONDS kill|upgrade [FACTOR]
# shellcheck source=guest-tests/guest/ssd-lib.sh
. "$(dirname -- "$0")/ssd-lib.sh"
[[ ${1:-} =~ ^[0-9]+$ ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0; }
least=$1 seconds=$2 disturbance=$3 factor=${4:-1}

huge_pages 384
SSD=$(ssd_function mission)
ssd_disk "$SSD" >/dev/null
ssd_take "$SSD"
mkdir -p /run/state
arguments=(--state-dir /run/state --socket-path /tmp/nvme.sock --namespace "nvme:$SSD")
daemon_on /tmp/nvme.sock -- "${arguments[@]}"
l2_start --seconds $(((seconds + 100) * factor)) --append "ssd.factor=$factor" -device vhost-user-nvme,reply-timeout=180000,socket=/tmp/nvme.sock
back() { grep -c 'the daemon is back after' /tmp/l2-qemu.log || true; }
over() { l2_says '^(PASS|FAIL) recovery/' 0 || ! kill -0 "$L2_PID" 2>/dev/null; }
killed() {
	kill -KILL "$DAEMON_PID"
	wait "$DAEMON_PID" 2>/dev/null || true
	vhost-user-nvme "${arguments[@]}" >>/results/daemon.log 2>&1 </dev/null &
	DAEMON_PID=$!
}
upgraded() {
	local said
	said=$(vhost-user-nvme upgrade --pid "$DAEMON_PID" 2>&1) || true
	echo "$said" >>/tmp/upgrades
	if [[ $said =~ to\ process\ ([0-9]+) ]]; then DAEMON_PID=${BASH_REMATCH[1]}; else fail upgrade "$said"; fi
}
kills=0
if l2_says '^READY running' $((80 * factor)); then
	until over; do
		before=$(back)
		case $disturbance in
		kill) killed ;;
		*) upgraded ;;
		esac
		kills=$((kills + 1))
		# Once more while the SSD comes up, or the guest has a moment.
		if ((kills % 4)); then
			while (($(back) == before)) && ! over; do sleep 0.1; done
		fi
		sleep "0.$((RANDOM % 8 + 1))"
	done
fi
l2_ends guest
echo "value kills $kills"
if ((kills >= least)); then pass "kills ($kills)"; else fail kills "$kills, not $least"; fi
echo "value standstill $(l2_value standstill)"
_spread() { sort -n | awk '{ms[NR] = $1} END {printf "p50 %d ms, max %d ms of %d\n", ms[int((NR + 1) / 2)], ms[NR], NR}'; }
echo "value ssd $(sed -nE 's/.*brought_up_in_ms=([0-9]+).*/\1/p' /results/daemon.log | _spread)"
if [[ -e /tmp/upgrades ]]; then echo "value hand-over $(sed -nE 's/.* in ([0-9]+) ms.*/\1/p' /tmp/upgrades | _spread)"; fi
echo "value away $(sed -nE 's/.*the daemon is back after ([0-9]+) ms.*/\1/p' /tmp/l2-qemu.log | _spread)"
daemon_off 30
no_stray_dma dma
ssd_give_back "$SSD"
finish
