#!/usr/bin/env bash
# bench/gpu.sh OUTDIR: nine minutes with a GPU, the most valuable first, so that a run cut short is still useful.
#
# Installs the checkout without fetching anything, checks it, measures it beside its peers, tests it, searches for better
# tiles and looks at it with ncu and compute-sanitizer. Leaves at most 8 files in OUTDIR: summary.txt, log.txt,
# tests.txt and CSV files (step, compiled, ops, host, tune) for `python -m bench report`. Where there is no NVIDIA GPU,
# what needs one is skipped and said so, and the rest is short. The interpreter is $PYTHON, or python3.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: bench/gpu.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here" || exit 1
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
deadline=$((SECONDS + 525))
failed=0
: >"$out/summary.txt"
: >"$out/log.txt"

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# part NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, its output in log.txt. On TERM a shell's children end
# too; Python, on INT, closes its files and prints what it has.
part() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS signal=INT status
    shift 2
    [[ $1 == bash ]] && signal=TERM
    if ((left < 10)); then
        say "$name: skipped, no time left"
        return
    fi
    ((limit > left)) && limit=$left
    printf '\n===== %s: %s\n' "$name" "$*" >>"$out/log.txt"
    timeout --signal=$signal --kill-after=10 "$limit" "$@" >>"$out/log.txt" 2>&1
    status=$?
    case $status in
        0) say "$name: ok, $((SECONDS - start)) s" ;;
        124 | 130 | 137 | 143) say "$name: stopped after $((SECONDS - start)) s, what it had is kept" ;;
        *)
            say "$name: FAILED with status $status, $((SECONDS - start)) s"
            [[ $name == ncu || $name == install ]] || failed=1 # which a machine may not permit
            ;;
    esac
}

# measure NAME LIMIT FILE ARGUMENTS...: a part of python -m bench, a process of its own, as a failure may cost it the
# device; its rows are added to FILE. They go to a file that is not there before, for then they are in it as soon as they
# are measured, however the process ends; what is there would stay until all of them are.
measure() {
    local name=$1 limit=$2 file=$out/$3.csv
    shift 3
    rm -f "$work/rows.csv"
    part "$name" "$limit" "$python" -m bench "$@" --out "$work/rows.csv"
    [[ -s $work/rows.csv ]] || return
    if [[ -s $file ]]; then tail -n +2 "$work/rows.csv" >>"$file"; else cp "$work/rows.csv" "$file"; fi
}

tests() { "$python" -m pytest "$@" >"$out/tests.txt" 2>&1; }
export -f tests
export python out work

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)"
    part install 30 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index \
        --disable-pip-version-check -e .
    export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} # where setuptools is too old to install, the checkout serves
    if ! "$python" -c 'import fastbf.kernels' 2>>"$out/log.txt"; then
        say "fastbf.kernels cannot be imported: nothing can be measured"
        exit 1
    fi
    part self-check 30 "$python" -m fastbf
    # Kernels are compiled for each width; here side by side, so that nothing below waits for a compiler.
    part build 45 bash -c 'pids=""; for w in imagenet-lt-256 cifar100-lt czsl inaturalist vit v2-deit-s v2-detr \
            large-1024-512 large-16384-512 large-4096-2048; do
            "$python" -m bench memory --workloads $w --providers fastbf --out "$work/$w.csv" & pids="$pids $!"; done
        status=0; for p in $pids; do wait $p || status=1; done; exit $status'
    papers="imagenet-lt-256 imagenet-lt-512 cifar100-lt inaturalist czsl vit imagenet-lt-128 v2-deit-s v2-detr
        v2-deformable-detr"
    large="large-4096-512 large-4096-2048 large-16384-512 large-1024-512 large-16384-2048 large-32768-512"
    # shellcheck disable=SC2086
    measure step 55 step step --seconds 0.1 --providers fastbf fastbf-graphed paper sdpa-flash sdpa-efficient \
        sdpa-cudnn --workloads $papers
    # shellcheck disable=SC2086
    measure step-graph 35 step step --seconds 0.1 --capture graph --providers fastbf paper sdpa-efficient \
        --workloads $papers
    part tests 90 bash -c 'tests --numprocesses 8 --tb short tests/triton_backend/test_attention.py tests/triton_backend/test_encoder_layer.py \
        tests/triton_backend/test_classifier.py tests/triton_backend/test_elementwise.py tests/test_cuda_graphs.py tests/triton_backend/test_operators.py'
    # shellcheck disable=SC2086
    measure step-large 45 step step --seconds 0.1 --providers fastbf paper sdpa-flash sdpa-efficient --workloads $large
    measure attention 35 ops op attention --seconds 0.05 --modes forward backward --providers fastbf paper sdpa-flash \
        sdpa-efficient ffpa --workloads imagenet-lt-512 large-4096-2048 large-16384-2048 large-4096-512 v2-deit-s v2-detr
    # shellcheck disable=SC2086
    measure loss 35 ops op loss --seconds 0.05 --providers fastbf paper F.linear_cross_entropy liger cut-cross-entropy \
        --workloads $papers $large large-32768-2048 classes-8142 classes-50000 classes-128000
    part tune 60 "$python" -m bench tune --budget 45 --out "$out/tune.csv"
    measure compiled 60 compiled step --seconds 0.1 --providers fastbf fastbf-graphed paper compile compile-max \
        --workloads imagenet-lt-256 large-4096-512 cifar100-lt v2-deit-s
    part host 12 "$python" -m bench host --out "$out/host.csv" --seconds 0.1
    if command -v ncu >/dev/null; then
        # After the launches of the comparison with fp64 and one forward: a whole step.
        part ncu 30 ncu --clock-control none --launch-skip 18 --launch-count 12 \
            --kernel-name 'regex:^(forward|backward|add_norm|activation|cross_entropy)_' \
            --section SpeedOfLight --section LaunchStats --section Occupancy \
            "$python" -m bench memory --workloads imagenet-lt-512 --providers fastbf --out "$work/ncu.csv"
    else
        say "ncu: skipped, not installed"
    fi
    if command -v compute-sanitizer >/dev/null; then
        part sanitizer 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \
            "$python" -m pytest tests/triton_backend/test_elementwise.py tests/triton_backend/test_classifier.py \
            -k "strides or ignored" --maxfail 1
    else
        say "sanitizer: skipped, not installed"
    fi
    measure elementwise 30 ops op add_norm activation --seconds 0.05 --modes forward backward --providers fastbf paper \
        --workloads imagenet-lt-512 large-16384-512 v2-deformable-detr
else
    say "no NVIDIA GPU that PyTorch sees: a short run of what needs none"
    part self-check 45 "$python" -m fastbf
    measure step 60 step step --seconds 0.05 --workloads cifar100-lt --providers fastbf fastbf-torch paper
    part tests 60 bash -c 'tests tests/kernels/test_attention_configs.py tests/test_functional.py'
    measure attention 30 ops op attention --seconds 0.02 --modes forward backward --providers fastbf fastbf-torch paper \
        --workloads cifar100-lt
    measure loss 30 ops op loss --seconds 0.02 --providers fastbf fastbf-torch paper --workloads cifar100-lt
    part host 60 "$python" -m bench host --out "$out/host.csv" --seconds 0.1
    for name in install build step-graph step-large tune compiled ncu sanitizer elementwise; do
        say "$name: skipped, needs an NVIDIA GPU"
    done
fi
say "$SECONDS s in all"
exit $failed
