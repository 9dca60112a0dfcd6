"""The measured results that the repository holds, as the README's tables.

`results/*.json` are files that `bench --json` wrote on real machines; nothing else is printed.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import platform
from importlib import metadata
from typing import Any

from tinyllama_jax.runs.directory import environment

RESULTS = pathlib.Path(__file__).parent / "results"
_KEPT = ("started", "python", "cpus", "backend", "devices", "versions", "git_revision")


def machine() -> dict[str, Any]:
    """What a figure was measured on: device, versions and revision, and nothing private."""
    known = environment()
    found = {name: known[name] for name in _KEPT} | {"processor": _processor()}
    for other in ("torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["versions"][other] = metadata.version(other)
    return found


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = facts.get("flags", "").split()
    vectors = next((f" ({f.upper()})" for f in ("avx512f", "avx2") if f in flags), "")
    return facts.get("model name", platform.machine()) + vectors


def markdown() -> str:
    """A table per result, in the order of the files' names."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if "rows" not in content:  # losses on given tokens: no comparison
            continue
        parts.append(_heading(content) + "\n\n" + _table(content["rows"]) + "\n")
    return "\n".join(parts)


def _heading(content: dict[str, Any]) -> str:
    where = content["machine"]
    kinds = [f"{n} x {kind}" for kind, n in where["devices"].items() if kind != "cpu"]
    device = ", ".join(kinds) or f"{where['cpus']} cores of an {where['processor']}"
    what = {
        "attention": lambda: _sizes(content["shape"]) + f", {content['dtype']}",
        "loss": lambda: _sizes(content["size"]),
        "train": lambda: _sizes(content["size"]) + ", " + _model(content["model"]),
        "decode": lambda: _sizes(content["size"]) + ", " + _model(content["model"]),
        "resume": lambda: _model(content["model"]),
        "data": lambda: _sizes(content["size"]) + ", one core",
    }[content["benchmark"]]()
    return f"`bench {content['benchmark']}` on {device}, jax {where['versions']['jax']}: {what}"


def _sizes(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def _model(model: dict[str, Any]) -> str:
    return f"{model['num_layers']} layers of {model['d_model']}, vocabulary {model['vocab_size']}"


_COLUMNS = {
    "pass": "",
    "contender": "",
    "milliseconds": "ms",
    "tflops": "TFLOP/s",
    "tokens_per_second": "tokens/s",
    "mtokens_per_second": "Mtokens/s",
    "windows_per_second": "windows/s",
    "tokens_per_cpu_second": "tokens per CPU second",
    "mfu_causal": "MFU causal",
    "mfu_palm": "MFU PaLM",
    "share_of_bound": "of the bound",
    "peak_bytes": "peak GiB",
    "bytes": "state",
    "stall_seconds": "held up, s",
    "save_seconds": "sealed after, s",
    "restore_seconds": "restored, s",
    "compile_seconds": "compiled, s",
    "first_step_seconds": "first step, s",
    "ours_is_faster_by": "ours is faster by",
}


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [
        "| " + " | ".join(_COLUMNS[name] for name in columns) + " |",
        "|" + "|".join("---" for _ in columns) + "|",
    ]
    for row in rows:
        cells = (_cell(name, row[name]) if name in row else "" for name in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name == "bytes":
        return f"{value / 1e9:.3f} GB"
    if name == "peak_bytes":
        return "-" if value is None else f"{value / 2**30:.3f}"
    if name in ("mfu_causal", "mfu_palm", "share_of_bound"):
        return f"{value:.1%}"
    if name == "ours_is_faster_by":
        return f"{value:.2f}x"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
