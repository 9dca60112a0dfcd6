"""What a run directory says of itself: config.json and environment.json."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from tinyllama_jax.config import NAMED, Config, freeze, to_dict
from tinyllama_jax.durable import write_durably
from tinyllama_jax.runs.metrics import METRICS

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
TOKENIZER = "tokenizer.model"
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tinyllama_jax",
)
_VARIABLE_PREFIXES = ("XLA_", "JAX_", "NCCL_", "CUDA_VISIBLE_DEVICES", "TF_CUDNN", "SLURM_JOB_ID")


def write_config(run_dir: Path, config: Config) -> None:
    """Writes config.json, from which `read_config` makes the same `Config`."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_durably(run_dir / CONFIG, (json.dumps(to_dict(config), indent=2) + "\n").encode())


def read_config(run_dir: Path) -> Config:
    """The settings a run was started with.

    Raises:
      ValueError: `run_dir` is not a run directory, or its config.json is not one of this version.
    """
    path = resolve_run(run_dir) / CONFIG
    try:
        tree = json.loads(path.read_bytes())
        return freeze(tree)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def resolve_run(path: str | Path) -> Path:
    """The run directory that a door was given.

    Raises:
      ValueError: it is none, with what is missing and what it might have meant.
    """
    run_dir = Path(path)
    if not run_dir.exists():
        raise ValueError(f"there is no run directory at {run_dir}; name the --workdir of a run")
    if (run_dir / CONFIG).is_file():
        return run_dir
    for parent in run_dir.resolve().parents:
        if (parent / CONFIG).is_file():
            raise ValueError(
                f"{run_dir} lies within a run directory; give the run directory itself, {parent}, "
                "and choose a step with --step"
            )
    inside = sorted(child.parent.name for child in run_dir.glob(f"*/{CONFIG}"))
    hint = f"; it contains the runs {', '.join(inside)}" if inside else ""
    raise ValueError(
        f"{run_dir} is not a run directory: it has no {CONFIG}, which training writes first{hint}"
    )


def differences(saved: Config, now: Config) -> tuple[list[str], list[str]]:
    """Compares the config of a run with the one that would continue it.

    Returns:
      Two lists of lines "setting: saved -> now": those that change what the run computes, and those
      that a resumed run may change (rounding, cost and reporting only).
    """
    matters: list[str] = []
    harmless: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            name = f"{path}{field.name}"
            if dataclasses.is_dataclass(x):
                walk(x, y, f"{name}.")
            elif field.name in NAMED:
                walk_named({e.name: e for e in x}, {e.name: e for e in y}, name)
            elif x != y:
                embedded = getattr(b, "format", "") == "embedded"  # whose path names its part
                free = field.metadata.get("may_change") and not embedded
                lines = harmless if free else matters
                lines.append(f"{name}: {x!r} -> {y!r}")

    def walk_named(a: dict[str, Any], b: dict[str, Any], path: str) -> None:
        for name in sorted(a.keys() | b.keys()):
            if name in a and name in b:
                walk(a[name], b[name], f"{path}.{name}.")
            else:
                there, here = ("there", "none") if name in a else ("none", "there")
                matters.append(f"{path}.{name}: {there} -> {here}")

    walk(saved, now, "")
    return matters, harmless


def check_same_run(run_dir: Path, config: Config) -> None:
    """Makes a run directory belong to `config`: writes config.json, or compares it.

    Settings that a run may change are printed and overwritten. A run that holds only imported
    params is bound by their model alone: it gets its other settings here. So does a run that has
    logged and saved nothing, since a start that failed (a path misspelt, say) made nothing.

    Raises:
      ValueError: the run was started with settings that compute something else, one line each.
    """
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG).exists() or not _has_begun(run_dir):
        if any((run_dir / "checkpoints").glob("[0-9]*")):
            raise ValueError(
                f"{run_dir} has checkpoints but no {CONFIG}, so nobody can tell what made them; "
                f"put its {CONFIG} back, or name another --workdir"
            )
        write_config(run_dir, config)
        return
    matters, harmless = differences(read_config(run_dir), config)
    imported = _holds_only_imported_params(run_dir)
    if imported:
        matters = [line for line in matters if line.startswith("model.")]
    if matters:
        raise ValueError(
            f"{run_dir} was started with other settings, and going on would make a run that "
            "neither config describes; set these back, or name another --workdir:\n"
            + "\n".join(f"  - {line}" for line in matters)
        )
    if harmless and not imported:
        print(f"settings changed since {run_dir} was started: {'; '.join(harmless)}", flush=True)
    if harmless or imported:
        write_config(run_dir, config)


def keep_skip(run_dir: Path, skip: str) -> None:
    """Makes the batches that a run leaves out part of its config, so that every later start does.

    Where the run has no config (a loop run by hand) there is nothing to keep.
    """
    if not (Path(run_dir) / CONFIG).exists():
        return
    config = read_config(run_dir)
    if config.data.skip != skip:
        data = dataclasses.replace(config.data, skip=skip)
        write_config(run_dir, dataclasses.replace(config, data=data))


def saved_skip(run_dir: Path) -> str:
    """The batches that a run has left out so far; "" before it has begun."""
    run_dir = Path(run_dir)
    has_config = (run_dir / CONFIG).exists()
    return read_config(run_dir).data.skip if has_config and _has_begun(run_dir) else ""


def _has_begun(run_dir: Path) -> bool:
    metrics = run_dir / METRICS
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or any((run_dir / "checkpoints").glob("[0-9]*"))


def keep_tokenizer(run_dir: Path, model_proto: bytes) -> None:
    """Puts the tokenizer that the run's ids mean into the run.

    Raises:
      ValueError: the run has begun with another one.
    """
    path = Path(run_dir) / TOKENIZER
    if _has_begun(run_dir) and path.is_file() and path.read_bytes() != model_proto:
        raise ValueError(
            f"{path} is not the tokenizer that data.tokenizer names now: the model's ids would "
            "mean other text; set data.tokenizer to the former, or name another --workdir"
        )
    write_durably(path, model_proto)


def _holds_only_imported_params(run_dir: Path) -> bool:
    steps = [path for path in run_dir.glob("checkpoints/*") if path.name.isdecimal()]
    return bool(steps) and not any((step / "training").exists() for step in steps)


def record_environment(run_dir: Path) -> None:
    """Appends what this start runs on to environment.json, a list with one entry per start."""
    path = Path(run_dir) / ENVIRONMENT
    try:
        entries = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        entries = []
    entries.append(environment())
    write_durably(path, (json.dumps(entries, indent=2) + "\n").encode())


def environment() -> dict[str, Any]:
    """Versions, devices, flags and command line of this process."""
    devices = jax.devices()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "processes": jax.process_count(),
        "backend": jax.default_backend(),
        "devices": {
            kind: sum(device.device_kind == kind for device in devices)
            for kind in sorted({device.device_kind for device in devices})
        },
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLE_PREFIXES)
        },
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git_revision() -> str:
    """The commit of the package's checkout, with "+" where files differ from it; "" if none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        # Installed, perhaps into an environment inside another project's checkout.
        return os.environ.get("GIT_REVISION", "")

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True,
            timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
