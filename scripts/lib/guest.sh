# shellcheck shell=bash
# guest.sh - the parts of a test guest, built from Debian packages into the cache: kernels with their modules, and one
# userland. Needs common.sh. Nothing is installed but tools for the build; nothing here needs root once they are there.
#
#   guest_userland                 GUEST_USERLAND=<cpio>: /init, busybox, bash, fio, nvme-cli, jq, e2fsprogs, ...
#   guest_kernel SERIES            SERIES is 6.1, 6.12 or 7.x: GUEST_VMLINUZ, GUEST_MODULES (cpio), GUEST_RELEASE
#   make_test_cpio DIR FILE        packs a tree whose /test/run.sh is what the guest runs
#   collect_binary TREE BIN [ROOT] puts a dynamically linked program with its libraries and loader into TREE
#   guest_test_tree, guest_test_cpio   the scripts of guest-tests/guest with a list of commands, as a tree or as a cpio
#   collect_qemu, guest_l2_tree    what a guest needs to run a guest of its own (guest-tests/guest/l2.sh)
#   stock_qemu                     STOCK_QEMU=<path>: Debian's newest QEMU, unpacked, not installed
# shellcheck disable=SC2034 # the results are for the scripts that source this

GUEST_SERIES=(6.1 6.12 7.x)
_guest_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# Loaded or loadable in the guest; what they depend on comes along, what is built in or absent is left out.
_guest_modules=(nvme virtio_pci virtio_blk virtio_console virtio_balloon virtio_mem ext4 loop null_blk
	vfio-pci vfio_iommu_type1 kvm-amd kvm-intel crc32c_intel crc32-pclmul)

# ---------------------------------------------------------------- kernels

guest_kernel() {
	local series=$1 suites
	case $series in
	6.1) suites='bookworm-security bookworm' ;;
	6.12) suites='trixie bookworm-security' ;;
	7.x) suites='trixie-backports sid' ;;
	*) fail "no guest kernel series '$series' (there are: ${GUEST_SERIES[*]})" ;;
	esac
	need_packages kmod cpio xz-utils
	# shellcheck disable=SC2086 # a list of suites
	cached "guest-kernel-$series-$(hash_of "$suites" "${_guest_modules[*]}" "$(declare -f _build_kernel _kernel_image _pack)")" \
		_build_kernel "$series" $suites
	GUEST_VMLINUZ=$CACHED/vmlinuz
	GUEST_MODULES=$CACHED/modules.cpio
	GUEST_RELEASE=$(<"$CACHED/release")
}

# The suite's newest cloud kernel of the series. The meta package names it; its real files lie in packages that it
# depends on, one before 7.x and several since.
_build_kernel() {
	local out=$1 series=$2 tmp suite image='' debs deb rel mod path vmlinuz
	shift 2
	private_apt "$@"
	temp_dir tmp
	for suite in "${APT_SUITES[@]}"; do
		# A later suite is a fallback: a kernel whose files the mirror does not serve must not end the build.
		image=$(_kernel_image "${series/x/}" "$suite")
		[[ -n $image ]] || continue
		info "$series: $image from $suite"
		mapfile -t debs < <(apt_closure '^linux-(image|modules|binary|base)-[0-9]' "$image")
		if apt_fetch "$tmp" "${debs[@]}" >"$tmp/fetched"; then break; fi
		warn "$image cannot be downloaded from $suite"
		image=
	done
	[[ -n $image ]] || fail "no kernel of the series $series in: ${APT_SUITES[*]}"
	while read -r deb; do dpkg-deb -x "$deb" "$tmp/root"; done <"$tmp/fetched"
	# Merged /usr or not: the modules are in one of the two.
	if [[ -d $tmp/root/usr/lib/modules ]]; then
		mkdir -p "$tmp/root/lib"
		mv "$tmp/root/usr/lib/modules" "$tmp/root/lib/"
	fi
	rel=$(basename "$tmp/root/lib/modules/"[0-9]*)
	vmlinuz=$tmp/root/boot/vmlinuz-$rel # 7.x has it beside the modules
	[[ -e $vmlinuz ]] || vmlinuz=$tmp/root/lib/modules/$rel/vmlinuz
	cp "$vmlinuz" "$out/vmlinuz"
	/sbin/depmod -b "$tmp/root" "$rel"
	path=lib/modules/$rel
	mkdir -p "$tmp/tree/$path"
	cp "$tmp/root/$path/"modules.builtin* "$tmp/root/$path/modules.order" "$tmp/tree/$path/"
	for mod in "${_guest_modules[@]}"; do
		awk -F '[: ]+' -v want="${mod//-/_}" '
			{ name = $1; sub(".*/", "", name); sub("\\.ko.*", "", name); gsub("-", "_", name) }
			name == want { for (i = 1; i <= NF; i++) if ($i != "") print $i }' "$tmp/root/$path/modules.dep"
	done | sort -u | while read -r mod; do
		mkdir -p "$tmp/tree/$path/${mod%/*}"
		case $mod in # busybox's modprobe reads plain modules only
		*.xz) xz -dc "$tmp/root/$path/$mod" >"$tmp/tree/$path/${mod%.xz}" ;;
		*.zst) zstd -qdc "$tmp/root/$path/$mod" >"$tmp/tree/$path/${mod%.zst}" ;;
		*) cp "$tmp/root/$path/$mod" "$tmp/tree/$path/$mod" ;;
		esac
	done
	/sbin/depmod -b "$tmp/tree" "$rel"
	_pack "$tmp/tree" "$out/modules.cpio"
	echo "$rel" >"$out/release"
}

