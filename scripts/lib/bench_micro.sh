# shellcheck shell=bash
# bench_micro.sh - `scripts/bench micro`: cycles and instructions of the steps of a command. Sourced by scripts/bench.
# shellcheck disable=SC2016 # backticks of Markdown

out='' filter='' core='' callgrind=''

bench_micro_usage() {
	cat <<-USAGE
		usage: scripts/bench micro [FILTER] [--out DIR] [--core N] [--callgrind]

		Steps of a command in one thread (criterion, benches/micro): the check of a command, PRPs of 4, 8 and 128 KiB, fetch, submit
		and post alone, whole passes of a poller on null and memory, with and without journal, and passes over N idle queues. In
		ticks of the time stamp counter, for each command.

		  FILTER        only the benchmarks whose name contains it
		  --out DIR     where report.md and criterion's data go (default: target/bench/<time>)
		  --core N      core to run on (default: the last one)
		  --callgrind   instead, instructions for each command of a whole pass, counted by valgrind
		  --help        this text
	USAGE
}

while (($#)); do
	case $1 in
	--help | -h) bench_micro_usage && exit 0 ;;
	--callgrind) callgrind=1 ;;
	--out | --core)
		(($# > 1)) || fail "$1 needs a value"
		case $1 in
		--out) out=$2 ;;
		--core) core=$2 ;;
		esac
		shift
		;;
	-*) fail "unknown option '$1' (try --help)" ;;
	*)
		[[ -z $filter ]] || fail "one filter only: '$filter' or '$1'?"
		filter=$1
		;;
	esac
	shift
done
core=${core:-$(($(nproc) - 1))}
[[ $core =~ ^[0-9]+$ ]] || fail "a core is a number"
[[ -n $out ]] || out=$(cargo_target)/bench/$(date -u +%Y%m%d-%H%M%S)
mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)
rust_toolchain
favoured=(nice -n 0)
if ((EUID == 0)); then favoured=(nice -n -20); fi

# program NAME: path of a bench program, built
program() {
	local path
	path=$(cargo bench --locked --features testing --bench "$1" --no-run --message-format json 2>"$out/build.log" |
		sed -nE 's/.*"name":"'"$1"'".*"executable":"([^"]+)".*/\1/p' | tail -n 1)
	[[ -x $path ]] || fail "it does not build: see $out/build.log"
	rm -f -- "$out/build.log"
	echo "$path"
}

# In short, the machine and the commit.
dirty=''
git diff --quiet HEAD 2>/dev/null || dirty=', with changes'
commit="$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$dirty"
machine="$(sed -nE 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p), time stamp counter of $(awk '/^bogomips/ {printf "%.2f", $3 / 2000; exit}' /proc/cpuinfo) GHz"

if [[ -n $callgrind ]]; then
	need_packages valgrind
	step "instructions"
	bin=$(program instructions)
	# instructions KIND: what a command more costs, so that bringing it all up is not counted
	instructions() {
		local few many
		few=$(collected "$1" 3200) many=$(collected "$1" 35200)
		[[ -n $few && -n $many ]] || fail "callgrind counted nothing for $1"
		echo $(((many - few) / 32000))
	}
	collected() {
		valgrind --tool=callgrind --callgrind-out-file=/dev/null "$bin" "$1" "$2" 2>&1 | sed -nE 's/.*Collected : ([0-9]+).*/\1/p'
	}
	{
		printf '`scripts/bench micro --callgrind` at commit %s: instructions of the poller for each command (batches of 32).\n\n' "$commit"
		printf '| pass | instructions |\n| --- | ---: |\n'
		while read -r kind; do
			[[ $kind == *"$filter"* ]] || continue
			printf '| %s | %d |\n' "$kind" "$(instructions "$kind")"
		done < <("$bin" list)
	} >"$out/report.md"
	ok
	cat -- "$out/report.md"
	exit 0
fi

step "benchmarks"
bin=$(program micro)
ok
step "measuring"
CRITERION_HOME=$out/criterion logged "$out/criterion.log" taskset -c "$core" "${favoured[@]}" "$bin" --bench --noplot ${filter:+"$filter"}
ok
{
	printf '`scripts/bench micro` at commit %s. Machine: %s. Median of the samples, ticks for each command or pass.\n\n' "$commit" "$machine"
	printf '| step | cycles | 95 %% of the medians in |\n| --- | ---: | ---: |\n'
	while read -r file; do
		awk -v name="$(sed -nE 's/.*"full_id":"([^"]+)".*/\1/p' "${file%/*}/benchmark.json")" \
			-v each="$(sed -nE 's/.*"Elements":([0-9]+).*/\1/p' "${file%/*}/benchmark.json")" '
			match($0, /"median":.*"slope"/) {
				text = substr($0, RSTART, RLENGTH)
				n = each ? each : 1
				printf "| %s | %s | %s to %s |\n", name, number(text, "point_estimate") , number(text, "lower_bound"), number(text, "upper_bound")
			}
			function number(text, key) {
				match(text, "\"" key "\":[0-9.e+-]+")
				return sprintf("%.1f", substr(text, RSTART + length(key) + 3, RLENGTH - length(key) - 3) / n)
			}' "$file"
	done < <(find "$out/criterion" -path '*/new/estimates.json' -printf '%T@ %p\n' | sort -n | cut -d ' ' -f 2-)
} >"$out/report.md"
cat -- "$out/report.md"
