"""Pretrains a model: prepares the text where that is quick, trains, and shows what came out.

python -m tinyllama_jax.train --config=configs/quickstart.py [--workdir=RUN] [--resume=auto]
    [--skip_steps=A:B] [--config.SECTION.SETTING=VALUE ...]

Exit codes: 0 the token budget is spent; 75 it was asked to end and has saved, start it again; 76 a
process was lost or hung, start all again; 1 something that starting again does not mend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from tinyllama_jax import door
from tinyllama_jax.config import Config, freeze

if TYPE_CHECKING:
    from tinyllama_jax.training.preemption import Preemption

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The run directory; default: runs/<config name>.")
_RESUME = flags.DEFINE_string(
    "resume", "auto", "auto: from the newest good step, if any; never; or the number of a step."
)

_SKIP_STEPS = flags.DEFINE_string(
    "skip_steps", "", "Batches A up to B - 1 to leave out from now on, as 1200:1250."
)

# Raw text up to this size is prepared on the way, within minutes; more is a job of its own.
_PREPARE_BYTES = 1 << 30


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"{argv[1:]} are not flags; settings are given as --config.SETTING=VALUE")
    import jax

    from tinyllama_jax.parallel import distributed
    from tinyllama_jax.training.preemption import EXIT_CODE, Preempted, Preemption

    config = freeze(_CONFIG.value)
    config_file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    run_dir = pathlib.Path(_WORKDIR.value or f"runs/{config_file.stem}")
    with distributed.in_use(config.watchdog.peer_seconds):
        try:
            with Preemption() as preemption:
                _train(config, run_dir, preemption)
        except Preempted as preempted:
            print(preempted, flush=True)
            sys.exit(EXIT_CODE)
        alone, main_process = jax.process_count() == 1, distributed.is_main()
    if not main_process:
        return
    print(f"\nthe loss curve: {run_dir / 'loss.png'}")
    if alone:  # several processes have let go of their devices
        _show_sample(run_dir)
    print(f'next: python -m tinyllama_jax.generate {run_dir} --prompt "Return the "')


def _train(config: Config, run_dir: pathlib.Path, preemption: Preemption) -> None:
    """Everything between the first look at the settings and the picture of the loss."""
    import jax

    from tinyllama_jax.config_text import joined_skips
    from tinyllama_jax.data.corpus import open_datasets
    from tinyllama_jax.data.prepare import prepare_sources
    from tinyllama_jax.parallel import distributed, mesh, rules
    from tinyllama_jax.runs import curves, directory
    from tinyllama_jax.runs.lock import RunLock
    from tinyllama_jax.text.tokenizer import Tokenizer
    from tinyllama_jax.training import preflight
    from tinyllama_jax.training.loop import train
    from tinyllama_jax.training.losses import NextToken

    with contextlib.ExitStack() as held:
        lock = None
        with distributed.together():
            for finding in preflight.examine_machine() + preflight.examine(config, run_dir):
                if finding.level == "problem":
                    raise ValueError(f"{finding.subject}: {finding.text}")
                if finding.level == "warning":
                    print(f"warning: {finding.subject}: {finding.text}", flush=True)
            tokenizer = Tokenizer(config.data.tokenizer)
            if distributed.is_main():
                run_dir.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(RunLock(run_dir))
                directory.keep_tokenizer(run_dir, tokenizer.model_proto)
                directory.check_same_run(run_dir, _skipping(config, directory.saved_skip(run_dir)))
                directory.record_environment(run_dir)
                prepare_sources(config.data, max_bytes=_PREPARE_BYTES)
        held.enter_context(mesh.in_use(mesh.shape_of(config.mesh, jax.device_count())))
        with distributed.together():
            # What the main process has made is read by all, and what it was told holds for all.
            saved = distributed.from_main(directory.saved_skip(run_dir))
            config = _skipping(config, joined_skips(saved, config.data.skip, _SKIP_STEPS.value))
            if distributed.from_main(repr(config)) != repr(config):
                raise ValueError(
                    "this process was started with other settings than the main one; start all "
                    "with the same command"
                )
            prepared = prepare_sources(config.data, max_bytes=1)
            datasets = open_datasets(config, prepared, tokenizer.sha256, rules.own_rows)
        print(datasets.training.describe(config.total_steps), flush=True)
        loss_fn = NextToken(config, tokenizer.bos_id, tokenizer.eos_id)
        train(
            config, run_dir, datasets.training, datasets.validation, loss_fn,
            resume=_RESUME.value, lock=lock, preemption=preemption,
        )  # fmt: skip
        if distributed.is_main():
            curves.write_loss_picture(run_dir)


def _skipping(config: Config, skip: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, skip=skip))


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
