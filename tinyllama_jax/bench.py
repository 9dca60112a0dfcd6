"""Measures this package beside others, on this machine.

python -m tinyllama_jax.bench attention|loss|train|decode [--against hf|torch] [--json FILE]
python -m tinyllama_jax.bench resume [--preset NAME] [--directory DIR] [--json FILE]
python -m tinyllama_jax.bench data [--path TEXT] [--tokenizer MODEL] [--json FILE]
python -m tinyllama_jax.bench report      what was measured so far, as the README has it
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from tinyllama_jax import door


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyllama_jax.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    attention = commands.add_parser("attention", help="causal attention, forward and backward")
    _add_batch(attention)
    attention.add_argument("--heads", default="", help="query x key/value x width, as 32x4x64")
    attention.add_argument("--dtype", default="", choices=["float32", "bfloat16", "float16"])
    attention.add_argument("--against", choices=["torch"], help="torch's SDPA too")

    loss = commands.add_parser("loss", help="output layer and cross-entropy with gradients")
    _add_batch(loss)
    loss.add_argument("--d-model", type=int, default=0)
    loss.add_argument("--vocab-size", type=int, default=0)
    loss.add_argument("--dtype", default="", choices=["float32", "bfloat16"])
    loss.add_argument("--chunk-tokens", type=int, default=0, help="default: as training does")
    loss.add_argument("--against", choices=["torch"], help="torch's cross-entropy too")

    train = commands.add_parser("train", help="tokens/s of one optimizer step")
    _add_batch(train)
    _add_model(train)
    train.add_argument("--against", choices=["hf"], help="Hugging Face Llama under torch too")
    train.add_argument("--tokens", type=pathlib.Path, help="a .npy of ids: print real losses")
    train.add_argument("--steps", type=int, default=50, help="of --tokens")
    train.add_argument("--learning-rate", type=float, default=4e-4, help="of --tokens")

    decode = commands.add_parser("decode", help="tokens/s of greedy decoding")
    _add_model(decode)
    decode.add_argument("--rows", type=int, default=1)
    decode.add_argument("--prompt-tokens", type=int, default=32)
    decode.add_argument("--new-tokens", type=int, default=64)
    decode.add_argument("--against", choices=["hf"], help="Hugging Face's generate too")

    resume = commands.add_parser("resume", help="seconds to save, restore and take the first step")
    _add_model(resume)
    resume.add_argument("--directory", type=pathlib.Path, help="where to write; default: temporary")

    data = commands.add_parser("data", help="Mtokens/s of preparing, windows/s of loading")
    data.add_argument("--path", default="", help="text; default: the embedded corpus")
    data.add_argument("--format", default="auto", help="data.sources.*.format")
    data.add_argument("--text-key", default="text", help="data.sources.*.text_key")
    data.add_argument("--tokenizer", default="", help="a .model file; default: the shipped one")
    data.add_argument("--seq-len", type=int, default=2048)
    data.add_argument("--directory", type=pathlib.Path, help="where to write; default: temporary")

    commands.add_parser("report", help="the measured results in the repository, in Markdown")
    for command in (attention, loss, train, decode, resume, data):
        command.add_argument("--rounds", type=int, default=3 if command is resume else 10)
        command.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    arguments = parser.parse_args(argv)
    if arguments.command == "report":
        from tinyllama_jax.benchmarks import report

        print(report.markdown(), end="")
        return
    what = {"attention": _attention, "loss": _loss, "train": _train, "decode": _decode,
            "resume": _resume, "data": _data}  # fmt: skip
    _check(arguments)
    if getattr(arguments, "against", None):
        # torch needs memory of the same device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from tinyllama_jax.benchmarks.torch_llama import require_torch

        require_torch(arguments.against)
    figures = what[arguments.command](arguments)
    for name, reason in figures.get("absent", {}).items():
        print(f"{name} is absent: {reason}")
    if arguments.json:
        _write(arguments, figures)


def _check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for numbers that measure nothing, and a file that cannot be written."""
    at_least_one = {"rounds", "steps", "new_tokens", "prompt_tokens"}
    for name, value in vars(arguments).items():
        least = 1 if name in at_least_one or (arguments.command, name) == ("decode", "rows") else 0
        if isinstance(value, int) and value < least:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least {least}")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise ValueError(f"--json={arguments.json}: there is no such folder; make it first")


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=0, help="default: 8 on a GPU")
    parser.add_argument("--seq-len", type=int, default=0, help="default: 2048 on a GPU")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="", help="a model; default: 4 layers of 256")
    parser.add_argument("--attention", default="", help="model.attention")
    parser.add_argument("--remat", default="", help="model.remat")
    parser.add_argument("--scan-unroll", type=int, help="model.scan_unroll")


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _attention(arguments: argparse.Namespace) -> dict[str, Any]:
    from tinyllama_jax.benchmarks import attention

    gpu = _on_gpu()
    text = arguments.heads or ("32x4x64" if gpu else "8x2x32")
    heads = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(heads) != 3 or not all(heads) or heads[0] % heads[1]:
        raise ValueError(f'--heads "{text}" is not query x key/value heads x width, as 32x4x64')
    shape = attention.Shape(
        arguments.rows or 8, arguments.seq_len or (2048 if gpu else 256), *heads
    )
    dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
    rows, absent = attention.compare(
        shape, dtype, rounds=arguments.rounds, calls=10 if gpu else 2,
        against_torch=arguments.against == "torch",
    )  # fmt: skip
    print(f"causal attention, {shape}, {dtype}")
    for which in dict.fromkeys(row["pass"] for row in rows):
        print(
            f"\n{which:<24}{'ms':>9}{'least':>9}{'most':>9}{'TFLOP/s':>9}{'peak GiB':>10}   "
            f"ours is faster by"
        )
        for row in rows:
            if row["pass"] == which:
                print(
                    f"{row['contender']:<24}{row['milliseconds']:>9.3f}{row['least']:>9.3f}"
                    f"{row['most']:>9.3f}{row['tflops']:>9.2f}{_gibibytes(row['peak_bytes'])}   "
                    f"{row['ours_is_faster_by']:.2f}x"
                )
    return {"shape": shape._asdict(), "dtype": dtype, "rows": rows, "absent": absent}


