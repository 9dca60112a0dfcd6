"""Tokenizes the text of a config: python -m tinyllama_jax.prepare --config=configs/quickstart.py

Training does this by itself where it was not done; for a large corpus it is a job of its own, on a
machine with many cores and no accelerator. Started again after it was killed, it continues.

Several machines that share a disk take a part each, --part=0/8 to --part=7/8, and one of them
makes the whole of it with --finish (launch/prepare_slurm.sbatch does both). --runner=beam gives the
work to Apache Beam; what stands after -- are Beam's own flags.
"""

from __future__ import annotations

import functools
import pathlib
import re

from absl import flags
from ml_collections import config_flags

from tinyllama_jax import door
from tinyllama_jax.config import freeze
from tinyllama_jax.config_rules import validate
from tinyllama_jax.data.pages import read_manifest
from tinyllama_jax.data.prepare import Runner, finish_sources, prepare_part, prepare_sources
from tinyllama_jax.data.workers import run_units
from tinyllama_jax.text.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.")
_PART = flags.DEFINE_string("part", "", "K/N: of N machines, do the share of number K, from 0 on.")
_FINISH = flags.DEFINE_boolean("finish", False, "Check what the parts wrote, and end with it.")
_RUNNER = flags.DEFINE_enum("runner", "local", ("local", "beam"), "Who does the work.")


def main(argv: list[str]) -> None:
    beam_flags = argv[1:]
    runner: Runner = run_units
    if _RUNNER.value == "beam":
        from tinyllama_jax.data import beam

        runner = functools.partial(beam.run_units, beam_flags=beam_flags)
    elif beam_flags:
        raise ValueError(
            f"{beam_flags} are not flags; settings are given as --config.SETTING=VALUE"
        )
    config = freeze(_CONFIG.value)
    validate(config, tokenizer_vocab_size=Tokenizer(config.data.tokenizer).vocab_size)
    if _PART.value:
        if _FINISH.value or _RUNNER.value == "beam":
            raise ValueError(
                "--part goes without --finish, which comes when all parts have ended, and without "
                "--runner=beam, which divides the work itself"
            )
        given = re.fullmatch(r"(\d+)/(\d+)", _PART.value)
        if given is None:
            raise ValueError(f'--part="{_PART.value}" is not K/N, as 0/8 for the first of 8')
        part, parts = int(given[1]), int(given[2])
        written = prepare_part(config.data, part, parts, workers=_WORKERS.value)
        print(f"part {part} of {parts} is done ({written} units now); when all are, --finish")
        return
    if _FINISH.value:
        directories = finish_sources(config.data, workers=_WORKERS.value)
    else:
        directories = prepare_sources(config.data, workers=_WORKERS.value, runner=runner)
    _print_table(directories)
    print(f"\nnext: python -m tinyllama_jax.train {door.settings_given()}")


def _print_table(directories: dict[str, pathlib.Path]) -> None:
    width = max(map(len, [*directories, "source"])) + 2
    print(f"\n{'source':<{width}}{'split':<12}{'documents':>12}{'tokens':>18}  directory")
    for name, directory in directories.items():
        for split in ("train", "validation"):
            manifest = read_manifest(directory / split)
            print(
                f"{name:<{width}}{split:<12}{manifest.documents:>12,}{manifest.tokens:>18,}  "
                f"{directory / split}"
            )


if __name__ == "__main__":
    door.run_with_flags(main)
