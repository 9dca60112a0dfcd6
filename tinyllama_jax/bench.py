"""Measures this package beside others, on this machine.

python -m tinyllama_jax.bench train [--against hf] [--rounds 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import pathlib

from tinyllama_jax import door


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyllama_jax.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="tokens/s of one optimizer step")
    train.add_argument("--against", choices=["hf"], help="Hugging Face Llama under torch too")
    train.add_argument("--preset", default="", help="a model preset; default: 4 layers of 256")
    train.add_argument("--rows", type=int, default=16, help="sequences a step")
    train.add_argument("--seq-len", type=int, default=256)
    train.add_argument("--rounds", type=int, default=10)
    train.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    _train(parser.parse_args(argv))


def _train(arguments: argparse.Namespace) -> None:
    from tinyllama_jax.benchmarks import train
    from tinyllama_jax.model.presets import PRESETS
    from tinyllama_jax.runs.directory import environment

    if arguments.preset and arguments.preset not in PRESETS:
        raise ValueError(f'--preset "{arguments.preset}" is not one of {", ".join(PRESETS)}')
    model = PRESETS[arguments.preset] if arguments.preset else train.SMALL
    result = train.compare(
        model,
        rows=arguments.rows,
        seq_len=arguments.seq_len,
        rounds=arguments.rounds,
        against_torch=arguments.against == "hf",
    )
    print(f"one optimizer step of {arguments.rows} x {arguments.seq_len} tokens, {model}\n")
    print(f"{'':<16}{'tokens/s':>10}{'least':>10}{'most':>10}   ours is faster by")
    for row in result.rows():
        print(
            f"{row['contender']:<16}{row['tokens_per_second']:>10,.0f}{row['least']:>10,.0f}"
            f"{row['most']:>10,.0f}   {row['ours_is_faster_by']:.2f}x"
        )
    if arguments.json:
        figures = {"environment": environment(), "rows": result.rows()}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"\nwritten to {arguments.json}")


if __name__ == "__main__":
    door.run(main)