def _loss(arguments: argparse.Namespace) -> dict[str, Any]:
    from tinyllama_jax.benchmarks import loss
    from tinyllama_jax.kernels.cross_entropy import default_chunk_tokens

    gpu = _on_gpu()
    size: dict[str, Any] = {
        "rows": arguments.rows or 8,
        "seq_len": arguments.seq_len or (2048 if gpu else 256),
        "d_model": arguments.d_model or (2048 if gpu else 256),
        "vocab_size": arguments.vocab_size or (32000 if gpu else 4096),
        "dtype": arguments.dtype or ("bfloat16" if gpu else "float32"),
        "chunk_tokens": arguments.chunk_tokens or default_chunk_tokens(),
    }
    rows, absent = loss.compare(
        **size, rounds=arguments.rounds, calls=5 if gpu else 2,
        against_torch=arguments.against == "torch",
    )  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in size.items()))
    print(f"\n{'':<24}{'ms':>9}{'least':>9}{'most':>9}{'peak GiB':>10}   ours is faster by")
    for row in rows:
        print(
            f"{row['contender']:<24}{row['milliseconds']:>9.2f}{row['least']:>9.2f}"
            f"{row['most']:>9.2f}{_gibibytes(row['peak_bytes'])}   {row['ours_is_faster_by']:.2f}x"
        )
    return {"size": size, "rows": rows, "absent": absent}


