#!/usr/bin/env bash
# Measures everything that fits into nine minutes on one GPU, one JSON per benchmark.
#
#   launch/gpu_bench.sh [DIRECTORY]      default: gpu_bench
#
# Needs jax for CUDA, flax and optax; beside torch and transformers it compares with them, without
# it measures ours alone. Each benchmark has a time of its own, so that one that hangs costs no other.
# Outside of a git checkout, GIT_REVISION names the revision in the results.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

out=${1:-gpu_bench}
python=$(command -v python || command -v python3) || exit
mkdir -p "$out"
# torch lives in the same processes and needs memory too.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
backend=$("$python" -c 'import jax; print(jax.default_backend())')
if [[ $backend != gpu ]]; then
    printf "jax runs on \"%s\" here: install jax[cuda13] on a machine with an NVIDIA GPU\n" "$backend" >&2
    exit 1
fi
torch=$("$python" -c 'import torch; print(torch.cuda.is_available())' 2>/dev/null || true)
hf=$("$python" -c 'import transformers' 2>/dev/null && printf %s "$torch")
failed=0

# measure SECONDS NAME ARGUMENTS...: writes NAME.json, and what is printed to the log.
measure() {
    local seconds=$1 name=$2 status
    shift 2
    printf '\n== %s: bench %s ==\n' "$name" "$*" | tee -a "$out/log.txt"
    timeout -k 5 "$seconds" "$python" -m tinyllama_jax.bench "$@" --json "$out/$name.json" 2>&1 |
        tee -a "$out/log.txt" | tail -n 25
    status=${PIPESTATUS[0]}
    if ((status)); then
        failed=$((failed + 1))
        printf 'FAILED with %s\n' "$status" | tee -a "$out/log.txt"
    fi
}

against_torch=()
against_hf=()
[[ $torch == True ]] && against_torch=(--against torch)
[[ $hf == True ]] && against_hf=(--against hf)
model=(--preset tinyllama_1b --scan-unroll 0)
# jax keeps what it once took, and by what the plan says of ours a card of 80 GB has hardly room for
# torch beside it at 8 rows; nobody has tried.
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
((memory < 100000)) && model+=(--rows 4)

: > "$out/log.txt"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv |
    tee -a "$out/log.txt"
measure 60 attention_2048 attention "${against_torch[@]}"
measure 40 attention_d128 attention --heads 16x4x128 --rounds 5 "${against_torch[@]}"
measure 40 loss loss "${against_torch[@]}"
measure 220 train_1b train "${model[@]}" --rounds 8 "${against_hf[@]}"
measure 60 train_1b_flash train "${model[@]}" --attention flash --rounds 8
measure 60 decode_1 decode --preset tinyllama_1b --new-tokens 128 --rounds 3 "${against_hf[@]}"
measure 30 decode_64 decode --preset tinyllama_1b --rows 64 --new-tokens 128 --rounds 3

printf '\n%s of the benchmarks failed; figures are in %s\n' "$failed" "$out"
exit "$((failed > 0))"
