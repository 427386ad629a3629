# shellcheck shell=bash
# cases.sh - runs test cases, some at a time, each in a subshell with a directory of its own, and counts. Needs common.sh.
#
#   cases_of GROUP                    the cases registered from here on are of this group
#   test_case [--limit S] [--alone] NAME FUNCTION [ARG...]    registers; --alone: nothing else runs beside it (timing)
#   only_groups GROUP...              from here on there are only the cases of these
#   case_names FILTER                 prints the names that contain FILTER, one a line
#   run_cases JOBS DIR LOGS FILTER    runs those; those that may take longest begin first, and logs of failing ones are kept in LOGS
#   verdict PASS|FAIL|SKIP NAME SECONDS [REASON]              prints and counts one entry
#   count PASSED FAILED SKIPPED       counts entries that were printed by another runner
#   final_line                        `N passed, N failed[, N skipped]`; status 1 if anything failed or nothing ran
#
# A case's function runs under strict mode with CASE_DIR; status 0 is PASS. In it:
#   skip REASON                       ends the case as SKIP
#   broken REASON                     ends the case as FAIL, the reason in its line
#   measured TEXT                     a number that belongs into the case's line
#   died REASON                       ends the case as one that could not be judged, since its emulated machine died by itself: it is run
#                                     again from the start, at most CASE_RUNS times in all; its line says how often

_case_group='' _only_groups=()
_case_names=() _case_groups=() _case_limits=() _case_alone=() _case_calls=()
CASE_RUNS=3
TESTS_PASSED=0 TESTS_FAILED=0 TESTS_SKIPPED=0

cases_of() { _case_group=$1; }

test_case() {
	local limit=150 alone=''
	while [[ $1 == --* ]]; do
		case $1 in
		--limit) limit=$2 && shift ;;
		--alone) alone=1 ;;
		*) fail "test_case: unknown option $1" ;;
		esac
		shift
	done
	_case_names+=("$1")
	shift
	_case_groups+=("$_case_group")
	_case_limits+=("$limit")
	_case_alone+=("$alone")
	_case_calls+=("$(printf '%q ' "$@")")
}

skip() {
	echo "$*" >"$CASE_DIR/skip"
	exit 77
}
broken() {
	echo "broken: $*"
	echo "$*" >"$CASE_DIR/reason"
	exit 1
}
died() {
	echo "died: $*"
	echo "$*" >"$CASE_DIR/died"
	exit 76
}
measured() {
	echo "measured: $*"
	echo "$*" >>"$CASE_DIR/measured"
}

verdict() {
	local kind=$1 name=$2 seconds=$3 reason=${4:-}
	case $kind in
	PASS) TESTS_PASSED=$((TESTS_PASSED + 1)) ;;
	FAIL) TESTS_FAILED=$((TESTS_FAILED + 1)) ;;
	SKIP) TESTS_SKIPPED=$((TESTS_SKIPPED + 1)) ;;
	esac
	printf '%s %-34s %6s s%s\n' "$kind" "$name" "$seconds" "${reason:+  $reason}"
}

count() {
	TESTS_PASSED=$((TESTS_PASSED + $1)) TESTS_FAILED=$((TESTS_FAILED + $2)) TESTS_SKIPPED=$((TESTS_SKIPPED + $3))
}

final_line() {
	local line="$TESTS_PASSED passed, $TESTS_FAILED failed"
	((TESTS_SKIPPED == 0)) || line+=", $TESTS_SKIPPED skipped"
	echo "$line"
	((TESTS_FAILED == 0 && TESTS_PASSED > 0))
}