# The package with the newest kernel whose release starts with PREFIX, as the suite's meta package says.
_kernel_image() {
	local prefix=$1 suite=$2 version
	while read -r version; do
		[[ $version == "${prefix%.}".* ]] || continue
		apt_private cache show "linux-image-cloud-amd64=$version" |
			sed -nE 's/^Depends:.*(linux-image-[0-9][^ ]*-cloud-amd64).*/\1/p' | sed -n 1p
		return 0
	done < <(apt_versions linux-image-cloud-amd64 | awk -v suite="$suite" '$2 == suite {print $1}')
}

# ---------------------------------------------------------------- userland

guest_userland() {
	need_packages cpio gcc make libc6-dev dpkg-dev libaio-dev zlib1g-dev
	cached "guest-fio-$(hash_of "$(declare -f _build_fio)")" _build_fio
	local fio=$CACHED/fio
	cached "guest-debian-$(hash_of "$(declare -f _build_debian _copy_elf)")" _build_debian
	local debian=$CACHED
	# The init changes more often than the programs: a step of its own, and a fast one.
	cached "guest-userland-$(hash_of "$fio" "$debian" "@$_guest_dir/guest-init" "$(declare -f _build_userland _pack)")" \
		_build_userland "$fio" "$debian"
	GUEST_USERLAND=$CACHED/userland.cpio
}

# Debian's fio drags in 80 MB of libraries; its source built statically is one file of 3 MB.
_build_fio() {
	local out=$1 tmp dsc
	private_apt bookworm
	temp_dir tmp
	dsc=$(apt_fetch_source "$tmp" fio)
	info "building a static fio from ${dsc##*/}"
	logged "$tmp/log" dpkg-source --no-check -x "$dsc" "$tmp/src"
	cd "$tmp/src" || exit
	logged "$tmp/log" ./configure --build-static --disable-native
	logged "$tmp/log" make -j2 fio
	strip -o "$out/fio" fio
}

# The programs that are used as Debian built them, with their libraries where Debian has them.
_build_debian() {
	local out=$1 tmp pkgs deb bin
	private_apt bookworm bookworm-security
	temp_dir tmp
	mapfile -t pkgs < <(apt_closure '^(lib|zlib)' busybox-static bash-static nvme-cli jq e2fsprogs util-linux pciutils)
	info "${#pkgs[@]} packages for the guest's programs"
	apt_fetch "$tmp" "${pkgs[@]}" >"$tmp/debs"
	while read -r deb; do dpkg-deb -x "$deb" "$tmp/root"; done <"$tmp/debs"
	mkdir -p "$out/bin"
	cp "$tmp/root/bin/busybox" "$out/bin/busybox"
	cp "$tmp/root/bin/bash-static" "$out/bin/bash"
	for bin in /usr/sbin/nvme /usr/bin/jq /sbin/mke2fs /sbin/e2fsck /sbin/blkdiscard /bin/lsblk /usr/bin/lspci /usr/bin/setpci; do
		_copy_elf "$out" "$tmp/root" "$bin" /bin
	done
	ln -s mke2fs "$out/bin/mkfs.ext4"
}

_build_userland() {
	local out=$1 fio=$2 debian=$3 tmp applet
	temp_dir tmp
	cp -a "$debian/." "$tmp/"
	mkdir -p "$tmp"/{proc,sys,dev,run,tmp,mnt,root,etc,test,results,usr,sbin}
	cp "$fio" "$tmp/bin/fio"
	for applet in $("$tmp/bin/busybox" --list); do
		[[ -e $tmp/bin/$applet ]] || ln -s busybox "$tmp/bin/$applet"
	done
	echo 'root:x:0:0:root:/root:/bin/bash' >"$tmp/etc/passwd"
	install -m 755 "$_guest_dir/guest-init" "$tmp/init"
	_pack "$tmp" "$out/userland.cpio"
}