def _model(arguments: argparse.Namespace):
    from tinyllama_jax.benchmarks import train
    from tinyllama_jax.model.presets import PRESETS

    if arguments.preset and arguments.preset not in PRESETS:
        raise ValueError(f'--preset "{arguments.preset}" is not one of {", ".join(PRESETS)}')
    model = PRESETS[arguments.preset] if arguments.preset else train.SMALL
    given = {"attention": arguments.attention, "remat": arguments.remat}
    model = dataclasses.replace(model, **{name: value for name, value in given.items() if value})
    if arguments.scan_unroll is not None:
        model = dataclasses.replace(model, scan_unroll=arguments.scan_unroll)
    return model


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    from tinyllama_jax.benchmarks import train

    model, gpu = _model(arguments), _on_gpu()
    size: dict[str, Any] = {
        "rows": arguments.rows or (8 if gpu else 16),
        "seq_len": arguments.seq_len or (2048 if gpu else 256),
    }
    if arguments.tokens:
        return _real_losses(arguments, model, size)
    result = train.compare(
        model, **size, rounds=arguments.rounds, against_torch=arguments.against == "hf"
    )
    print(f"one optimizer step of {size['rows']} x {size['seq_len']} tokens, {model}\n")
    rows = result.rows()
    mfu = "mfu_causal" in rows[0]
    more = f"{'MFU causal':>12}{'PaLM':>8}" if mfu else ""
    more += f"{'peak GiB':>10}"
    print(f"{'':<16}{'tokens/s':>10}{'least':>10}{'most':>10}{more}   ours is faster by")
    for row in rows:
        more = f"{row['mfu_causal']:>12.1%}{row['mfu_palm']:>8.1%}" if mfu else ""
        more += _gibibytes(row["peak_bytes"])
        print(
            f"{row['contender']:<16}{row['tokens_per_second']:>10,.0f}{row['least']:>10,.0f}"
            f"{row['most']:>10,.0f}{more}   {row['ours_is_faster_by']:.2f}x"
        )
    print(
        f"\nours: compiled in {result.compile_seconds:.1f} s, needs "
        f"{result.temporary_bytes / 2**30:.2f} GiB beside its state"
    )
    return {
        "size": size,
        "model": dataclasses.asdict(model),
        "compile_seconds": result.compile_seconds,
        "temporary_bytes": result.temporary_bytes,
        "rows": rows,
        "absent": result.absent,
    }


