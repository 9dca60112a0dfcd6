#!/usr/bin/env bash
# Measures everything that fits into nine minutes on one GPU, one JSON per benchmark.
#
#   launch/gpu_bench.sh [DIRECTORY]      default: gpu_bench
#
# Needs jax for CUDA, flax and optax; beside torch and transformers it compares with them, without
# it measures ours alone. Each benchmark has a time of its own, so that one that hangs costs no other.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

out=${1:-gpu_bench}
mkdir -p "$out"
# torch lives in the same processes and needs memory too.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
torch=$(python -c 'import torch; print(torch.cuda.is_available())' 2>/dev/null || true)
hf=$(python -c 'import torch, transformers; print(torch.cuda.is_available())' 2>/dev/null || true)
failed=0

# measure SECONDS NAME ARGUMENTS...: writes NAME.json and NAME.txt.
measure() {
    local seconds=$1 name=$2
    shift 2
    printf '\n== %s: bench %s ==\n' "$name" "$*"
    if ! timeout "$seconds" python -m tinyllama_jax.bench "$@" --json "$out/$name.json" \
        > "$out/$name.txt" 2>&1; then
        failed=$((failed + 1))
        printf 'FAILED: '
    fi
    tail -n 25 "$out/$name.txt"
}

against_torch=()
against_hf=()
[[ $torch == True ]] && against_torch=(--against torch)
[[ $hf == True ]] && against_hf=(--against hf)
model=(--preset tinyllama_1b --scan-unroll 0)

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.csv"
measure 60 attention_2048 attention "${against_torch[@]}"
measure 40 attention_d128 attention --heads 16x4x128 --rounds 5 "${against_torch[@]}"
measure 60 loss loss "${against_torch[@]}"
measure 180 train_1b train "${model[@]}" --rounds 8 "${against_hf[@]}"
measure 80 train_1b_flash train "${model[@]}" --attention flash --rounds 8
measure 60 decode_1 decode --preset tinyllama_1b --new-tokens 128 --rounds 3 "${against_hf[@]}"
measure 60 decode_64 decode --preset tinyllama_1b --rows 64 --new-tokens 128 --rounds 3

printf '\n%s of the benchmarks failed; figures are in %s\n' "$failed" "$out"
exit "$((failed > 0))"
