# shellcheck shell=bash
# rust.sh - a Rust toolchain new enough for the workspace: the machine's own, else Debian's newest, unpacked beside the system.
# Needs common.sh.
#
#   rust_toolchain        puts a cargo of at least the workspace's rust-version first in PATH
#   build_daemon          release build with progress: DAEMON=<path of the program>; and of the packages in DAEMON_WITH, which
#                         share its dependencies if they are built with it, and not after it
#   build_tests           what `cargo test "${TEST_BUILD[@]}"` runs
#   test_program SOURCE NAME   prints the path of one of them, e.g. `test_program src/lib.rs vhost_user_nvme`
#   cargo_target          prints the target directory

_rust_repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

rust_toolchain() {
	local need dir have
	need=$(sed -nE 's/^rust-version *= *"([0-9.]+)".*/\1/p' "$_rust_repo/Cargo.toml" | sed -n 1p)
	need_packages gcc libc6-dev
	for dir in '' "${CARGO_HOME:-$HOME/.cargo}/bin"; do
		have=$(PATH=${dir:+$dir:}$PATH cargo --version 2>/dev/null | cut -d ' ' -f 2) || have=
		if [[ -n $have ]] && printf '%s\n%s\n' "$need" "$have" | sort -VC; then
			PATH=${dir:+$dir:}$PATH
			return 0
		fi
	done
	info "no cargo of at least version $need here${have:+ (only $have)}: taking Debian's, not installed on the system"
	info "(your own is as good: 'rustup toolchain install stable' from https://rustup.rs)"
	need_packages patchelf xz-utils
	cached "rust-$(hash_of "$need" "$(declare -f _build_rust)")" _build_rust "$need"
	PATH=$CACHED/bin:$PATH
}

# Debian's rustc of a newer release, with its own libc and loader. What it builds is linked by the system's gcc
# against the system's libc, and runs without any of this.
_build_rust() {
	local out=$1 need=$2 tmp suite version='' wanted bin rpath loader final
	temp_dir tmp
	for suite in trixie-backports sid; do
		private_apt trixie "$suite"
		version=$(apt_newest cargo "$suite")
		if [[ -z $version ]] || ! printf '%s\n%s\n' "$need" "$version" | sort -VC; then continue; fi
		# What its own programs load; compiler and linker are the system's.
		mapfile -t wanted < <(apt_private get -qq -y -t "$suite" --print-uris install libc6 cargo rustc rustfmt rust-clippy |
			sed -nE "s/^'[^']*' ([^_]+)_([^_]+)_[^_]+\.deb .*/\1=\2/p" | sed 's/%3a/:/' |
			grep -vE '^(gcc|cpp|binutils|linux|libc-|libc6-dev|libgcc-[0-9]+-dev|lib(asan|tsan|ubsan|lsan|hwasan|itm|gomp|quadmath|gprofng|isl))')
		info "Rust $version from $suite, ${#wanted[@]} packages, about 110 MB"
		if logged "$tmp/log" apt_fetch "$tmp" "${wanted[@]}"; then break; fi
		warn "Rust of $suite cannot be downloaded"
		version=
	done
	[[ -n $version ]] || fail "no Rust of at least version $need in Debian: install one, e.g. from https://rustup.rs"
	mkdir -p "$out/root" "$out/bin"
	logged "$tmp/log" _unpack_debs "$tmp" "$out/root"
	# Found by path, so that the programs know where they are and what they start is not affected.
	rpath=$out/root/usr/lib/x86_64-linux-gnu
	for bin in rustc rustdoc cargo rustfmt cargo-fmt cargo-clippy clippy-driver; do
		[[ -e $out/root/usr/bin/$bin ]] || continue
		cp -L "$out/root/usr/bin/$bin" "$out/bin/$bin"
	done
	loader=lib64/ld-linux-x86-64.so.2
	[[ -e $out/root/$loader ]] || loader=usr/$loader
	loader=$(_inside "$out/root" "$loader")
	# The directory gets its name when it is whole: the paths are those of that name.
	final=$CACHE_DIR/rust-$(hash_of "$need" "$(declare -f _build_rust)")
	for bin in "$out"/bin/*; do
		patchelf --set-interpreter "${loader/#"$out"/"$final"}" --force-rpath --set-rpath "${rpath/#"$out"/"$final"}" "$bin"
	done
	find "$rpath" -maxdepth 1 -name '*.so*' -type f ! -name 'libc.so*' ! -name 'ld-linux*' \
		-exec patchelf --force-rpath --set-rpath "${rpath/#"$out"/"$final"}" {} +
	mkdir -p "$out/lib"
	ln -s ../root/usr/lib/rustlib "$out/lib/rustlib"
}

_unpack_debs() {
	local deb
	for deb in "$1"/*.deb; do dpkg-deb -x "$deb" "$2"; done
}

# _inside ROOT PATH: what PATH below ROOT is in the end, with absolute links taken as below ROOT.
_inside() {
	local root=$1 path=$2 to i
	for ((i = 0; i < 10; i++)); do
		[[ -L $root/$path ]] || break
		to=$(readlink "$root/$path")
		if [[ $to == /* ]]; then path=${to#/}; else path=$(dirname "$path")/$to; fi
	done
	echo "$root/$path"
}

cargo_target() { echo "${CARGO_TARGET_DIR:-$_rust_repo/target}"; }

DAEMON='' DAEMON_WITH=()
build_daemon() {
	rust_toolchain
	mkdir -p "$(cargo_target)"
	local log
	log=$(cargo_target)/build-daemon.log
	step "daemon (release build)"
	logged "$log" cargo build --manifest-path "$_rust_repo/Cargo.toml" --release --locked -p vhost-user-nvme "${DAEMON_WITH[@]/#/--package=}" ||
		fail "the daemon does not build: see $log"
	# shellcheck disable=SC2034 # the result
	DAEMON=$(cargo_target)/release/vhost-user-nvme
	ok
}

# What every build of tests and lints is called with: the same crates and features, so that all is compiled once.
TEST_BUILD=(--workspace --features vhost-user-nvme/testing --locked)

build_tests() {
	local log
	rust_toolchain
	mkdir -p "$(cargo_target)"
	log=$(cargo_target)/build-tests.log
	step "test programs"
	logged "$log" cargo test --manifest-path "$_rust_repo/Cargo.toml" "${TEST_BUILD[@]}" --no-run ||
		fail "the tests do not compile: see $log"
	ok
}

# Out of `Executable tests/x.rs (target/debug/deps/x-0123456789abcdef)`: relative to the repository, or to nothing.
test_program() {
	local path
	path=$(sed -nE "s|^ *Executable .*$1 \((.*)\)\$|\1|p" "$(cargo_target)/build-tests.log" | grep -F "/$2-" | sed -n 1p)
	[[ -n $path ]] || fail "cargo does not say where the test program $2 is: see $(cargo_target)/build-tests.log"
	[[ $path == /* ]] || path=$_rust_repo/$path
	echo "$path"
}