def _real_losses(arguments: argparse.Namespace, model, size: dict[str, int]) -> dict[str, Any]:
    import numpy as np

    from tinyllama_jax.benchmarks import train

    tokens = np.load(arguments.tokens)
    losses = train.losses_on(
        tokens, model, **size, steps=arguments.steps, learning_rate=arguments.learning_rate
    )
    for number in sorted({*range(0, len(losses), max(1, len(losses) // 10)), len(losses) - 1}):
        print(f"step {number + 1:>6}: loss {losses[number]:.4f}")
    return {"size": size, "model": dataclasses.asdict(model), "losses": losses}


def _decode(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax

    from tinyllama_jax.benchmarks import decode
    from tinyllama_jax.parallel.devices import find_gpu

    model = _model(arguments)
    gpu = find_gpu(jax.local_devices()[0].device_kind)
    bandwidth = gpu.bandwidth if gpu else 0.0
    size: dict[str, Any] = {
        "rows": arguments.rows,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
    }
    rows, absent = decode.compare(
        model, **size, rounds=arguments.rounds, bandwidth=bandwidth,
        against_torch=arguments.against == "hf",
    )  # fmt: skip
    print(f"greedy decoding, {', '.join(f'{name} {n}' for name, n in size.items())}, {model}\n")
    print(f"{'':<16}{'tokens/s':>10}{'least':>10}{'most':>10}{'peak GiB':>10}   ours is faster by")
    for row in rows:
        share = f", {row['share_of_bound']:.0%} of the bound" if "share_of_bound" in row else ""
        print(
            f"{row['contender']:<16}{row['tokens_per_second']:>10,.1f}{row['least']:>10,.1f}"
            f"{row['most']:>10,.1f}{_gibibytes(row['peak_bytes'])}   "
            f"{row['ours_is_faster_by']:.2f}x{share}"
        )
    return {"size": size, "model": dataclasses.asdict(model), "rows": rows, "absent": absent}


def _gibibytes(peak_bytes: int | None) -> str:
    return f"{'-' if peak_bytes is None else format(peak_bytes / 2**30, '.3f'):>10}"


def _resume(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax

    from tinyllama_jax.benchmarks import resume
    from tinyllama_jax.model.llama import parameter_count

    asked = _model(arguments)
    model = resume.fitted(asked)
    if model != asked:
        print(f"{asked.num_layers} layers are not expected to fit into memory here; with fewer")
    rows = resume.measure(model, arguments.directory, rounds=arguments.rounds)
    size = rows[0]["bytes"]
    print(
        f"a state of {size / 1e9:.3f} GB ({parameter_count(model):,} params, "
        f"{model.num_layers} layers) over {jax.device_count()} devices, medians of {len(rows)}\n"
    )
    seconds = {
        name: statistics.median(row[f"{name}_seconds"] for row in rows)
        for name in ("stall", "save", "restore", "compile", "first_step")
    }
    says = {
        "stall": "training is held up by a save",
        "save": f"until it is sealed ({size / 1e9 / seconds['save']:.2f} GB/s)",
        "restore": f"from page cache, and verified ({size / 1e9 / seconds['restore']:.2f} GB/s)",
        "compile": "the step",
        "first_step": f"of {jax.device_count()} rows of 32 tokens",
    }
    for name, value in seconds.items():
        print(f"{name.replace('_', ' '):<12}{value:>8.2f} s  {says[name]}")
    return {"model": dataclasses.asdict(model), "rows": rows}


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    from tinyllama_jax.benchmarks import data
    from tinyllama_jax.config import SourceConfig
    from tinyllama_jax.text.tokenizer import Tokenizer

    source = SourceConfig(name="text", path="text", format="embedded")
    if arguments.path:
        source = SourceConfig(
            name="text", path=arguments.path, format=arguments.format, text_key=arguments.text_key
        )
    encoding, absent = data.encoding(
        source, Tokenizer(arguments.tokenizer), rounds=arguments.rounds
    )
    with contextlib.ExitStack() as stack:
        directory = arguments.directory or pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory())
        )
        loading, found = data.loading(
            source, arguments.tokenizer, directory, seq_len=arguments.seq_len,
            rounds=arguments.rounds,
        )  # fmt: skip
    print(f"\n{'one core':<28}{'Mtokens/s':>12}{'least':>10}{'most':>10}   ours is faster by")
    for row in encoding:
        print(
            f"{row['contender']:<28}{row['mtokens_per_second']:>12.2f}{row['least']:>10.2f}"
            f"{row['most']:>10.2f}   {row['ours_is_faster_by']:.2f}x"
        )
    rate = encoding[0]["mtokens_per_second"] * 1e6
    print(f"at that, 950B tokens take {950e9 / rate / 64 / 3600:.1f} h on 64 cores")
    print(
        f"\n{'shuffled windows':<28}{'windows/s':>12}{'least':>10}{'most':>10}   ours is faster by"
    )
    for row in loading:
        cores = 0.7e6 / row["tokens_per_cpu_second"]
        print(
            f"{row['contender']:<28}{row['windows_per_second']:>12,.0f}{row['least']:>10,.0f}"
            f"{row['most']:>10,.0f}   {row['ours_is_faster_by']:.2f}x, 0.7 Mtokens/s take "
            f"{cores:.3f} cores"
        )
    print(
        f"first batch after {found['first_batch_seconds']:.2f} s, at step {data.RESUMED_STEP:,} "
        f"after {found['resume_seconds']:.2f} s; windows that follow each other correlate by "
        f"{found['adjacent_correlation']:+.4f}"
    )
    size = {"seq_len": arguments.seq_len, "text": arguments.path or "embedded"}
    return {"size": size, "rows": encoding + loading, "absent": absent, **found}


def _write(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    from tinyllama_jax.benchmarks.report import machine

    content = {"benchmark": arguments.command, "machine": machine(), **figures}
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {arguments.json}")


if __name__ == "__main__":
    door.run(main, sys.argv[1:])
