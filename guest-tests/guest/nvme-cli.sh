#!/bin/bash
# nvme-cli against the controller: identify, logs whose counters move, features that keep what is set, the NVM commands, and for
# commands that must fail the exact status. Checks may be left out with --without NAME,... QEMU's own nvme (11.1) needs
# --without ids,dsm-lba-range,log-page,delete-cq-0,delete-cq-unknown,feature-0x80,set-0x80,set-8,error-log,log-0,firmware
# shellcheck source=guest-tests/guest/lib.sh
. "$(dirname -- "$0")/lib.sh"
subject "$@"

tmp=/tmp/nvme-cli
mkdir -p $tmp
# load NAME: the scalars of $tmp/NAME.json into the array of that name, since starting jq for each of them takes long
declare -A id_ctrl=() id_ns=() smart=()
load() {
	local -n array=${1//-/_}
	local key value
	# shellcheck disable=SC2034,SC2004 # it is a name for another array
	while IFS=$'\t' read -r key value; do array[$key]=$value; done < <(
		jq -r 'to_entries[] | select(.value | scalars) | [.key, .value] | @tsv' "$tmp/$1.json")
}
ctrl() { echo "${id_ctrl[$1]}"; }
ns() { echo "${id_ns[$1]}"; }
# has BIT: ONCS
has() { (($(ctrl oncs) >> $1 & 1)); }
# believe NAME CONDITION TEXT: CONDITION is arithmetic
believe() {
	wanted "$1" || return 0
	if (($2)); then pass "$1"; else fail "$1" "$3"; fi
}
# status CMD...: the status of the command as the SCT and SC bits, 0 if it succeeded, "none" if there is no status to be found
status() {
	local out
	if out=$("$@" 2>&1 >/dev/null); then
		echo 0
		return 0
	fi
	out=$(grep -oE '\(0x[0-9a-fA-F]+\)' <<<"$out" | tail -n 1 | tr -d '()')
	if [[ -n $out ]]; then printf '%#x\n' $((out & 0x7ff)); else echo none; fi
}
# refuses NAME STATUS CMD...
refuses() {
	local name=$1 want=$2 got
	shift 2
	wanted "$name" || return 0
	got=$(status "$@")
	if [[ $got != none ]] && ((got == want)); then pass "$name"; else fail "$name" "status $got, wanted $want: $*"; fi
}
# does NAME CMD...
does() {
	local name=$1
	shift
	wanted "$name" || return 0
	if "$@" >$tmp/out 2>&1; then pass "$name"; else fail "$name" "$(tail -n 1 $tmp/out): $*"; fi
}
admin() { nvme admin-passthru "$CTRL_DEV" "$@"; }
io() { nvme io-passthru "$NS_DEV" -n "$NSID" "$@"; }
# a command on COUNT blocks at SLBA: io_blocks OPCODE SLBA COUNT ARG...
io_blocks() {
	local op=$1 slba=$2 count=$3
	shift 3
	io -o "$op" --cdw10=$((slba & 0xffffffff)) --cdw11=$((slba >> 32)) --cdw12=$((count - 1)) "$@"
}

# ---------------------------------------------------------------- identify

nvme list -o json >$tmp/list.json
if jq -e --arg dev "$NS_DEV" --argjson size "$SIZE" --argjson lba "$LBA" \
	'.Devices[] | select(.DevicePath == $dev) | .PhysicalSize == $size and .SectorSize == $lba and (.SerialNumber | length > 0)' \
	$tmp/list.json >/dev/null; then pass list; else fail list "$NS_DEV is not in it as it should be"; fi

nvme id-ctrl "$CTRL_DEV" -o json >$tmp/id-ctrl.json
nvme id-ns "$NS_DEV" -o json >$tmp/id-ns.json
load id-ctrl
load id-ns
believe id-ctrl "$(ctrl ver) >= 0x10400 && $(ctrl sqes) == 0x66 && $(ctrl cqes) == 0x44 && $(ctrl nn) >= 1 && $(ctrl cntrltype) == 1" \
	"VER, SQES, CQES, NN or CNTRLTYPE: $(jq -c '{ver, sqes, cqes, nn, cntrltype}' $tmp/id-ctrl.json)"
if [[ $(ctrl subnqn) == nqn.* && $(ctrl subnqn) == "$(<"/sys/class/nvme/$CTRL/subsysnqn")" ]]; then
	pass subnqn
else
	fail subnqn "'$(ctrl subnqn)'"
fi
believe temperature-limits "$(ctrl wctemp) == 0 || ($(ctrl wctemp) > 273 && $(ctrl wctemp) <= $(ctrl cctemp))" "WCTEMP $(ctrl wctemp), CCTEMP $(ctrl cctemp)"
# FLBAS: the format's index in bits 3:0, continued in 6:5
format=$(($(ns flbas) & 15 | $(ns flbas) >> 1 & 48))
believe id-ns "$(ns nsze) * LBA == SIZE && $(ns ncap) <= $(ns nsze) && $(ns nuse) <= $(ns ncap) && (1 << $(jq ".lbafs[$format].ds" $tmp/id-ns.json)) == LBA" \
	"$(jq -c '{nsze, ncap, nuse, flbas}' $tmp/id-ns.json), $SIZE bytes of $LBA"
nvme list-ns "$CTRL_DEV" >$tmp/list-ns
if grep -q ":$(printf '%#x' "$NSID")\$" $tmp/list-ns; then pass list-ns; else fail list-ns "$NSID is not in it"; fi
if wanted ids; then
	nvme ns-descs "$NS_DEV" -o json >$tmp/ns-descs.json
	if ! jq -e '."ns-descs" | any(.type == "uuid" or .type == "nguid" or .type == "eui64")' $tmp/ns-descs.json >/dev/null; then
		fail ids "no UUID, NGUID or EUI64 among the descriptors"
	elif [[ $(<"/sys/block/$NS/wwid") == nvme.* ]]; then
		fail ids "the kernel made up an id: $(<"/sys/block/$NS/wwid")"
	else
		pass "ids ($(<"/sys/block/$NS/wwid"))"
	fi
fi
for cns in 0 1 2 3 5 6 7 8 0x1c; do
	wanted "cns-$cns" || continue
	id=$NSID
	case $cns in 1 | 6 | 0x1c) id=0 ;; 2 | 7) id=0 ;; esac
	# CNTID FFFFh in the upper half: the controller that is asked.
	cdw10=$cns
	if [[ $cns == 0x1c ]]; then cdw10=0xffff001c; fi
	if admin -o 6 -n "$id" --cdw10="$cdw10" --cdw11=0 -l 4096 -r -b >$tmp/identify 2>$tmp/err && (($(wc -c <$tmp/identify) == 4096)); then
		pass "cns-$cns"
	else
		fail "cns-$cns" "$(tail -n 1 $tmp/err)"
	fi
