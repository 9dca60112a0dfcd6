"""Plans a run on GPUs that are not there: memory to the byte, time at best.

python -m tinyllama_jax.plan --config=configs/tinyllama_1b.py --gpus=a100-40g:2x8
    [--search] [--price=1.5] [--html=plan.html] [--config.SECTION.SETTING=VALUE ...]
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from tinyllama_jax import door
from tinyllama_jax.config import Config, freeze

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_GPUS = flags.DEFINE_string("gpus", "", "Card, machines and GPUs in each: a100-40g:2x8, h200:8.")
_SEARCH = flags.DEFINE_bool("search", False, "Try other settings too; done anyway where none fits.")
_PRICE = flags.DEFINE_float("price", 0.0, "Of a GPU-hour, for the cost of the run.")
_NETWORK = flags.DEFINE_float("network", 25.0, "Between machines: GB/s per GPU in one direction.")
_HTML = flags.DEFINE_string("html", "", "A page to write as well.")
# model.remat and model.scan_unroll that go well together, fastest first.
_REMATS = (("none", 0), ("dots", 0), ("attention", 1), ("full", 1))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"{argv[1:]} are not flags; settings are given as --config.SETTING=VALUE")
    # Read when the plugin is loaded: it is to look for no driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from tinyllama_jax.benchmarks.report import RESULTS
    from tinyllama_jax.parallel.devices import GPUS, parse_gpus
    from tinyllama_jax.parallel.mesh import shape_of
    from tinyllama_jax.planning import report
    from tinyllama_jax.planning.compile import require_plugin
    from tinyllama_jax.planning.measured import compare_with

    if not _GPUS.value:
        known = ", ".join(GPUS)
        raise ValueError(f"no --gpus: name a card and how many, as a100-40g:2x8; known: {known}")
    if _NETWORK.value <= 0 or _PRICE.value < 0:
        raise ValueError(
            f"--network={_NETWORK.value:g} must be above 0, and --price={_PRICE.value:g} not below"
        )
    cluster = parse_gpus(_GPUS.value)
    require_plugin()
    config = freeze(_CONFIG.value)
    shape = shape_of(config.mesh, cluster.size)
    plan = _plan(config, cluster, shape, "")
    compared = compare_with(RESULTS)
    print(report.text(plan, _PRICE.value, compared), flush=True)
    tried = [plan]
    if _SEARCH.value or not plan.fits:
        print("\ntrying other settings:", flush=True)
        tried += _search(config, cluster, shape)
        print(report.table(tried))
    if _HTML.value:
        pathlib.Path(_HTML.value).write_text(report.page(plan, tried, _PRICE.value, compared))
        print(f"\nwritten to {_HTML.value}")
    best = report.ranked(tried)[0]
    if best.fits:
        chosen = plan if plan.fits else best
        change = f" {chosen.change}" if chosen.change else ""
        memory = f"{report.MORE_MEMORY} " if report.needs_more_memory(chosen) else ""
        arguments = f"{door.settings_given()}{change}"
        start = "python -m tinyllama_jax.train"
        if cluster.hosts > 1:
            start = "launch/multi_node.sh HOSTS"
        print(f"\nnext: {memory}{start} {arguments}")
    else:
        print("\nnone of them fits: plan more GPUs, or others")


def _plan(config: Config, cluster, shape: tuple[int, int, int], change: str):
    from tinyllama_jax.config_rules import validate
    from tinyllama_jax.planning.compile import compile_step
    from tinyllama_jax.planning.estimate import estimate
    from tinyllama_jax.planning.report import Plan

    validate(config, device_count=shape[0] * shape[1])
    compiled = compile_step(config, cluster, shape)
    times = estimate(config, cluster, shape, compiled.collectives, _NETWORK.value * 1e9)
    return Plan(config, cluster, shape, compiled, times, change)


def _search(config: Config, cluster, shape: tuple[int, int, int]) -> list:
    """Plans with other settings that compute the same run, with fewer rows until one fits."""
    from tinyllama_jax.parallel.mesh import AXES

    tried: list = []
    seen: set = set()
    rows = config.training.micro_batch_size
    data, fsdp, tensor = shape

    def attempt(shape: tuple[int, int, int] = shape, rows: int = rows, **model) -> None:
        model = {
            name: value for name, value in model.items() if value != getattr(config.model, name)
        }
        change = [f"--config.model.{name}={value}" for name, value in model.items()]
        if rows != config.training.micro_batch_size:
            change.append(f"--config.training.micro_batch_size={rows}")
        if shape != (data, fsdp, tensor):
            change += [f"--config.mesh.{a}={n}" for a, n in zip(AXES, shape, strict=True)]
        if not change or tuple(change) in seen:
            return
        seen.add(tuple(change))
        other = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **model),
            training=dataclasses.replace(config.training, micro_batch_size=rows),
        )
        try:
            tried.append(_plan(other, cluster, shape, " ".join(change)))
        except ValueError as error:  # a mesh or batch that does not divide
            print(f"  {' '.join(change)}: {str(error).splitlines()[-1].strip()}", flush=True)

    for remat, unroll in _REMATS:
        attempt(remat=remat, scan_unroll=unroll)
    attempt(rows=2 * rows)
    if rows > 1:
        attempt(rows=rows // 2, remat="none", scan_unroll=0)
        attempt(rows=rows // 2, remat="dots", scan_unroll=0)
    shapes = []
    if cluster.gpus_per_host % tensor == 0:  # parts within a machine, copies over machines
        shapes.append((cluster.hosts, cluster.gpus_per_host // tensor, tensor))
    if fsdp % 2 == 0:
        shapes += [(2 * data, fsdp // 2, tensor), (data, fsdp // 2, 2 * tensor)]
    for other in dict.fromkeys(shapes):
        attempt(other)
    while rows > 1 and not any(plan.fits for plan in tried):
        rows //= 2
        for remat, unroll in _REMATS:
            attempt(rows=rows, remat=remat, scan_unroll=unroll)
    return tried


if __name__ == "__main__":
    door.run_with_flags(main)