# ---------------------------------------------------------------- trees and archives

# _pack TREE FILE: an uncompressed cpio, the same bytes for the same tree but for times.
_pack() {
	(cd "$1" && set -o pipefail && find . -print0 | LC_ALL=C sort -z | cpio --quiet -0 -o -H newc -R 0:0) >"$2"
}

# make_test_cpio DIR FILE
make_test_cpio() {
	[[ -f $1/test/run.sh ]] || fail "no test/run.sh in $1"
	chmod 755 "$1/test/run.sh"
	_pack "$1" "$2"
}

# _elf_libraries ROOT FILE: the loader and every library of FILE, as paths below ROOT, asked from ROOT's own loader.
_elf_loader() {
	local loader
	for loader in "$1"/lib64/ld-linux-x86-64.so.2 "$1"/usr/lib64/ld-linux-x86-64.so.2 \
		"$1"/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2; do
		if [[ -e $loader ]]; then
			# an absolute symlink leads out of ROOT: its file is the one beside the libraries
			[[ $1 == / || -z $1 || $(readlink "$loader") != /* ]] || continue
			echo "$loader"
			return 0
		fi
	done
	fail "no dynamic loader in $1"
}
_elf_path() { echo "$1/lib/x86_64-linux-gnu:$1/usr/lib/x86_64-linux-gnu:$1/lib:$1/usr/lib"; }
_elf_libraries() {
	local root=${1%/} loader
	loader=$(_elf_loader "$root")
	if [[ -z $root ]]; then
		"$loader" --list "$2" # the system's own search path
	else
		"$loader" --library-path "$(_elf_path "$root")" --list "$2"
	fi | awk '$2 == "=>" && $3 == "not" {print "missing library: " $1 > "/dev/stderr"; bad = 1}
		$2 == "=>" && $3 ~ "^/" {print $3}
		END {exit bad}' || return 1
}

# _copy_elf TREE ROOT FILE DIR: FILE of ROOT into TREE/DIR, its libraries to where the loader looks without being told.
_copy_elf() {
	local tree=$1 root=${2%/} file=$3 dir=$4 lib libs
	mkdir -p "$tree$dir" "$tree/lib64" "$tree/lib/x86_64-linux-gnu"
	cp -L "$root$file" "$tree$dir/"
	cp -L "$(_elf_loader "$root")" "$tree/lib64/ld-linux-x86-64.so.2"
	libs=$(_elf_libraries "$root" "$root$file")
	for lib in $libs; do
		[[ $lib == */ld-linux-x86-64.so.2 ]] || cp -L "$lib" "$tree/lib/x86_64-linux-gnu/"
	done
}

# collect_binary TREE BIN [ROOT]: BIN (a path on this machine; with ROOT, below ROOT, whose libraries it then gets) into
# TREE as /opt/NAME, with libraries and loader of its own, so that its libc may be any; /bin/NAME in TREE starts it.
# Extra files (a QEMU's firmware) are the caller's business.
collect_binary() {
	local tree=$1 bin=$2 root=${3:-} name dir lib libs
	root=${root%/}
	name=$(basename "$bin")
	dir=$tree/opt/$name
	mkdir -p "$dir/lib" "$tree/bin"
	cp -L "$bin" "$dir/$name"
	if ! readelf -lW "$bin" | grep -q INTERP; then # static
		ln -sf "/opt/$name/$name" "$tree/bin/$name"
		return 0
	fi
	cp -L "$(_elf_loader "$root")" "$dir/lib/ld.so"
	libs=$(_elf_libraries "${root:-/}" "$bin") || fail "$bin lacks a library"
	for lib in $libs; do
		[[ $lib == */ld-linux-x86-64.so.2 ]] || cp -L "$lib" "$dir/lib/"
	done
	cat >"$tree/bin/$name" <<-WRAPPER
		#!/bin/sh
		exec /opt/$name/lib/ld.so --library-path /opt/$name/lib /opt/$name/$name "\$@"
	WRAPPER
	chmod 755 "$tree/bin/$name"
}

# ---------------------------------------------------------------- a QEMU that is nobody's patch

