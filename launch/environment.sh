# shellcheck shell=bash
# What a training process on GPUs finds in its environment; sourced by the launchers. A value that is
# already set stays. No flag for speed stands here that was not measured (TUNING.md).

# jax takes 75% of a card by default, to leave room for others; training is alone on it.
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}

# A restart finds its programs compiled. https://docs.jax.dev/en/latest/persistent_compilation_cache.html
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/tinyllama_jax/compiled}

# NCCL names the interface, link or peer that failed.
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-debug
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Output reaches the logs line by line. https://docs.python.org/3/using/cmdline.html#envvar-PYTHONUNBUFFERED
export PYTHONUNBUFFERED=1

# The same bits after a restart on the same cards: no operation that adds in any order. Its price in
# speed was not measured. https://openxla.org/xla/flags_guidance
if [[ ${DETERMINISTIC:-} == 1 ]]; then
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_exclude_nondeterministic_ops=true"
fi