done

# ---------------------------------------------------------------- the NVM commands

slba=64
blocks=$((16384 / LBA))
bytes=16384
head -c $bytes /dev/urandom >$tmp/data
head -c $bytes /dev/zero >$tmp/zero
read_back() {
	rm -f $tmp/back
	nvme read "$NS_DEV" -s $slba -c $((blocks - 1)) -z $bytes -d $tmp/back >/dev/null 2>&1 && cmp -s "$1" $tmp/back
}
does write nvme write "$NS_DEV" -s $slba -c $((blocks - 1)) -z $bytes -d $tmp/data
if read_back $tmp/data; then pass read; else fail read "what was written does not read back"; fi
does write-fua io_blocks 1 $slba 1 -l "$LBA" -w -i $tmp/data
does flush nvme flush "$NS_DEV" -n "$NSID"
if has 0; then
	does compare nvme compare "$NS_DEV" -s $slba -c $((blocks - 1)) -z $bytes -d $tmp/data
	refuses compare-failure 0x285 io_blocks 5 $slba $blocks -l $bytes -w -i $tmp/zero
else skip compare "not in ONCS"; fi
if has 7; then
	does verify nvme verify "$NS_DEV" -s $slba -c $((blocks - 1))
else skip verify "not in ONCS"; fi
if has 3; then
	does write-zeroes nvme write-zeroes "$NS_DEV" -s $slba -c $((blocks - 1))
	if read_back $tmp/zero; then pass write-zeroes-data; else fail write-zeroes-data "the blocks are not zero"; fi
