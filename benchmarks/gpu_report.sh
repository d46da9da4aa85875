#!/usr/bin/env bash
# Everything a CUDA machine can tell in one go, within 8 minutes: build, host cost, launches, merge, masks, training steps, tests,
# compute-sanitizer. No step stops the next; each has its own time limit and a log, and all limits together fit. A short
# table comes last.
#
#   benchmarks/gpu_report.sh              results in benchmarks/results/<gpu>-<date>
#   OUT=/tmp/report benchmarks/gpu_report.sh
#   PYTHON=.venv/bin/python QUICK=1 benchmarks/gpu_report.sh
#   PARTS=benchmarks benchmarks/gpu_report.sh    or "tests", or "sanitizer": with more time for each step
#
# Without a GPU it runs what runs without one, and says what it skipped. Writes report.md, steps.log, tests.log, sanitizer.log,
# results.json, results.md, results.png, roofline.png, overhead.json, patched.json, and of training steps throughput.json and .png with
# the traces of one step before and after.
set -u
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}
TOTAL=${TOTAL:-480}
QUICK=${QUICK:-}
PARTS=${PARTS:-benchmarks tests sanitizer}
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
wanted() { [[ " $PARTS " == *" $1 "* ]]; }
# longest SECONDS: the limit of a step; three times as much where its part is the only one
longest() { if [[ "$PARTS" == *" "* ]]; then echo "$1"; else echo $(( 3 * $1 )); fi; }

# step NAME SECONDS LOG COMMAND...: runs it within its limit and what is left of the whole; notes how it ended
step() {
    local name=$1 limit=$2 file=$3 log=$OUT/$3 began=$SECONDS status verdict
    shift 3
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    if [ "$limit" -lt 5 ]; then skip "$name" "no time left"; return 1; fi
    printf '\n===== %s (at most %s s): %s\n' "$name" "$limit" "$*" >> "$log"
    timeout -s INT -k 10 "$limit" "$@" >> "$log" 2>&1  # pytest sums up what it has when it is interrupted
    status=$?
    case $status in
        0) verdict=ok ;;
        124 | 130 | 137) verdict="stopped after $limit s" ;;
        *) verdict="failed ($status)" ;;
    esac
    ROWS+=("| $name | $verdict | $(( SECONDS - began )) s | $file |")
    printf '%-28s %-22s %s s\n' "$name" "$verdict" $(( SECONDS - began ))
    return $status
}

skip() { ROWS+=("| $1 | skipped: $2 | | |"); printf '%-28s skipped: %s\n' "$1" "$2"; }

echo "GPU: ${GPU:-none}; results in $OUT"
# beside the sources, where PYTHONPATH finds it; only what changed is compiled again
step build 110 steps.log "$PYTHON" setup.py build_ext --inplace
step info 15 steps.log "$PYTHON" -m vlm_fuse info

DEVICE=cpu; [ -n "$GPU" ] && DEVICE=cuda
QUICK_FLAG=(); { [ -n "$QUICK" ] || [ -z "$GPU" ]; } && QUICK_FLAG=(--quick)

if wanted benchmarks; then  # first, while nothing else runs
    step "host cost" 25 steps.log "$PYTHON" -m benchmarks.bench_overhead --device "$DEVICE" --quick --out "$WORK/overhead"
    cp "$WORK/overhead/overhead.json" "$OUT/" 2>/dev/null
    if [ -n "$GPU" ]; then
        step "launches" 20 steps.log "$PYTHON" -m benchmarks.launches
        step "launches, triton" 25 steps.log env VLM_FUSE_BACKEND=triton "$PYTHON" -m benchmarks.launches
        LENGTHS=16384,65536
    else
        skip "launches" "no GPU"
        LENGTHS=4096
    fi
    # nothing is begun after its own limit, below the step's, and what is measured is written after every operation
    step "merge" "$(longest 70)" steps.log "$PYTHON" -m benchmarks.bench_merge --device "$DEVICE" "${QUICK_FLAG[@]}" \
        --pages default --budget 0.5 --limit "$(longest 50)" --out "$OUT"
    step "masks" "$(longest 40)" steps.log "$PYTHON" -m benchmarks.bench_masks --device "$DEVICE" "${QUICK_FLAG[@]}" --lengths "$LENGTHS" \
        --budget 0.3 --limit "$(longest 25)" --out "$WORK/masks"
    if "$PYTHON" -c 'import transformers' 2>/dev/null; then
        step "patched models" "$(longest 30)" steps.log "$PYTHON" -W ignore -m benchmarks.bench_patched --device "$DEVICE" --quick --out "$WORK/patched"
        cp "$WORK/patched/patched.json" "$OUT/" 2>/dev/null
    else
        skip "patched models" "transformers is not installed"
    fi

    step "training" "$(longest 60)" steps.log "$PYTHON" -W ignore -m benchmarks.train_throughput --device "$DEVICE" "${QUICK_FLAG[@]}" \
        --only nanovlm,qwen2_5_vl --trace --out "$WORK/throughput"
    cp "$WORK"/throughput/throughput.{json,png} "$WORK"/throughput/trace_*.json.gz "$OUT/" 2>/dev/null

    NCU=$(command -v ncu || ls /usr/local/cuda*/bin/ncu 2>/dev/null | head -1)
    if [ -z "$GPU" ] || [ -z "$NCU" ]; then
        skip "ncu" "$([ -z "$GPU" ] && echo no GPU || echo not installed)"
    else
        # ours and Triton's, which have bare names, but none of torch
        step "ncu" "$(longest 25)" steps.log bash -c "'$NCU' --csv --kernel-name-base demangled --kernel-name 'regex:vlm_fuse::|^[a-z_]+_kernel\$' \
            --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum '$PYTHON' -m benchmarks.profiled > '$WORK/ncu.csv'"
    fi
