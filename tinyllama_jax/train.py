"""Pretrains a model: prepares the text where that is quick, trains, and shows what came out.

python -m tinyllama_jax.train --config=configs/quickstart.py [--workdir=RUN] [--resume=auto]
    [--config.SECTION.SETTING=VALUE ...]
"""

from __future__ import annotations

import pathlib

from absl import flags
from ml_collections import config_flags

from tinyllama_jax import door
from tinyllama_jax.config import freeze

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The run directory; default: runs/<config name>.")
_RESUME = flags.DEFINE_string(
    "resume", "auto", "auto: from the newest good step, if any; never; or the number of a step."
)

# Raw text up to this size is prepared on the way, within minutes; more is a job of its own.
_PREPARE_BYTES = 1 << 30


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"{argv[1:]} are not flags; settings are given as --config.SETTING=VALUE")
    import jax

    from tinyllama_jax.data.dataset import open_datasets
    from tinyllama_jax.data.prepare import prepare_sources
    from tinyllama_jax.parallel import mesh
    from tinyllama_jax.runs import curves, directory
    from tinyllama_jax.runs.lock import RunLock
    from tinyllama_jax.text.tokenizer import Tokenizer
    from tinyllama_jax.training import preflight
    from tinyllama_jax.training.loop import train
    from tinyllama_jax.training.losses import NextToken

    config = freeze(_CONFIG.value)
    config_file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    run_dir = pathlib.Path(_WORKDIR.value or f"runs/{config_file.stem}")
    for finding in preflight.examine_machine() + preflight.examine(config, run_dir):
        if finding.level == "problem":
            raise ValueError(f"{finding.subject}: {finding.text}")
        if finding.level == "warning":
            print(f"warning: {finding.subject}: {finding.text}", flush=True)
    tokenizer = Tokenizer(config.data.tokenizer)
    run_dir.mkdir(parents=True, exist_ok=True)
    with RunLock(run_dir) as lock:
        directory.keep_tokenizer(run_dir, tokenizer.model_proto)
        directory.check_same_run(run_dir, config)
        directory.record_environment(run_dir)

        prepared = prepare_sources(config.data, max_bytes=_PREPARE_BYTES)
        datasets = open_datasets(config, prepared, tokenizer.sha256)
        print(datasets.training.describe(config.total_steps), flush=True)
        loss_fn = NextToken(config, tokenizer.bos_id, tokenizer.eos_id)
        shape = mesh.shape_of(config.mesh, jax.device_count())
        with mesh.in_use(shape):
            train(
                config, run_dir, datasets.training, datasets.validation, loss_fn,
                resume=_RESUME.value, lock=lock,
            )  # fmt: skip
        curves.write_loss_picture(run_dir)
    print(f"\nthe loss curve: {run_dir / 'loss.png'}")
    _show_sample(run_dir)
    print(f'next: python -m tinyllama_jax.generate {run_dir} --prompt "Return the "')


def _show_sample(run_dir: pathlib.Path) -> None:
    """Draws from what was saved, as `generate` will."""
    from tinyllama_jax.conversion.load import load
    from tinyllama_jax.inference.engine import Engine

    loaded = load(run_dir)
    engine = Engine(loaded.model, loaded.params, loaded.tokenizer, loaded.start_id, loaded.end_ids)
    settings = engine.fitted(loaded.config.sampling)
    try:
        updates = engine.stream([settings.prompt], settings)
    except ValueError as error:  # no reason to call a finished run a failure
        print(f"no sample: {error}")
        return
    print(f"a sample (temperature {settings.temperature:g}):\n\n{settings.prompt}", end="")
    for update in updates:
        print(update.text, end="", flush=True)
    print("\n")


if __name__ == "__main__":
    door.run_with_flags(main)
