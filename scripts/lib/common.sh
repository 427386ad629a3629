# shellcheck shell=bash
# common.sh - what every script here shares: progress, exit hooks, Debian packages, a cache, a private apt.
#
# Source it; it defines functions only (and turns on strict mode). Nothing is installed or downloaded by sourcing.
#
#   step TEXT ... ok [TEXT]          a step with its duration; `fail TEXT` ends the script with status 1
#   info TEXT / warn TEXT            a line of progress / a warning
#   logged LOG CMD [ARG...]          runs CMD with its output in LOG, a heartbeat every 10 s, the log's tail on failure
#   on_exit CMD [ARG...]             runs CMD when this (sub)shell ends, last registered first
#   temp_dir VAR                     makes a temporary directory, removed at exit, and puts its path into VAR
#   need_packages PKG...             installs what is missing (root), else says what to install
#   hash_of [STRING | @FILE]...      one hash over strings and file contents
#   cached KEY BUILDER [ARG...]      CACHED=<dir>; built by `BUILDER DIR ARG...` if it is not there yet
#   private_apt SUITE...             an apt of our own (lists and cache under our cache), see below
set -euo pipefail

CACHE_DIR=${VHOST_USER_NVME_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/vhost-user-nvme}

# ---------------------------------------------------------------- progress

_step_text='' _step_start=''

# Microseconds since the epoch.
now_us() { local t=$EPOCHREALTIME; echo "${t/[.,]/}"; }

# seconds_since US: "12.3" since the time that now_us gave.
seconds_since() {
	local d=$(($(now_us) - $1))
	printf '%d.%d' $((d / 1000000)) $((d / 100000 % 10))
}

