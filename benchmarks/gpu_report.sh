#!/usr/bin/env bash
# Everything a CUDA machine can tell in one go, within 8 minutes: build, host cost, launches, masks, benchmarks, tests,
# compute-sanitizer. No step stops the next; each has its own time limit and a log. A short table comes last.
#
#   benchmarks/gpu_report.sh              results in benchmarks/results/<gpu>-<date>
#   OUT=/tmp/report benchmarks/gpu_report.sh
#   PYTHON=.venv/bin/python QUICK=1 benchmarks/gpu_report.sh
#
# Without a GPU it runs what runs without one, and says what it skipped. Writes at most 8 files: report.md, steps.log,
# tests.log, sanitizer.log, results.json, results.md, results.png, overhead.json.
set -u
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}
TOTAL=${TOTAL:-480}
QUICK=${QUICK:-}
STARTED=$SECONDS
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")' 2>/dev/null)
NAME=$(printf '%s' "${GPU:-cpu}" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9._-')
OUT=${OUT:-benchmarks/results/$NAME-$(date -u +%Y-%m-%d)}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
: > "$OUT/steps.log"; : > "$OUT/tests.log"; : > "$OUT/sanitizer.log"
ROWS=()

left() { echo $(( TOTAL - 10 - (SECONDS - STARTED) )); }

# step NAME SECONDS LOG COMMAND...: runs it within its limit and what is left of the whole; notes how it ended
step() {
    local name=$1 limit=$2 file=$3 log=$OUT/$3 began=$SECONDS status verdict
    shift 3
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    if [ "$limit" -lt 5 ]; then skip "$name" "no time left"; return 1; fi
    printf '\n===== %s (at most %s s): %s\n' "$name" "$limit" "$*" >> "$log"
    timeout -k 5 "$limit" "$@" >> "$log" 2>&1
    status=$?
    case $status in
        0) verdict=ok ;;
        124 | 137) verdict="stopped after $limit s" ;;
        *) verdict="failed ($status)" ;;
    esac
    ROWS+=("| $name | $verdict | $(( SECONDS - began )) s | $file |")
    printf '%-28s %-22s %s s\n' "$name" "$verdict" $(( SECONDS - began ))
    return $status
}

skip() { ROWS+=("| $1 | skipped: $2 | | |"); printf '%-28s skipped: %s\n' "$1" "$2"; }

build() {
    # torch and the tools are here already: nothing is fetched. Where pip may not write, build beside the sources.
    "$PYTHON" -m pip install --no-build-isolation --no-deps -e . ||
        "$PYTHON" -m pip install --break-system-packages --no-build-isolation --no-deps -e . ||
        "$PYTHON" setup.py build_ext --inplace
}
export -f build
export PYTHON

echo "GPU: ${GPU:-none}; results in $OUT"
step build 100 steps.log bash -c build
step info 30 steps.log "$PYTHON" -m vlm_fuse info

DEVICE=cpu; [ -n "$GPU" ] && DEVICE=cuda
QUICK_FLAG=(); { [ -n "$QUICK" ] || [ -z "$GPU" ]; } && QUICK_FLAG=(--quick)

# timings first, while nothing else runs
step "host cost" 60 steps.log "$PYTHON" -m benchmarks.bench_overhead --device "$DEVICE" "${QUICK_FLAG[@]}" --out "$WORK/overhead"
cp "$WORK/overhead/overhead.json" "$OUT/" 2>/dev/null
if [ -n "$GPU" ]; then
    step "launches" 60 steps.log "$PYTHON" -m benchmarks.launches
    step "launches, triton" 60 steps.log env VLM_FUSE_BACKEND=triton "$PYTHON" -m benchmarks.launches
    LIMIT=90
    LENGTHS=16384,65536
else
    skip "launches" "no GPU"
    LIMIT=80
    LENGTHS=4096
fi
# nothing is begun after its own limit, below the step's: what is measured by then is reported
step "masks" 75 steps.log "$PYTHON" -m benchmarks.bench_masks --device "$DEVICE" "${QUICK_FLAG[@]}" --lengths "$LENGTHS" \
    --budget 0.3 --limit 45 --out "$WORK/masks"
# a worker writes after every operation, so that its own limit, below the step's, ends it with what it has
step "merge" $((LIMIT + 30)) steps.log "$PYTHON" -m benchmarks.bench_merge --device "$DEVICE" "${QUICK_FLAG[@]}" \
    --pages default --budget 0.5 --limit "$LIMIT" --out "$OUT"

NCU=$(command -v ncu || ls /usr/local/cuda*/bin/ncu 2>/dev/null | head -1)
if [ -z "$GPU" ] || [ -z "$NCU" ]; then
    skip "ncu" "$([ -z "$GPU" ] && echo no GPU || echo not installed)"
else
    step "ncu" 60 steps.log bash -c "'$NCU' --csv --kernel-name-base demangled --kernel-name regex:vlm_fuse\|_kernel \
        --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum '$PYTHON' -m benchmarks.profiled > '$WORK/ncu.csv'"
fi

WORKERS=()
"$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n "$(( $(nproc) < 8 ? $(nproc) : 8 ))")
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    step "tests" "${TESTS:-120}" tests.log "$PYTHON" -m pytest -q -ra --maxfail 20 -p no:cacheprovider "${WORKERS[@]}" tests
else
    skip "tests" "pytest is not installed"
fi

SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | head -1)
step "kernels against reference" 60 steps.log "$PYTHON" -m benchmarks.sanitize
TOOLS=4
for tool in memcheck racecheck initcheck synccheck; do
    if [ -z "$GPU" ]; then skip "$tool" "no GPU"; continue; fi
    if [ -z "$SANITIZER" ]; then skip "$tool" "compute-sanitizer is not installed"; continue; fi
    # without torch's caching allocator, an access past a tensor is an access past its allocation
    step "$tool" $(( $(left) / TOOLS )) sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
        --print-limit 20 "$PYTHON" -m benchmarks.sanitize
    TOOLS=$((TOOLS - 1))
done

{
    echo "# Report from ${GPU:-a machine without a GPU}, $(date -u '+%Y-%m-%d %H:%M UTC')"
    echo
    echo "| step | how it ended | time | log |"
    echo "| --- | --- | --- | --- |"
    printf '%s\n' "${ROWS[@]}"
    echo
    if [ -n "$GPU" ]; then
        echo "## Launches"; echo
        sed -n '/^===== launches/,/^===== merge/p' "$OUT/steps.log" | grep '^|'
        echo
    fi
    echo "## Host cost"; echo
    [ -f "$WORK/overhead/overhead.md" ] && sed -n '/^| us/,$p' "$WORK/overhead/overhead.md"
    echo; echo "## Masks"
    [ -f "$WORK/masks/masks.md" ] && sed -n '/^- /p;/^## Targets/,$p' "$WORK/masks/masks.md" | sed 's/^## /### /'
    echo; echo "## Targets"; echo
    [ -f "$OUT/results.md" ] && sed -n '/^## Targets/,/^## /p' "$OUT/results.md" | grep -v '^## '
    if [ -s "$WORK/ncu.csv" ]; then
        echo "## DRAM throughput and time by ncu"; echo
        "$PYTHON" -m benchmarks.ncu_table "$WORK/ncu.csv"
        echo
    fi
    echo "## Tests"; echo
    tail -n 3 "$OUT/tests.log"
    echo
    grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$OUT/sanitizer.log"
} > "$OUT/report.md"

echo
cat "$OUT/report.md"
echo "Took $(( SECONDS - STARTED )) s. Files in $OUT:"
ls "$OUT"
