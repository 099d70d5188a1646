#!/usr/bin/env bash
# bench/gpu.sh OUTDIR: nine minutes with a GPU, the most valuable first, so that a run cut short is still useful.
#
# Installs the checkout without fetching anything, checks it, measures it beside its peers, tests it, searches for better
# tiles and looks at it with compute-sanitizer and ncu. Leaves at most 8 files in OUTDIR: summary.txt, log.txt,
# tests.txt and CSV files (step, compiled, ops, host, tune) for `python -m bench report`. Where there is no NVIDIA GPU,
# what needs one is skipped and said so, and the rest is short. The interpreter is $PYTHON, or python3.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: bench/gpu.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here" || exit 1
python=${PYTHON:-python3}
deadline=$((SECONDS + 525))
failed=0
: >"$out/summary.txt"
: >"$out/log.txt"

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# part NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, its output in log.txt.
part() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status
    shift 2
    if ((left < 10)); then
        say "$name: skipped, no time left"
        return
    fi
    ((limit > left)) && limit=$left
    printf '\n===== %s: %s\n' "$name" "$*" >>"$out/log.txt"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$out/log.txt" 2>&1
    status=$?
    case $status in
        0) say "$name: ok, $((SECONDS - start)) s" ;;
        124 | 130 | 137) say "$name: stopped after $((SECONDS - start)) s, what it had is kept" ;;
        *)
            say "$name: FAILED with status $status, $((SECONDS - start)) s"
            failed=1
            ;;
    esac
}

tests() { "$python" -m pytest "$@" >"$out/tests.txt" 2>&1; }
export -f tests
export python out

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)"
    part install 40 "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
    part self-check 45 "$python" -m fastbf
    # Kernels are compiled for each width; here side by side, so that nothing below waits for a compiler.
    part build 60 bash -c 'for w in cifar100-lt czsl inaturalist imagenet-lt-128 vit v2-deit-s v2-detr large-4096-512 \
        large-16384-512 large-32768-2048; do
        "$python" -m bench step --workloads $w --providers fastbf --seconds 0.001 --csv /dev/null & done; wait'
    part step 110 "$python" -m bench step --csv "$out/step.csv" --seconds 0.1 --capture eager graph \
        --providers fastbf fastbf-graphed paper sdpa-flash sdpa-efficient sdpa-cudnn
    part tests 140 bash -c 'tests --numprocesses 8 --tb short tests/test_triton_attention.py tests/test_triton_layer.py \
        tests/test_triton_classifier.py tests/test_triton_elementwise.py tests/test_graphs.py tests/test_operators.py'
    part ops 75 "$python" -m bench op attention loss add_norm activation --csv "$out/ops.csv" --seconds 0.05 \
        --modes both forward backward --providers fastbf paper sdpa-flash sdpa-efficient F.linear_cross_entropy liger \
        cut-cross-entropy ffpa
    part tune 90 "$python" -m bench tune --budget 70 --csv "$out/tune.csv"
    part compiled 75 "$python" -m bench step --csv "$out/compiled.csv" --seconds 0.1 \
        --providers fastbf fastbf-graphed paper compile compile-max \
        --workloads imagenet-lt-256 large-4096-512 cifar100-lt v2-deit-s
    part host 20 "$python" -m bench host --csv "$out/host.csv" --seconds 1
    kernels='regex:^(forward|backward|add_norm|activation|cross_entropy)_'
    if command -v ncu >/dev/null; then
        # The first twelve launches are those of the comparison with fp64.
        part ncu 45 ncu --clock-control none --kernel-name "$kernels" --launch-skip 12 --launch-count 12 \
            --section SpeedOfLight --section LaunchStats --section Occupancy \
            "$python" -m bench step --workloads imagenet-lt-512 --providers fastbf --seconds 0.01 --csv /dev/null
    else
        say "ncu: skipped, not installed"
    fi
    if command -v compute-sanitizer >/dev/null; then
        part sanitizer 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 "$python" -m pytest tests/test_triton_elementwise.py \
            tests/test_triton_classifier.py -k "odd or strides or ignore" --maxfail 1
    else
        say "sanitizer: skipped, not installed"
    fi
else
    say "no NVIDIA GPU: a short run of what needs none"
    part self-check 45 "$python" -m fastbf
    part step 60 "$python" -m bench step --csv "$out/step.csv" --seconds 0.05 --workloads cifar100-lt \
        --providers fastbf fastbf-torch paper
    part tests 60 bash -c 'tests tests/test_attention_configs.py tests/test_functional.py'
    part ops 60 "$python" -m bench op attention loss add_norm activation --csv "$out/ops.csv" --seconds 0.02 \
        --modes both forward backward --providers fastbf fastbf-torch paper --workloads cifar100-lt
    part host 60 "$python" -m bench host --csv "$out/host.csv" --seconds 0.3
    for name in install tune compiled ncu sanitizer; do
        say "$name: skipped, needs an NVIDIA GPU"
    done
fi
say "$((SECONDS)) s in all"
exit $failed