# All progress goes to stderr, so that a script's stdout stays usable by another script.
info() { printf '    %s\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }

step() {
	_step_text=$*
	_step_start=$(now_us)
	printf '==> %s\n' "$*" >&2
}

ok() {
	printf '    ok%s (%s s)\n' "${1:+: $*}" "$(seconds_since "${_step_start:-$(now_us)}")" >&2
	_step_text='' _step_start=''
}

fail() {
	if [[ -n $_step_text ]]; then
		printf 'error: %s: %s (after %s s)\n' "$_step_text" "$*" "$(seconds_since "$_step_start")" >&2
	else
		printf 'error: %s\n' "$*" >&2
	fi
	exit 1
}

# logged LOG CMD [ARG...]: CMD may be a function. Its output goes to LOG; a line every 10 s says that it still runs.
# Returns CMD's status, after showing the end of LOG if that is not 0.
logged() {
	local log=$1 start next pid rc=0
	shift
	start=$(now_us) next=10
	(exec_strict "$@") >"$log" 2>&1 </dev/null &
	pid=$!
	on_exit _end_child "$pid"
	while kill -0 "$pid" 2>/dev/null; do
		sleep 0.2
		if (($(now_us) - start > next * 1000000)); then
			info "... after $next s: $(tail -n 1 -- "$log" 2>/dev/null | tr -cd '[:print:]' | cut -c 1-90)"
			next=$((next + 10))
		fi
	done
	wait "$pid" || rc=$?
	_forget_exit _end_child "$pid"
	if ((rc != 0)); then
		printf -- '---- %s failed with status %d, the end of %s:\n' "$1" "$rc" "$log" >&2
		tail -n 25 -- "$log" >&2
		printf -- '----\n' >&2
	fi
	return "$rc"
}

# With what it started: cargo, for one, does not pass the signal on to the tests that it runs.
_end_child() {
	kill -0 "$1" 2>/dev/null || return 0
	local pid descendants
	descendants=$(_descendants "$1")
	for pid in "$1" $descendants; do kill "$pid" 2>/dev/null || true; done
	wait "$1" 2>/dev/null || true
}
_descendants() {
	local pid children
	children=$(cat /proc/"$1"/task/*/children 2>/dev/null) || return 0
	for pid in $children; do
		echo "$pid"
		_descendants "$pid"
	done
}

# exec_strict CMD [ARG...]: becomes CMD. A function runs in a fresh bash with copies of this one's functions and variables, because
# `set -e` has no force in anything that was called from a condition (`run_vm ... || rc=$?`), not even in a subshell that sets
# it again; a build that ran on after an error would be taken for whole.
exec_strict() {
	if [[ $(type -t "$1") == function ]]; then
		local _script
		_script=$(_dump_shell) || exit
		[[ $_script == *'"$@"' ]] || exit 125 # half a script would be a success that did nothing
		exec bash <(printf '%s\n' "$_script") "$@"
	fi
	exec "$@"
}

_dump_shell() {
	local _name
	for _name in $(compgen -v); do
		case $_name in
		BASH* | COMP_* | DIRSTACK | EPOCH* | EUID | FUNCNAME | GROUPS | HIST* | IFS | LINENO | OPT* | PIPESTATUS | PPID | RANDOM | \
			SECONDS | SHELLOPTS | SHLVL | SRANDOM | UID | _ | _name | _script) ;;
		*) declare -p "$_name" 2>/dev/null || true ;;
		esac
	done
	declare -f
	# shellcheck disable=SC2016 # for the other shell
	printf '%s\n' 'set -euo pipefail' '"$@"'
}

# ---------------------------------------------------------------- exit hooks

_exit_hooks=() _exit_owner=''

on_exit() {
	# A subshell inherits the list but not the trap: it starts with a list of its own.
	if [[ $_exit_owner != "$BASHPID" ]]; then
		_exit_hooks=() _exit_owner=$BASHPID
		trap _run_exit_hooks EXIT
		trap 'exit 130' INT
		trap 'exit 143' TERM HUP
	fi
	_exit_hooks+=("$(printf '%q ' "$@")")
}

_forget_exit() {
	local want i
	want=$(printf '%q ' "$@")
	for i in "${!_exit_hooks[@]}"; do
		if [[ ${_exit_hooks[i]} == "$want" ]]; then unset "_exit_hooks[i]"; fi
	done
}

_run_exit_hooks() {
	local rc=$? i
	trap - EXIT
	set +e
	local keys=("${!_exit_hooks[@]}")
	for ((i = ${#keys[@]} - 1; i >= 0; i--)); do
		eval "${_exit_hooks[keys[i]]}" # the list holds only %q-quoted words
	done
	exit "$rc"
}

# temp_dir VAR: under TMPDIR, gone when this shell ends.
temp_dir() {
	local _dir
	_dir=$(mktemp -d "${TMPDIR:-/tmp}/vhost-user-nvme.XXXXXXXX")
	on_exit rm -rf -- "$_dir"
	printf -v "$1" '%s' "$_dir"
}

# ---------------------------------------------------------------- packages

# need_packages PKG...: Debian packages that must be installed. `apt-get update` runs once per script at most.
_apt_updated=''
need_packages() {
	local pkg missing=() log
	for pkg in "$@"; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$pkg" 2>/dev/null) == installed ]] || missing+=("$pkg")
	done
	((${#missing[@]})) || return 0
	if ((EUID != 0)); then
		fail "missing packages; install them as root: apt-get install --no-install-recommends ${missing[*]}"
	fi
	info "installing ${missing[*]}"
	mkdir -p -- "$CACHE_DIR"
	log=$CACHE_DIR/apt-install.$$.log
	on_exit rm -f -- "$log"
	if [[ -z $_apt_updated ]]; then
		logged "$log" apt-get -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 update || fail "apt-get update failed"
		_apt_updated=1
	fi
	logged "$log" env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
		install -y --no-install-recommends "${missing[@]}" ||
		fail "apt-get could not install ${missing[*]}"
}

# ---------------------------------------------------------------- cache

# hash_of [STRING | @FILE]...: 16 hex digits over all arguments, in order.
hash_of() {
	local arg
	for arg in "$@"; do
		if [[ $arg == @* ]]; then
			sha256sum <"${arg#@}" || return 1
		else
			printf '%s\0' "$arg" | sha256sum
		fi
	done | sha256sum | cut -c 1-16
}

# cached KEY BUILDER [ARG...]: sets CACHED to the directory $CACHE_DIR/KEY. If it is not there, runs
# `BUILDER DIR ARG...` on an empty directory beside it and renames that when it is whole: a build that was
# interrupted leaves nothing that looks done, and of two at once the second waits and takes the first's result.
# Put everything the result depends on into KEY, e.g. "fio-$(hash_of "$version" @recipe)". BUILDER sees copies of this
# shell's variables; what it sets is lost.
CACHED=''
cached() {
	local key=$1 builder=$2 dir lock tmp rc=0
	shift 2
	[[ $key != */* && $key != .* ]] || fail "bad cache key '$key'"
	dir=$CACHE_DIR/$key
	if [[ ! -d $dir ]]; then
		mkdir -p -- "$CACHE_DIR/.lock"
		exec {lock}>"$CACHE_DIR/.lock/$key"
		if ! flock -n "$lock"; then
			info "waiting for another build of $key"
			flock "$lock"
		fi
		if [[ ! -d $dir ]]; then
			tmp=$(mktemp -d "$CACHE_DIR/.build.XXXXXXXX")
			chmod 755 "$tmp"
			( # the lock is ours, not a daemon's that the builder may leave behind
				exec {lock}>&-
				on_exit _drop_unless_done "$tmp"
				(exec_strict "$builder" "$tmp" "$@") && mv -T -- "$tmp" "$dir"
			) || rc=$?
		fi
		exec {lock}>&-
		((rc == 0)) || fail "could not build $key"
	fi
	# shellcheck disable=SC2034 # the result
	CACHED=$dir
}

