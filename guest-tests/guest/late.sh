#!/bin/bash
# A disk that is plugged in ("READY plug" asks for it) before anybody serves it ("READY late" asks for the daemon): the driver waits, and then has it.
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
echo "READY plug"
end=$((SECONDS + 30))
until compgen -G '/sys/class/nvme/nvme*' >/dev/null || ((SECONDS > end)); do sleep 0.2; done
if [[ $(cat /sys/class/nvme/nvme*/state 2>/dev/null) == live ]]; then fail waits "the controller is live with nobody there"; else pass waits; fi
echo "READY late"
PCI=$(basename "$(readlink -f /sys/class/nvme/nvme*/device)")
if wait_subject 55; then pass disk; else fail disk "there is no disk"; fi
finish
