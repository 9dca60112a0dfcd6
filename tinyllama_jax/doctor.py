"""Looks at this machine and at a run's settings before anything compiles; or at what a run did.

python -m tinyllama_jax.doctor [--config=configs/quickstart.py] [--workdir=RUN]
    [--config.SECTION.SETTING=VALUE ...]
python -m tinyllama_jax.doctor RUN
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from tinyllama_jax import door
from tinyllama_jax.config import freeze
from tinyllama_jax.findings import show

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", "runs", "Where the run directory will be.")


def main(argv: list[str]) -> None:
    from tinyllama_jax.runs.directory import resolve_run
    from tinyllama_jax.training import diagnosis, preflight

    if len(argv) > 2:
        raise ValueError(f"{argv[1:]}: one run directory at a time")
    if len(argv) == 2:
        run_dir = resolve_run(argv[1])
        findings = diagnosis.examine_run(run_dir)
    else:
        findings = preflight.examine_machine()
        if _CONFIG.value is not None:
            findings += preflight.examine(freeze(_CONFIG.value), pathlib.Path(_WORKDIR.value))
    if show(findings):
        sys.exit(1)
    if len(argv) == 2:
        print(f"next: python -m tinyllama_jax.plot {run_dir}")
        return
    settings = "--config=configs/quickstart.py"
    if _CONFIG.value is not None:
        settings = door.settings_given()
    print(f"next: python -m tinyllama_jax.train {settings}")


if __name__ == "__main__":
    door.run_with_flags(main, needs_config=False)