else skip write-zeroes "not in ONCS"; fi
if has 2; then
	nvme write "$NS_DEV" -s $slba -c $((blocks - 1)) -z $bytes -d $tmp/data >/dev/null 2>&1
	does dsm nvme dsm "$NS_DEV" -n "$NSID" -d -s $slba -b $blocks
	if (($(ns dlfeat) % 8 == 1)) && wanted dsm-data; then
		if read_back $tmp/zero; then pass dsm-data; else fail dsm-data "DLFEAT promises zeroes"; fi
	fi
else skip dsm "not in ONCS"; fi

# ---------------------------------------------------------------- exact refusals

end=$(ns nsze)
range() { # one Dataset Management range of COUNT blocks at SLBA
	local i v='\x00\x00\x00\x00'
	for ((i = 0; i < 4; i++)); do v+=$(printf '\\x%02x' $(($2 >> 8 * i & 255))); done
	for ((i = 0; i < 8; i++)); do v+=$(printf '\\x%02x' $(($1 >> 8 * i & 255))); done
	printf '%b' "$v"
}
refuses read-lba-range 0x080 io_blocks 2 "$end" 1 -l "$LBA" -r
refuses read-lba-range-tail 0x080 io_blocks 2 $((end - 1)) 2 -l $((2 * LBA)) -r
refuses read-lba-wrap 0x080 io_blocks 2 -1 2 -l $((2 * LBA)) -r
refuses write-lba-range 0x080 io_blocks 1 "$end" 1 -l "$LBA" -w -i $tmp/data
if has 0; then refuses compare-lba-range 0x080 io_blocks 5 "$end" 1 -l "$LBA" -w -i $tmp/data; fi
if has 3; then refuses zeroes-lba-range 0x080 io_blocks 8 "$end" 1; fi
if has 7; then refuses verify-lba-range 0x080 io_blocks 0xc "$end" 1; fi
if has 2; then
	range "$end" 8 >$tmp/range
	refuses dsm-lba-range 0x080 io -o 9 --cdw10=0 --cdw11=4 -l 16 -w -i $tmp/range
fi
refuses io-opcode 0x001 io -o 0x7f
refuses admin-opcode 0x001 admin -o 0x7f
refuses identify-cns 0x002 admin -o 6 --cdw10=0xee -l 4096 -r
refuses identify-nsid 0x00b admin -o 6 -n 0xfffffffe --cdw10=0 -l 4096 -r
refuses log-page 0x109 nvme get-log "$CTRL_DEV" -i 0x7f -l 512
refuses log-offset 0x002 nvme get-log "$CTRL_DEV" -i 2 -l 512 -o 4096
refuses get-feature-id 0x002 nvme get-feature "$CTRL_DEV" -f 0x7f
refuses set-feature-id 0x002 admin -o 9 --cdw10=0x7f --cdw11=1
refuses delete-sq-0 0x101 admin -o 0 --cdw10=0
refuses delete-sq-unknown 0x101 admin -o 0 --cdw10=0xfff0
refuses delete-cq-0 0x101 admin -o 4 --cdw10=0
refuses delete-cq-unknown 0x101 admin -o 4 --cdw10=0xfff0
refuses delete-cq-in-use 0x10c admin -o 4 --cdw10=1
# no memory behind the queue: the identifier is looked at first
refuses create-cq-id-0 0x101 admin -o 5 --cdw10=0x000f0000 --cdw11=1 -l 4096 -w -i $tmp/zero
refuses create-sq-id-0 0x101 admin -o 1 --cdw10=0x000f0000 --cdw11=0x10001 -l 4096 -w -i $tmp/zero
if wanted queues-after-io; then
	got=$(status admin -o 9 --cdw10=7 --cdw11=0x00010001)
	if [[ $got == none ]]; then
		skip queues-after-io "this kernel does not pass it on" # 7.x
	else
		believe queues-after-io "got == 0x00c" "status $got, wanted 0x00c"
	fi
fi
if wanted abort; then
	# a command that does not exist: success, and bit 0 says that nothing was aborted
	if admin -o 8 --cdw10=0xfff00001 2>&1 | grep -qi 'value.*0*1$\|result: *0*x*0*1$'; then
		pass abort
	else
		fail abort "$(admin -o 8 --cdw10=0xfff00001 2>&1 | tail -n 1)"
	fi
fi

# ---------------------------------------------------------------- features