fi

# what only a GPU shows comes first; what is compiled for GPUs that need not be here is left to machines without one
FIRST=(tests/test_streams_and_graphs.py tests/test_cuda_allocation.py)
LEFT_OUT=()
for name in install headers emulator demo docs packing packing_ranks packing_stream packing_distributed distributed_training padding_experiment train_throughput bench_command \
    collators_transformers patched_families packed_families patched_rope_index patched_distributed attend_of_config nanovlm trainers cuda_compile cuda_sanitized triton_compile streams_and_graphs cuda_allocation; do
    LEFT_OUT+=(--ignore "tests/test_$name.py")
done
WORKERS=()
"$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n "$(( $(nproc) < 8 ? $(nproc) : 8 ))" --dist loadfile --no-loadscope-reorder)
PYTEST=("$PYTHON" -m pytest -q -ra -p no:cacheprovider)
if ! wanted tests; then
    :
elif ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
    skip "tests" "pytest is not installed"
elif [ -z "$GPU" ]; then
    step "tests" "$(longest 80)" tests.log "${PYTEST[@]}" "${WORKERS[@]}" tests
else
    step "tests of a GPU" "$(longest 25)" tests.log "${PYTEST[@]}" "${FIRST[@]}"
    step "tests, cuda" "$(longest 45)" tests.log "${PYTEST[@]}" "${WORKERS[@]}" "${LEFT_OUT[@]}" -k "not triton" tests
    step "tests, triton" "$(longest 25)" tests.log "${PYTEST[@]}" "${WORKERS[@]}" "${LEFT_OUT[@]}" -k triton tests
fi

if wanted sanitizer; then
    SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | head -1)
    step "kernels against reference" 20 steps.log "$PYTHON" -m benchmarks.sanitize
    TOOLS=4
    for tool in memcheck racecheck initcheck synccheck; do
        if [ -z "$GPU" ]; then skip "$tool" "no GPU"; continue; fi
        if [ -z "$SANITIZER" ]; then skip "$tool" "compute-sanitizer is not installed"; continue; fi
        # without torch's caching allocator, an access past a tensor is an access past its allocation
        step "$tool" $(( $(left) / TOOLS )) sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
            --print-limit 20 "$PYTHON" -m benchmarks.sanitize
        TOOLS=$((TOOLS - 1))
    done
fi

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
    echo; echo "## Patched models"; echo
    [ -f "$WORK/patched/patched.md" ] && sed -n '/^| model/,$p' "$WORK/patched/patched.md"
    echo; echo "## Training"; echo
    [ -f "$WORK/throughput/throughput.md" ] && sed -n '/^## What was to be shown/,$p' "$WORK/throughput/throughput.md" | sed 's/^## /### /'
    echo; echo "## Targets"; echo
    [ -f "$OUT/results.md" ] && sed -n '/^## Targets/,/^## /p' "$OUT/results.md" | grep -v '^## '
    if [ -s "$WORK/ncu.csv" ]; then
        echo "## DRAM throughput and time by ncu"; echo
        "$PYTHON" -m benchmarks.ncu_table "$WORK/ncu.csv"
        echo
    fi
    echo "## Tests"; echo
    grep -E '^(FAILED|ERROR) ' "$OUT/tests.log" | head -n 40
    grep -E '(passed|failed|error|no tests ran).* in [0-9.]+s' "$OUT/tests.log"
    echo
    grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$OUT/sanitizer.log"
} > "$OUT/report.md"

echo
cat "$OUT/report.md"
echo "Took $(( SECONDS - STARTED )) s. Files in $OUT:"
ls "$OUT"
