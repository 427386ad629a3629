# shellcheck shell=bash
# SeaBIOS boots from the disk with a driver of its own: polled, no interrupts, no Doorbell Buffer Config.

seabios_case() {
	local image=$CASE_DIR/boot.img sum want got
	need_packages binutils
	as --32 -o "$CASE_DIR/boot.o" guest-tests/boot/boot.S
	ld -m elf_i386 -e start -Ttext 0x7c00 --oformat binary -o "$CASE_DIR/boot.bin" "$CASE_DIR/boot.o"
	truncate -s 64M "$image"
	dd if="$CASE_DIR/boot.bin" of="$image" conv=notrunc status=none
	head -c 65536 /dev/urandom >"$CASE_DIR/payload"
	dd if="$CASE_DIR/payload" of="$image" bs=512 seek=64 conv=notrunc status=none
	sum=$(od -An -v -tu4 -w4 "$CASE_DIR/payload" | awk '{s = (s + $1) % 4294967296} END {printf "%.0f", s}')
	want=$(printf '%08x' "$sum")
	daemon_single "$CASE_DIR" --namespace "file,path=$image,block-size=512"
	nvme_device "$NVME_SOCKET" "bootindex=0"
	vm_start --out "$CASE_DIR/vm" --kernel none --smp 1 --mem 256M --memory memfd -- "${DEVICE[@]}" "$@"
	vm_wait_line '^boot: (disk|read|write|what).*' 60 || {
		cat "$VM_OUT/console.log" "$VM_OUT/qemu.log"
		broken "nothing booted: $(tail -n 1 "$VM_OUT/console.log")"
	}
	sleep 0.5
	vm_stop
	cat "$VM_OUT/console.log" "$VM_OUT/qemu.log"
	grep -q "^boot: disk OK sum=$want" "$VM_OUT/console.log" ||
		broken "wanted sum $want: $(grep -a '^boot: ' "$VM_OUT/console.log" | tail -n 1)"
	daemon_fine
	# what the boot sector wrote is on the disk
	got=$(dd if="$image" bs=512 skip=32 count=1 status=none | od -An -N4 -tx4 | tr -d ' ')
	[[ $got == "$want" ]] || broken "the firmware's write is not on the disk: $got"
}

test_case --limit 100 seabios-boot seabios_case