# feature FID [SEL]: its value; nvme-cli writes 0 without the 0x
feature() {
	local value
	value=$(nvme get-feature "$CTRL_DEV" -f "$1" -s "${2:-0}" 2>/dev/null | sed -nE 's/.*value: *(0x)?([0-9a-fA-F]+).*/0x\2/p')
	echo "${value:--1}"
}
mandatory=(1 2 4 5 7 8 9 0xa 0xb)
(($(ctrl vwc) & 1)) && mandatory+=(6)
has 6 && mandatory+=(0xe)
mandatory+=(0x16 0x80)
for fid in "${mandatory[@]}"; do
	for sel in 0 1 3; do
		wanted "feature-$fid" || continue 2
		# 5 is of a namespace; 9 takes a vector
		args=(-f "$fid" -s "$sel")
		case $fid in 5) args+=(-n "$NSID") ;; 0xe) args+=(-l 8) ;; 0x16) args+=(-l 512) ;; esac
		if ! nvme get-feature "$CTRL_DEV" "${args[@]}" >$tmp/out 2>&1; then
			fail "feature-$fid" "SEL $sel: $(tail -n 1 $tmp/out)"
			continue 2
		fi
	done
	pass "feature-$fid"
done
# keeps FID VALUE: what is set is what is read, the default stays, the old value comes back
keeps() {
	local fid=$1 value=$2 old default got
	wanted "set-$fid" || return 0
	old=$(feature "$fid") default=$(feature "$fid" 1)
	if ! nvme set-feature "$CTRL_DEV" -f "$fid" -v "$value" >$tmp/out 2>&1; then
		fail "set-$fid" "$(tail -n 1 $tmp/out)"
		return 0
	fi
	got=$(feature "$fid")
	if ((got != value)); then
		fail "set-$fid" "set to $value, reads $got"
	elif (($(feature "$fid" 1) != default)); then
		fail "set-$fid" "the default moved"
	elif ! nvme set-feature "$CTRL_DEV" -f "$fid" -v "$old" >/dev/null 2>&1 || (($(feature "$fid") != old)); then
		fail "set-$fid" "the old value $old does not come back"
	else
		pass "set-$fid"
	fi
}
keeps 4 0x150
keeps 8 0x0203
if (($(ctrl vwc) & 1)); then
	keeps 6 0
	keeps 6 1
fi
keeps 0x80 0x5
queues=$(feature 7)
# both counts are zero-based; the kernel has made one pair per CPU at least
believe number-of-queues "(${queues:-0} & 0xffff) + 1 >= 1 && (${queues:-0} >> 16) + 1 >= 1" "'$queues'"
if has 6 && wanted timestamp; then
	stamp() { admin -o 0xa --cdw10=0xe -l 8 -r -b 2>/dev/null | hexdump -v -e '1/1 "%02x "' | awk '{print "0x" $6 $5 $4 $3 $2 $1}'; }
	first=$(stamp)
	sleep 0.3
	second=$(stamp)
	believe timestamp "${second:-0} - ${first:-0} >= 200 && ${second:-0} - ${first:-0} < 30000" "0.3 s apart: $first, $second"
fi

# ---------------------------------------------------------------- logs

read_smart() {
	nvme smart-log "$CTRL_DEV" -o json >$tmp/smart.json
	load smart
}
read_smart
believe smart-state "${smart[critical_warning]} == 0 && ${smart[temperature]} > 273 && ${smart[temperature]} < 373 && ${smart[percent_used]} < 100" \
	"$(jq -c '{critical_warning, temperature, percent_used}' $tmp/smart.json)"
reads=${smart[host_read_commands]} writes=${smart[host_write_commands]}
units_read=${smart[data_units_read]} units_written=${smart[data_units_written]}
dd if="$NS_DEV" of=/dev/null iflag=direct bs=64k count=64 2>/dev/null
dd if=/dev/zero of="$NS_DEV" oflag=direct bs=64k count=32 2>/dev/null
read_smart
# 4 MiB are 8.2 units of 512000 bytes, 2 MiB 4.1
believe smart-reads "${smart[host_read_commands]} >= reads + 64 && ${smart[data_units_read]} >= units_read + 8 && ${smart[data_units_read]} <= units_read + 20" \
	"64 reads of 64 KiB: commands $reads to ${smart[host_read_commands]}, units $units_read to ${smart[data_units_read]}"
