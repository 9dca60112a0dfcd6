"""Tokenizes the text of a config: python -m tinyllama_jax.prepare --config=configs/quickstart.py

Training does this by itself where it was not done; for a large corpus it is a job of its own, on a
machine with many cores and no accelerator. Started again after it was killed, it continues.
"""

from __future__ import annotations

import pathlib

from absl import flags
from ml_collections import config_flags

from tinyllama_jax import door
from tinyllama_jax.config import freeze
from tinyllama_jax.config_rules import validate
from tinyllama_jax.data.pages import read_manifest
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.text.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"{argv[1:]} are not flags; settings are given as --config.SETTING=VALUE")
    config = freeze(_CONFIG.value)
    validate(config, tokenizer_vocab_size=Tokenizer(config.data.tokenizer).vocab_size)
    _print_table(prepare_sources(config.data, workers=_WORKERS.value))
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