_drop_unless_done() { [[ ! -d $1 ]] || rm -rf -- "$1"; }

# ---------------------------------------------------------------- private apt

# private_apt SUITE...: prepares an apt that sees exactly these Debian suites (bookworm, bookworm-security, trixie,
# trixie-backports, sid, ...), from the mirror this machine is configured for, with lists, cache and an empty dpkg status
# of its own: nothing of the system is read but its mirror, keyring and proxy settings, and nothing is written. A suite that
# the mirror does not have is warned about and left out; APT_SUITES holds those that are there. Afterwards:
#
#   apt_private get|cache ARG...          apt-get / apt-cache in that world
#   apt_versions PKG                      "version suite" lines, newest first
#   apt_newest PKG [SUITE...]             the newest version (in these suites), or nothing
#   apt_fetch DIR PKG[=VERSION]...        downloads .debs into DIR, prints their paths
#   apt_closure REGEX PKG...              PKGs and what they depend on, dependencies only as far as their name matches REGEX
#   apt_fetch_source DIR PKG[=VERSION]    downloads a source package (unpacked needs dpkg-dev; it is not unpacked), prints the .dsc
#   apt_source_versions PKG               versions of a source package, newest first
APT_CONF='' APT_SUITES=()
private_apt() {
	local suite dir keyring=/usr/share/keyrings/debian-archive-keyring.gpg arch
	((EUID != 0)) || need_packages debian-archive-keyring
	[[ -r $keyring ]] || fail "no $keyring: install debian-archive-keyring"
	_apt_mirrors
	arch=$(dpkg --print-architecture)
	APT_SUITES=()
	for suite in "$@"; do
		dir=$CACHE_DIR/apt/$suite
		if _apt_suite "$dir" "$suite" "$keyring" "$arch"; then APT_SUITES+=("$suite"); fi
	done
	((${#APT_SUITES[@]})) || fail "the mirror has none of these suites: $*"
	# One world of the suites that are there: their lists are linked, not fetched twice.
	dir=$CACHE_DIR/apt/world-$(hash_of "${APT_SUITES[@]}")
	local lock
	exec {lock}>"$CACHE_DIR/apt/.lock"
	flock "$lock"
	_apt_conf "$dir" "$arch"
	for suite in "${APT_SUITES[@]}"; do
		[[ $dir/linked -nt $CACHE_DIR/apt/$suite/fresh ]] || rm -f -- "$dir/linked"
	done
	if [[ ! -e $dir/linked ]]; then
		rm -rf -- "$dir/lists"
		mkdir -p -- "$dir/lists/partial"
		: >"$dir/sources.list"
		for suite in "${APT_SUITES[@]}"; do
			cat -- "$CACHE_DIR/apt/$suite/sources.list" >>"$dir/sources.list"
			find "$CACHE_DIR/apt/$suite/lists" -maxdepth 1 -type f ! -name lock -exec cp -alt "$dir/lists" {} +
		done
		touch "$dir/linked"
	fi
	exec {lock}>&-
	APT_CONF=$dir/apt.conf
}

# The URIs of this machine's own Debian archive and security mirror, asked from its apt.
_apt_archive='' _apt_security=''
_apt_mirrors() {
	local release uri
	[[ -z $_apt_archive ]] || return 0
	# shellcheck disable=SC2016 # apt expands $(...), not the shell
	while IFS='|' read -r release uri; do
		uri=${uri%/}
		case $release in
		*-security) _apt_security=${_apt_security:-$uri} ;;
		*) [[ $uri == */debian ]] && _apt_archive=${_apt_archive:-$uri} ;;
		esac
	done < <(apt-get indextargets --format '$(RELEASE)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | sort -u)
	[[ -n $_apt_archive ]] || fail "found no Debian mirror (a URI that ends in /debian) in this machine's apt sources"
	_apt_security=${_apt_security:-${_apt_archive%/debian}/debian-security}
}

_apt_conf() {
	local dir=$1 arch=$2
	mkdir -p -- "$dir"/{lists/partial,archives/partial,empty.d}
	: >>"$dir/status"
	: >>"$dir/sources.list"
	cat >"$dir/apt.conf.$$" <<-CONF
		Dir::Etc::sourcelist "$dir/sources.list";
		Dir::Etc::sourceparts "$dir/empty.d";
		Dir::Etc::preferencesparts "$dir/empty.d";
		Dir::Etc::preferences "/dev/null";
		Dir::State "$dir";
		Dir::State::lists "$dir/lists";
		Dir::State::status "$dir/status";
		Dir::State::extended_states "$dir/extended_states";
		Dir::Cache "$dir";
		Dir::Cache::archives "$dir/archives";
		Dir::Log "$dir";
		APT::Architecture "$arch";
		APT::Architectures { "$arch"; };
		APT::Install-Recommends "false";
		APT::Sandbox::User "$(id -un)";
		Acquire::Languages "none";
		Acquire::Retries "3";
		Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
		Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
		# A mirror that lags behind serves lists past their date. They are signed all the same, and what they name is checked by
		# its sum; all that is lost is the promise that nothing newer exists.
		Acquire::Check-Valid-Until "false";
		#clear APT::Update::Post-Invoke;
		#clear APT::Update::Post-Invoke-Success;
		#clear DPkg::Post-Invoke;
	CONF
	mv -- "$dir/apt.conf.$$" "$dir/apt.conf"
}

# One suite's lists, refreshed when older than 12 hours. Status 1: the mirror does not have it.
_apt_suite() {
	local dir=$1 suite=$2 keyring=$3 arch=$4 uri=$_apt_archive lock log start
	case $suite in *-security) uri=$_apt_security ;; esac
	mkdir -p -- "$dir"
	exec {lock}>"$dir/.lock"
	flock "$lock"
	if [[ -z $(find "$dir/fresh" -mmin -720 2>/dev/null) ]]; then
		_apt_conf "$dir" "$arch"
		printf 'deb [signed-by=%s] %s %s main\ndeb-src [signed-by=%s] %s %s main\n' \
			"$keyring" "$uri" "$suite" "$keyring" "$uri" "$suite" >"$dir/sources.list"
		start=$(now_us)
		log=$dir/update.log
		if ! APT_CONFIG=$dir/apt.conf logged "$log" apt-get update -o APT::Update::Error-Mode=any; then
			warn "suite $suite is not to be had from $uri"
			exec {lock}>&-
			return 1
		fi
		touch "$dir/fresh"
		info "package lists of $suite ($(seconds_since "$start") s)"
	fi
	exec {lock}>&-
}

apt_private() {
	local tool=apt-$1
	shift
	[[ -n $APT_CONF ]] || fail "apt_private before private_apt"
	APT_CONFIG=$APT_CONF "$tool" "$@"
}

apt_versions() {
	apt_private cache madison "$1" 2>/dev/null |
		awk -F ' *[|] *' '$3 ~ /Packages$/ {gsub(/ /, "", $2); split($3, a, " "); sub("/.*", "", a[2]); print $2, a[2]}'
}

# apt_newest PKG [SUITE...]
apt_newest() {
	local pkg=$1 version suite
	shift
	while read -r version suite; do
		if (($# == 0)) || [[ " $* " == *" $suite "* ]]; then
			echo "$version"
			return 0
		fi
	done < <(apt_versions "$pkg")
}

apt_source_versions() {
	apt_private cache showsrc --only-source "$1" 2>/dev/null | awk '$1 == "Version:" {print $2}' | sort -uV -r
}

# apt_fetch DIR PKG[=VERSION]...: prints the paths of the .debs.
apt_fetch() {
	local dir=$1 tmp deb
	shift
	tmp=$(mktemp -d "$dir/.fetch.XXXXXX")
	if ! (cd "$tmp" && apt_private get -qq download "$@") >&2; then
		rm -rf -- "$tmp"
		return 1
	fi
	for deb in "$tmp"/*.deb; do
		mv -- "$deb" "$dir/"
		echo "$dir/${deb##*/}"
	done
	rm -rf -- "$tmp"
}

# apt_fetch_source DIR PKG[=VERSION]: prints the path of the .dsc.
apt_fetch_source() {
	local dir=$1 what=$2
	(cd "$dir" && apt_private get -qq source --download-only --only-source "$what") >&2 || return 1
	find "$dir" -maxdepth 1 -name "${what%%=*}_*.dsc" -printf '%T@ %p\n' | sort -rn | sed -n '1s/^[^ ]* //p'
}

# apt_closure REGEX PKG[=VERSION]...: one name per line. Alternatives are all taken.
apt_closure() {
	local want=$1 todo=() next
	local -A seen=()
	shift
	todo=("$@")
	while ((${#todo[@]})); do
		for next in "${todo[@]}"; do seen[$next]=1; done
		mapfile -t todo < <(apt_private cache depends --no-recommends --no-suggests --no-conflicts --no-breaks \
			--no-replaces --no-enhances "${todo[@]}" |
			sed -nE 's/^ [ |](Pre)?Depends: ([^<:]+)(:any)?$/\2/p' | grep -E "$want" | sort -u |
			while read -r next; do [[ -n ${seen[$next]:-} ]] || echo "$next"; done)
	done
	printf '%s\n' "${!seen[@]}" | sort
}