believe smart-writes "${smart[host_write_commands]} >= writes + 32 && ${smart[data_units_written]} >= units_written + 4 && ${smart[data_units_written]} <= units_written + 10" \
	"32 writes of 64 KiB: commands $writes to ${smart[host_write_commands]}, units $units_written to ${smart[data_units_written]}"

if wanted error-log; then
	before=${smart[num_err_log_entries]}
	io_blocks 2 $((end + 5)) 1 -l "$LBA" -r >/dev/null 2>&1 || true
	nvme error-log "$CTRL_DEV" -e 1 -o json >$tmp/error.json
	read_smart
	entry() { jq -r ".errors[0].$1" $tmp/error.json; }
	believe error-log-count "${smart[num_err_log_entries]} > before && $(entry error_count) > 0" \
		"$before errors before, ${smart[num_err_log_entries]} after, the entry's count $(entry error_count)"
	believe error-log "($(entry status_field) & 0x7ff) == 0x80 && $(entry nsid) == NSID && $(entry lba) == end + 5 && $(entry sqid) > 0" \
		"$(jq -c '.errors[0]' $tmp/error.json)"
fi
log() { nvme get-log "$CTRL_DEV" -i "$1" -l "$2" -o "${3:-0}" -b 2>$tmp/err; }
for page in 0:1024 1:64 2:512 3:512 4:4096 5:4096; do
	id=${page%:*} length=${page#*:}
	wanted "log-$id" || continue
	if (($(log "$id" "$length" | wc -c) != length)); then
		fail "log-$id" "$(tail -n 1 $tmp/err)"
	elif log "$id" "$length" >$tmp/whole && log "$id" $((length - 32)) 32 >$tmp/part && tail -c +33 $tmp/whole | cmp -s - $tmp/part; then
		pass "log-$id"
	else
		fail "log-$id" "at an offset it is another"
	fi
done
word() { hexdump -v -s "$2" -n 4 -e '1/4 "%u"' "$1"; }
if wanted effects; then
	log 5 4096 >$tmp/effects
	# I/O commands lie from 1024 on, 4 bytes each: Read and Write are supported, 7Fh is not
	believe effects "$(word $tmp/effects $((6 * 4))) & 1 && $(word $tmp/effects $((1024 + 2 * 4))) & 1 && $(word $tmp/effects $((1024 + 4))) & 1 && !($(word $tmp/effects $((1024 + 0x7f * 4))) & 1)" \
		"Identify, Read or Write are not marked as supported, or 7Fh is"
fi
if wanted firmware; then
	revision=$(log 3 16 | tail -c +9 | tr -d '\0 ')
	if [[ $revision == "$(ctrl fr | tr -d ' ')" ]]; then pass firmware; else fail firmware "slot 1 says '$revision', Identify '$(ctrl fr)'"; fi
fi

# ---------------------------------------------------------------- registers

if wanted registers; then
	bar=$(awk 'NR == 1 {print $1}' "/sys/bus/pci/devices/$PCI/resource")
	if vs=$(devmem $((bar + 8)) 32 2>/dev/null); then
		cc=$(devmem $((bar + 0x14)) 32) csts=$(devmem $((bar + 0x1c)) 32) cap=$(devmem "$((bar))" 64)
		believe registers "vs == $(ctrl ver) && (cc & 1) && (csts & 3) == 1 && (cap & 0xffff) >= 1 && (cap >> 37 & 1)" \
			"CAP $cap VS $vs CC $cc CSTS $csts"
		# the same through nvme-cli, where it can map the register page
		if nvme show-regs "$CTRL_DEV" -o json >$tmp/regs.json 2>/dev/null && jq -e . $tmp/regs.json >/dev/null 2>&1; then
			believe show-regs "$(jq -r .vs $tmp/regs.json) == vs && $(jq -r .csts $tmp/regs.json) == csts" "$(jq -c '{vs, csts}' $tmp/regs.json)"
		else
			skip show-regs "nvme-cli cannot map the registers here"
		fi
	else
		skip registers "this kernel lets nobody look at them (start it with iomem=relaxed)"
	fi
fi

# none of it may have hurt the disk
if run_fio after 60 --ioengine=libaio --iodepth=8 --rw=randwrite --bs=4k --size=2m --verify=crc32c --verify_fatal=1; then
	pass io-afterwards
else
	fail io-afterwards "fio fails after all this"
fi
finish
