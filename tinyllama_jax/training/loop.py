"""The loop that every kind of training runs in."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import jax

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.kernels.attention import api as attention
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.progress import Progress
from tinyllama_jax.runs.checkpoint import Checkpointer
from tinyllama_jax.runs.lock import RunLock
from tinyllama_jax.runs.metrics import MetricsWriter
from tinyllama_jax.training.losses import LossFunction
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import (
    Metrics,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
)
from tinyllama_jax.training.timing import StepTimer


class TrainingData(Protocol):
    """What the loop asks of its data; `data.dataset.TrainingDataset` is the real one."""

    def batch_at(self, step: int) -> Batch: ...

    def prefetch(self, start: int, stop: int) -> AbstractContextManager[Iterator[Batch]]: ...

    def fingerprint(self, step: int) -> str: ...


class ValidationData(Protocol):
    """What the loop asks of a source's held-out text; `data.dataset.ValidationDataset`."""

    def batches(self, rows: int) -> Iterator[Batch]: ...


def train(
    config: Config,
    run_dir: Path,
    data: TrainingData,
    validation: Mapping[str, ValidationData],
    loss_fn: LossFunction,
    *,
    resume: str = "auto",
    lock: RunLock | None = None,
) -> TrainState:
    """Trains until the token budget is spent, and returns the last state.

    Under a mesh (`parallel.mesh.in_use`) the state is made, restored and saved in parts.

    Args:
      config: validated settings.
      run_dir: the run directory, its config.json written or compared by the caller.
      data: the batch of every step.
      validation: what is evaluated, by source.
      loss_fn: what is minimised.
      resume: "auto" (the newest good step, if there is one), "never", or a step's number.
      lock: the caller's hold of run_dir, checked before every save; None where nobody else can
        write there.

    Raises:
      ValueError: a step that cannot be resumed from, or a lost lock, with the reason.
      OSError: the last step could not be saved.
    """
    model = Llama(config.model)
    optimizer = make_optimizer(config.optimizer)
    step_fn = make_train_step(model, loss_fn, optimizer, config)
    evaluate = _make_evaluation(config, validation, make_eval_step(model, loss_fn))
    total_steps = config.total_steps

    with (
        Checkpointer(
            run_dir, config.checkpoint, config.training.global_batch_tokens
        ) as checkpoints,
        MetricsWriter(run_dir, tensorboard=config.logging.tensorboard) as writer,
    ):
        # The fresh state is not made before it is known to be needed: beside the restored one it
        # would double the memory.
        fresh = functools.partial(init_state, model, optimizer, config.training.seed)
        shapes = rules.placed(jax.eval_shape(fresh))
        state = _resumed(shapes, resume, checkpoints, writer, data)
        if state is None:
            state = fresh(checkpoints.restore_initial_params(shapes.params))
        start = int(state.step)
        if start >= total_steps:
            print(f"step {start} of {total_steps}: the token budget is spent")
            return state

        began = time.perf_counter()
        compiled_step = step_fn.lower(state, rules.place_rows(data.batch_at(start))).compile()
        seconds = time.perf_counter() - began
        chosen = attention.resolve(
            model.compute_dtype, config.model.head_dim, config.data.seq_len,
            config.data.document_mask,
        )  # fmt: skip
        name = config.model.attention.replace("auto", chosen)
        print(f"compiled the train step in {seconds:.1f} s, attention: {name}", flush=True)

        timer = StepTimer(config)
        with (
            data.prefetch(start, total_steps) as batches,
            Progress(total_steps, "steps", initial=start) as progress,
        ):

            def finish(step: int, metrics: Metrics) -> None:
                """Waits for a step on the device, and logs it where it is due."""
                jax.block_until_ready(metrics)
                timer.count_step()
                progress.advance()
                if _is_due(step, config.logging.every_steps) or step in (1, total_steps):
                    record = {name: float(value) for name, value in metrics.items()}
                    record |= timer.read()
                    writer.write(_at(step, config) | record)
                    progress.advance(0, _summary(record))

            if start == 0:
                with timer.paused():
                    evaluate(0, state, writer, progress)

            in_flight: tuple[int, Metrics] | None = None
            for step in range(start + 1, total_steps + 1):
                with timer.waiting_for_data():
                    batch = rules.place_rows(next(batches))
                state, metrics = compiled_step(state, batch)
                # One step is always queued behind the one that runs, so the device never waits
                # for the host, and the host never runs further ahead.
                if in_flight is not None:
                    finish(*in_flight)
                in_flight = (step, metrics)

                last = step == total_steps
                evaluation_due = last or _is_due(step, config.evaluation.every_steps)
                save_due = last or _is_due(step, config.checkpoint.every_steps)
                if evaluation_due or save_due:
                    # Every line up to a step is written before the step can be restored.
                    finish(*in_flight)
                    in_flight = None
                with timer.paused():
                    if evaluation_due:
                        evaluate(step, state, writer, progress)
                    if save_due:
                        if lock is not None:
                            lock.require_held()
                        checkpoints.save(step, state, {"data_fingerprint": data.fingerprint(step)})
        if not checkpoints.wait():
            checkpoints.save(
                total_steps, state, {"data_fingerprint": data.fingerprint(total_steps)}
            )
            if not checkpoints.wait():
                raise OSError(
                    f"the last step, {total_steps}, could not be saved in {run_dir}, for the "
                    "reason above: make room there and start the same command again; it goes on "
                    f"from step {max(checkpoints.steps(), default=0)}"
                )
    return state


