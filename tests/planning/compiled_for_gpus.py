"""Compiles parts of the step for GPUs that are not there, in a process of its own.

    python -m tests.planning.compiled_for_gpus kernels|loss|remat|attention|embedding|guard GPU DUMP

Prints JSON. Needs the CUDA plugin and `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`; for the kernels also
`XLA_FLAGS=--xla_dump_to=DUMP`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tests.kernels.test_attention import variants
from tinyllama_jax.config import load_config_file
from tinyllama_jax.kernels import cross_entropy, target
from tinyllama_jax.kernels.attention import api
from tinyllama_jax.parallel.devices import Gpu, parse_gpus
from tinyllama_jax.planning.compile import compile_step, lower_step, make_topology, peak_bytes_of
from tinyllama_jax.training import step

PTXAS = pathlib.Path(sysconfig.get_paths()["purelib"], "nvidia/cu13/bin/ptxas")  # of [cuda13]
TOKENS, D, V = 16_384, 2048, 32_000


def compile_on(gpu: str, function, *shapes) -> jax.stages.Compiled:
    cluster = parse_gpus(gpu)
    one = SingleDeviceSharding(make_topology(cluster).devices[0])
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for x in shapes)
    here = target.Target("gpu", cluster.gpu.compute_capability, cluster.gpu.title)
    with target.compile_for(here):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


def kernels(gpu: str, dump: pathlib.Path) -> list[dict]:
    """Every variant of every preset, forward and backward; float32 in both precisions."""
    done = []
    for (N, K, H), dtype, packed in variants():
        for precision in ("default", "highest") if dtype == "float32" else ("default",):
            shapes = [jax.ShapeDtypeStruct((2, 2048, heads, H), dtype) for heads in (N, K, K, N)]

            def both(q, k, v, dout, segment_ids, packed=packed):
                segment_ids = segment_ids if packed else None
                out, vjp = jax.vjp(
                    lambda *x: api.attention(*x, segment_ids=segment_ids, implementation="flash"),
                    q, k, v,
                )  # fmt: skip
                return (out, *vjp(dout))

            with jax.default_matmul_precision(precision):
                compiled = compile_on(
                    gpu, both, *shapes, jax.ShapeDtypeStruct((2, 2048), jnp.int32)
                )
            text = compiled.as_text()
            kernel_calls = sum(f"flash_attention_{name}" in text for name in KERNELS)
            known = assembled(dump, parse_gpus(gpu).gpu)
            for path in dump.iterdir():
                path.unlink()
            done.append({
                "heads": [N, K, H], "dtype": dtype, "packed": packed, "precision": precision,
                "kernels": kernel_calls, "assembled": known,
                "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            })  # fmt: skip
    return done


KERNELS = ("forward", "dq", "dkv")


def assembled(dump: pathlib.Path, gpu: Gpu) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel, from NVIDIA's assembler."""
    major, minor = gpu.compute_capability
    architecture = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    found: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for path in dump.glob("*.ptx"):
        if "flash_attention" not in path.read_text():
            continue
        printed = subprocess.run(
            [PTXAS, "-v", f"-arch={architecture}", path, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        for entry in printed.split("Compiling entry function")[1:]:
            name = re.search(r"flash_attention_(forward|dq|dkv)", entry)
            if name:
                found[name[1]] = {
                    "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                    "spilled": int(re.search(r"(\d+) bytes spill stores", entry)[1]),
                }
    return found


def loss(gpu: str) -> dict[str, int]:
    """Temporary bytes of the plain loss and of ours, gradients included."""
    shapes = (
        jax.ShapeDtypeStruct((8, TOKENS // 8, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((8, TOKENS // 8), jnp.int32),
        jax.ShapeDtypeStruct((8, TOKENS // 8), jnp.float32),
    )

    def temporaries(function) -> int:
        gradient = jax.grad(lambda *x: function(*x)[0], argnums=(0, 1))
        return compile_on(gpu, gradient, *shapes).memory_analysis().temp_size_in_bytes

    return {
        "plain": temporaries(cross_entropy.reference_weighted_sum),
        "chunked": temporaries(cross_entropy.weighted_sum),
    }


def remat(gpu: str) -> dict[str, int]:
    """Temporary bytes of the 1.1B step by what is recomputed, layers unrolled and in a loop."""
    config = load_config_file("configs/tinyllama_1b.py")
    sizes = {}
    for policy, unroll in (("none", 0), ("none", 1), ("attention", 0), ("attention", 1)):
        model = dataclasses.replace(config.model, remat=policy, scan_unroll=unroll)
        changed = dataclasses.replace(config, model=model)
        compiled = compile_step(changed, parse_gpus(gpu), (1, 1, 1))
        sizes[f"{policy} {unroll}"] = compiled.temporary_bytes
    return sizes


def small_step(gpu: str, **model) -> jax.stages.Compiled:
    """The compiled step of two layers of the 1.1B model."""
    config = load_config_file("configs/tinyllama_1b.py")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=2, **model),
        training=dataclasses.replace(config.training, global_batch_tokens=16_384),
    )
    cluster = parse_gpus(gpu)
    return lower_step(config, cluster, (1, 1, 1))[0].compile()


def attention(gpu: str) -> dict[str, int]:
    """How often the forward pass of attention stands in a step of two layers."""
    calls = {"cudnn": '"__cudnn$fmhaSoftmax"', "flash": "flash_attention_forward"}
    return {
        f"{name} {remat} {unroll}": sum(
            call in line and "custom-call(" in line
            for line in small_step(gpu, attention=name, remat=remat, scan_unroll=unroll)
            .as_text()
            .splitlines()
        )
        for name, call in calls.items()
        for remat, unroll in (("none", 0), ("dots", 0), ("attention", 0), ("attention", 1))
    }


def embedding(gpu: str) -> dict[str, list[str]]:
    """Scatters and sorts of a step that must be deterministic."""
    text = small_step(gpu, attention="flash", scan_unroll=0).as_text()
    return {
        kind: [line for line in text.splitlines() if f" {kind}(" in line]
        for kind in ("scatter", "sort")
    }


def guard(gpu: str) -> dict[str, int]:
    """Peak bytes of a step that may be skipped, and of one that always counts."""
    guarded = peak_bytes_of(small_step(gpu))
    step.choose = lambda good, taken, skipped: taken
    return {"guarded": guarded, "always": peak_bytes_of(small_step(gpu))}


if __name__ == "__main__":
    what, gpu, dump = sys.argv[1:]
    functions = {"loss": loss, "remat": remat, "attention": attention, "embedding": embedding,
                 "guard": guard}  # fmt: skip
    functions["kernels"] = functools.partial(kernels, dump=pathlib.Path(dump))
    print(json.dumps(functions[what](gpu)))
