"""Converts between runs and Hugging Face directories.

python -m tinyllama_jax.convert to-hf RUN --out DIR [--step N] [--dtype bfloat16] [--verify]
python -m tinyllama_jax.convert from-hf DIR --out RUN
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from tinyllama_jax import door


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.convert", description="Converts a model's files."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a run becomes a Hugging Face directory")
    to_hf.add_argument("run", type=pathlib.Path)
    to_hf.add_argument("--out", type=pathlib.Path, required=True, help="the directory to make")
    to_hf.add_argument("--step", type=int, help="default: the newest good one")
    to_hf.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    to_hf.add_argument("--max-shard-size", default="5GB", help="of a weight file")
    to_hf.add_argument("--verify", action="store_true", help="run it with transformers and compare")
    from_hf = commands.add_parser("from-hf", help="a Hugging Face directory becomes a run")
    from_hf.add_argument("source", type=pathlib.Path)
    from_hf.add_argument("--out", type=pathlib.Path, required=True, help="the run to make")
    arguments = parser.parse_args(argv)
    (_to_hf if arguments.command == "to-hf" else _from_hf)(arguments)


def _to_hf(arguments: argparse.Namespace) -> None:
    from tinyllama_jax.conversion import hf, output, shards
    from tinyllama_jax.conversion.load import describe_run, load
    from tinyllama_jax.runs.restore import open_params

    max_shard_bytes = shards.parse_size(arguments.max_shard_size)
    if arguments.verify:
        hf.check_verifiable()
    output.check_free(arguments.out)
    config, tokenizer, ids = describe_run(arguments.run)
    params = open_params(arguments.run, arguments.step)
    with output.fresh_directory(arguments.out) as partial:
        hf.write(
            partial, config.model, params, tokenizer, ids,
            dtype=arguments.dtype, max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
    print(f"step {params.step} of {arguments.run} written to {arguments.out} ({arguments.dtype})")
    if tokenizer is None:
        print("without tokenizer files: the run has no tokenizer")
    if arguments.verify:
        loaded = load(arguments.run, params.step)
        result = hf.verify(arguments.out, config.model, loaded.params, tokenizer)
        print(
            f"transformers {result.transformers}: largest logit difference "
            f"{result.largest_difference:.2e}, {result.relative_difference:.1e} of their standard "
            f"deviation; {result.texts - len(result.wrong_texts)} of {result.texts} texts give the "
            f"same ids"
        )
        if not result.ok:
            raise ValueError(
                f"{arguments.out} does not compute what the run computes (tolerance "
                f"{hf.VERIFY_TOLERANCE:g}; texts with other ids: {list(result.wrong_texts)}); "
                f"do not use it"
            )
    print(f"next: python -m tinyllama_jax.generate {arguments.out}")


def _from_hf(arguments: argparse.Namespace) -> None:
    from tinyllama_jax.conversion import output
    from tinyllama_jax.conversion.load import load, save_run

    output.check_free(arguments.out)
    loaded = load(arguments.source)
    save_run(loaded, arguments.out, origin=str(arguments.source))
    print(f"{arguments.source} written to {arguments.out} as step {loaded.step}")
    if loaded.tokenizer is None:
        print(
            f"without a tokenizer: {arguments.source} has no tokenizer.model; to work with text, "
            f"put the model's SentencePiece file at {arguments.out / 'tokenizer.model'} first"
        )
    print(f"next: python -m tinyllama_jax.generate {arguments.out}")


if __name__ == "__main__":
    door.run(main, sys.argv[1:])