def _resumed(
    shapes: TrainState,
    resume: str,
    checkpoints: Checkpointer,
    writer: MetricsWriter,
    data: TrainingData,
) -> TrainState | None:
    """The state that `resume` names, to go on from; None: the run starts."""
    if resume == "never":
        if any(checkpoints.steps()):  # step 0 holds params that the run was given to start from
            raise ValueError(
                f"--resume=never, but the run has checkpoints of {checkpoints.steps()}, which "
                "would be overwritten; name another --workdir, or remove the old run"
            )
        writer.rewind(0)  # of a start that ended before its first save
        return None
    if resume != "auto" and not resume.isdecimal():
        raise ValueError(f'--resume="{resume}" is not auto, never or the number of a step')
    restored = checkpoints.restore(shapes, step=None if resume == "auto" else int(resume))
    if restored is None:
        writer.rewind(0)
        return None
    saved, now = restored.metadata.get("data_fingerprint"), data.fingerprint(restored.step)
    if saved is not None and saved != now:
        raise ValueError(
            f"the data after step {restored.step} is not what the run would have seen (fingerprint "
            f"of the next rows {now[:12]}, saved {saved[:12]}): some rows would be read twice and "
            "some never; bring back the prepared corpus that the run started with, or start a new "
            "run in another --workdir"
        )
    writer.rewind(restored.step)
    print(f"resumed from step {restored.step}", flush=True)
    return restored.state


def _make_evaluation(
    config: Config,
    validation: Mapping[str, ValidationData],
    eval_step: Callable[..., tuple[jax.Array, jax.Array]],
) -> Callable[[int, TrainState, MetricsWriter, Progress], None]:
    """Evaluation of every source, and their mean weighted like the training mixture."""
    weights = {source.name: source.weight for source in config.data.sources}

    def source_loss(state: TrainState, batches: Iterator[Batch]) -> float:
        sums = [eval_step(state.params, rules.place_rows(batch)) for batch in batches]
        losses, counts = jax.device_get(tuple(zip(*sums, strict=True)))
        return math.fsum(losses) / math.fsum(counts)

    def evaluate(step: int, state: TrainState, writer: MetricsWriter, progress: Progress) -> None:
        rows = config.training.micro_batch_size * mesh.parts(mesh.BATCH)
        losses = {
            name: source_loss(state, source.batches(rows)) for name, source in validation.items()
        }
        if not losses:
            return
        share = {name: weights.get(name, 1.0) for name in losses}
        mean = sum(share[n] * loss for n, loss in losses.items()) / sum(share.values())
        record = {f"eval/{name}/loss": loss for name, loss in losses.items()}
        writer.write(_at(step, config) | record | {"eval/loss": mean})
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        progress.say(f"step {step}: validation loss {mean:.4f} ({each})")

    return evaluate


def _at(step: int, config: Config) -> dict[str, int]:
    return {"step": step, "tokens_seen": step * config.training.global_batch_tokens}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _summary(record: Mapping[str, float]) -> str:
    text = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"
    return text + (f", MFU {record['mfu_causal']:.1%}" if "mfu_causal" in record else "")