# stock_qemu: Debian's newest QEMU that the mirror really serves. STOCK_QEMU is a program to run like any QEMU,
# STOCK_QEMU_ROOT the unpacked packages.
stock_qemu() {
	need_packages xz-utils
	cached "stock-qemu-$(hash_of "$(declare -f _build_stock_qemu)")" _build_stock_qemu
	STOCK_QEMU=$CACHED/qemu-system-x86_64
	STOCK_QEMU_ROOT=$CACHED/root
}

_build_stock_qemu() {
	local out=$1 tmp suite done=''
	temp_dir tmp
	private_apt trixie trixie-backports
	for suite in trixie-backports trixie; do
		mkdir -p "$tmp/$suite/partial"
		# libc6 is named because nothing installed is assumed, seabios and ipxe because QEMU only recommends them
		if logged "$tmp/log" apt_private get -y -t "$suite" -o Dir::Cache::archives="$tmp/$suite" install --download-only \
			libc6 qemu-system-x86 qemu-system-data seabios; then
			done=$suite
			break
		fi
		warn "QEMU of $suite is not to be had"
	done
	[[ -n $done ]] || fail "no QEMU could be downloaded"
	mkdir -p "$out/root"
	for deb in "$tmp/$done"/*.deb; do dpkg-deb -x "$deb" "$out/root"; done
	cat >"$out/qemu-system-x86_64" <<-'WRAPPER'
		#!/bin/sh
		# Debian's QEMU beside the system: its own loader, libraries, modules and firmware.
		root=$(dirname -- "$(readlink -f -- "$0")")/root
		lib=$root/usr/lib/x86_64-linux-gnu
		QEMU_MODULE_DIR=$lib/qemu
		export QEMU_MODULE_DIR
		exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib:$root/lib/x86_64-linux-gnu" \
			"$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/seabios" -L "$root/usr/share/qemu" "$@"
	WRAPPER
	chmod 755 "$out/qemu-system-x86_64"
	info "$("$out/qemu-system-x86_64" --version | sed -n 1p)"
}

# guest_test_tree TREE COMMAND...: puts the scripts of guest-tests/guest into TREE/test and a run.sh that runs the commands in /test,
# all of them even if one fails, and ends with status 1 if any did.
# shellcheck disable=SC2016 # the guest's shell expands them
guest_test_tree() {
	local tree=$1 command
	shift
	mkdir -p "$tree/test"
	cp "$_guest_dir/../../guest-tests/guest/"*.sh "$tree/test/"
	{
		echo 'bad=0'
		for command in "$@"; do
			printf 'start=$SECONDS\n%s || { bad=1; echo %q; }\necho "time: $((SECONDS - start)) s for" %q\n' \
				"$command" "guest: '$command' failed" "$command"
		done
		echo 'exit $bad'
	} >"$tree/test/run.sh"
}

# guest_test_cpio FILE COMMAND...: the same as a cpio, where nothing else is to go in.
guest_test_cpio() {
	local file=$1 tmp
	shift
	temp_dir tmp
	guest_test_tree "$tmp" "$@"
	make_test_cpio "$tmp" "$file"
	rm -rf -- "$tmp"
}

# ---------------------------------------------------------------- a guest in the guest

# collect_qemu TREE BIN ROOT FIRMWARE-DIR...: a QEMU as /bin/qemu in TREE, with the firmware that -kernel needs. ROOT as for
# collect_binary (empty: this machine).
collect_qemu() {
	local tree=$1 bin=$2 root=$3 file dir found name
	shift 3
	collect_binary "$tree" "$bin" "$root"
	name=$(basename "$bin")
	mkdir -p "$tree/opt/firmware"
	for file in bios-256k.bin linuxboot_dma.bin kvmvapic.bin; do
		found=
		for dir in "$@"; do
			if [[ -e $dir/$file ]]; then
				cp -L "$dir/$file" "$tree/opt/firmware/"
				found=1
				break
			fi
		done
		[[ -n $found ]] || fail "no $file in: $*"
	done
	printf '#!/bin/sh\nexec /bin/%s -L /opt/firmware "$@"\n' "$name" >"$tree/bin/qemu"
	chmod 755 "$tree/bin/qemu"
}

# guest_l2_tree TREE SERIES FILE: what guest-tests/guest/l2.sh boots: the kernel, and the userland with the test cpio FILE.
guest_l2_tree() {
	local tree=$1
	guest_userland
	guest_kernel "$2"
	mkdir -p "$tree/l2"
	cp "$GUEST_VMLINUZ" "$tree/l2/vmlinuz"
	cat -- "$GUEST_USERLAND" "$GUEST_MODULES" "$3" >"$tree/l2/initrd"
}