only_groups() { _only_groups=("$@"); }
# _case_wanted INDEX FILTER
_case_wanted() {
	[[ ${_case_names[$1]} == *"$2"* ]] || return 1
	((${#_only_groups[@]} == 0)) || [[ " ${_only_groups[*]} " == *" ${_case_groups[$1]} "* ]]
}

case_names() {
	local i
	for i in "${!_case_names[@]}"; do
		if _case_wanted "$i" "${1:-}"; then echo "${_case_names[i]}"; fi
	done
}

declare -A _case_pid=() _case_start=() _case_late=() _case_run=()

run_cases() {
	local jobs=$1 dir=$2 logs=$3 filter=$4 todo=() i
	# Long ones first, so that little is left to wait for at the end; those that want to be alone last.
	mapfile -t todo < <(for i in "${!_case_names[@]}"; do
		if _case_wanted "$i" "$filter"; then echo "${_case_alone[i]:-0} ${_case_limits[i]} $i"; fi
	done | sort -s -k1,1n -k2,2nr | cut -d ' ' -f 3)
	on_exit _end_cases
	while ((${#todo[@]} || ${#_case_pid[@]})); do
		while ((${#todo[@]})) && _room_for "${todo[0]}" "$jobs"; do
			_case_run[${todo[0]}]=1
			_start_case "${todo[0]}" "$dir"
			todo=("${todo[@]:1}")
		done
		for i in "${!_case_pid[@]}"; do
			if ! kill -0 "${_case_pid[$i]}" 2>/dev/null; then
				_collect_case "$i" "$dir" "$logs"
			elif (($(now_us) - _case_start[$i] > _case_limits[i] * ${VM_TIMEOUT_FACTOR:-1} * 1000000)) && [[ -z ${_case_late[$i]:-} ]]; then
				_case_late[$i]=1
				kill -TERM "${_case_pid[$i]}" 2>/dev/null || true
			fi
		done
		sleep 0.1
	done
	_forget_exit _end_cases
}

_room_for() {
	local i
	((${#_case_pid[@]} < $2)) || return 1
	((${#_case_pid[@]} == 0)) && return 0
	[[ -z ${_case_alone[$1]} ]] || return 1
	for i in "${!_case_pid[@]}"; do [[ -z ${_case_alone[i]} ]] || return 1; done
}

_start_case() {
	local i=$1 name=${_case_names[$1]}
	mkdir -p -- "$2/$name"
	_case_start[$i]=$(now_us)
	(
		CASE_DIR=$2/$name
		set -euo pipefail
		on_exit true # hooks of this shell's own
		eval "${_case_calls[i]}"
	) >"$2/$name/log" 2>&1 </dev/null &
	_case_pid[$i]=$!
}

_collect_case() {
	local i=$1 name=${_case_names[$1]} dir=$2/${_case_names[$1]} logs=$3 run=${_case_run[$1]} rc=0 seconds reason='' runs=''
	wait "${_case_pid[$i]}" 2>/dev/null || rc=$?
	seconds=$(seconds_since "${_case_start[$i]}")
	unset "_case_pid[$i]"
	if [[ -n ${_case_late[$i]:-} ]]; then
		rc=124
		echo "not ended within ${_case_limits[i]} s" >"$dir/reason"
	fi
	((run == 1)) || runs=" (run $run of at most $CASE_RUNS)"
	case $rc in
	0) verdict PASS "$name" "$seconds" "$(paste -sd ';' "$dir/measured" 2>/dev/null || true)$runs" ;;
	77) verdict SKIP "$name" "$seconds" "$(cat "$dir/skip" 2>/dev/null || true)" ;;
	76)
		_keep_case "$dir" "$logs/$name.died-$run"
		reason=$(cat "$dir/died")
		rm -rf -- "$dir"
		if ((run < CASE_RUNS)); then
			printf 'NOTE %s: nested guest died by itself after %s s (%s); run again\n' "$name" "$seconds" "$reason"
			_case_run[$i]=$((run + 1))
			_start_case "$i" "$2"
		else
			verdict FAIL "$name" "$seconds" "nested guest died by itself, $run times of $run ($reason), see $logs/$name.died-*"
		fi
		return 0
		;;
	*)
		reason=$(cat "$dir/reason" 2>/dev/null || grep -aE '^(FAIL|error:)' "$dir/log" | sed -n 1p || true)
		verdict FAIL "$name" "$seconds" "${reason:-status $rc}$runs"
		_keep_case "$dir" "$logs/$name"
		printf -- '---- the end of %s/log:\n' "$logs/$name"
		tail -n 30 -- "$dir/log" | cut -c 1-300
		printf -- '----\n'
		;;
	esac
	rm -rf -- "$dir"
}

# _keep_case DIR TO
_keep_case() {
	rm -rf -- "${2:?}"
	mkdir -p -- "$(dirname -- "$2")"
	# what is large says nothing
	find "$1" -type f -size +4M -delete
	find "$1" \( -type p -o -type s \) -delete
	cp -a -- "$1" "$2"
}

_end_cases() {
	local pid
	for pid in "${_case_pid[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
	for pid in "${_case_pid[@]}"; do wait "$pid" 2>/dev/null || true; done
}
