"""The loop that every kind of training runs in."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import jax

from tinyllama_jax.config import Config
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.kernels.attention import api as attention
from tinyllama_jax.model.llama import Llama, Params
from tinyllama_jax.parallel import distributed, rules
from tinyllama_jax.progress import Progress
from tinyllama_jax.runs.checkpoint import Checkpointer
from tinyllama_jax.runs.directory import keep_skip
from tinyllama_jax.runs.lock import RunLock
from tinyllama_jax.runs.metrics import MetricsWriter, NoMetrics
from tinyllama_jax.training.corruption import make_checks
from tinyllama_jax.training.losses import LossFunction
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.preemption import Preempted, Preemption
from tinyllama_jax.training.step import (
    Metrics,
    TrainState,
    init_state,
    make_train_step,
)
from tinyllama_jax.training.timing import StepTimer
from tinyllama_jax.training.validation import Interrupted, ValidationData, describe, make_validation
from tinyllama_jax.training.watchdog import Watchdog

# Names a file that a launcher wants to see once --resume=STEP has been obeyed: it then starts again
# without it, which would rewind the run each time.
REWOUND = "TINYLLAMA_REWOUND"

Writer = MetricsWriter | NoMetrics


class TrainingData(Protocol):
    """What the loop asks of its data; `data.dataset.TrainingDataset` is the real one."""

    def prefetch(self, start: int, stop: int) -> AbstractContextManager[Iterator[Batch]]: ...

    def fingerprint(self, step: int, *, skip: str) -> str: ...

    def require_same_past(self, step: int, skip: str) -> None: ...

    def batch_number(self, step: int) -> int: ...

    def documents_at(self, step: int) -> Sequence[Sequence[object]]: ...

    def epochs_at(self, step: int) -> Mapping[str, float]: ...


def train(
    config: Config,
    run_dir: Path,
    data: TrainingData,
    validation: Mapping[str, ValidationData],
    loss_fn: LossFunction,
    *,
    resume: str = "auto",
    lock: RunLock | None = None,
    preemption: Preemption | None = None,
) -> TrainState:
    """Trains until the token budget is spent, and returns the last state.

    Under a mesh (`parallel.mesh.in_use`) the state is made, restored and saved in parts. Of several
    processes all call this alike.

    Args:
      config: validated settings.
      run_dir: the run directory, its config.json written or compared by the caller.
      data: the batch of every step.
      validation: what is evaluated, by source.
      loss_fn: what is minimised.
      resume: "auto" (the newest good step, if there is one), "never", or a step's number.
      lock: the caller's hold of run_dir, checked before every save; None where nobody else can
        write there.
      preemption: the caller's, who listens from before anything compiles; None: nobody asks.

    Raises:
      ValueError: a step that cannot be resumed from, a lost lock, or too many steps skipped in a
        row, with the reason.
      OSError: the last step could not be saved.
      Preempted: the process was asked to end, and has saved.
    """
    model = Llama(config.model)
    optimizer = make_optimizer(config.optimizer)
    step_fn = make_train_step(model, loss_fn, optimizer, config)
    reached = preemption.reached if preemption is not None else lambda: False
    watchdog = Watchdog(run_dir, config.watchdog.seconds)
    validate = make_validation(config, model, loss_fn, validation, reached, watchdog)
    total_steps = config.total_steps

    with (
        MetricsWriter(run_dir, tensorboard=config.logging.tensorboard)
        if distributed.is_main()
        else NoMetrics() as writer,
        contextlib.ExitStack() as in_the_end,
        Checkpointer(run_dir, config.checkpoint, config.tokens_at) as checkpoints,
        watchdog,
    ):

        def write_failed_saves() -> None:
            for step, reason in checkpoints.failures():
                writer.write(_at(step, config) | {"save_failed": reason, "time": time.time()})

        in_the_end.callback(write_failed_saves)
        # The fresh state is not made before it is known to be needed: beside the restored one it
        # would double the memory.
        fresh = functools.partial(init_state, model, optimizer, config.training.seed)
        shapes = rules.placed(jax.eval_shape(fresh))
        keep = functools.partial(_keep_skip, run_dir, config.data.skip)
        with watchdog.paused():
            state = _resumed(shapes, resume, checkpoints, writer, data, keep)
            if state is None:
                state = fresh(checkpoints.restore_initial_params(shapes.params))
                keep()
        start = int(state.step)

        def is_evaluated(step: int) -> bool:
            return step in (0, total_steps) or _is_due(step, config.evaluation.every_steps)

        def evaluate(step: int, params: Params, say: Callable[[str], None]) -> bool:
            """Writes the losses on held-out text; False: the process is to end before."""
            try:
                losses = validate(params)
            except Interrupted:
                return False
            if losses:
                epochs = {f"epochs/{name}": n for name, n in data.epochs_at(step).items()}
                writer.write(_at(step, config) | losses | epochs)
                say(f"step {step}: {describe(losses)}")
            return True

        # A start that was asked to end may have left its last step without (or other settings now
        # ask for one there).
        if (
            is_evaluated(start)
            and not distributed.from_main(writer.has_evaluation(start))
            and not evaluate(start, state.params, functools.partial(print, flush=True))
        ):
            raise Preempted(_asked_to_end(start, start))
        if start >= total_steps:
            print(f"step {start} of {total_steps}: the token budget is spent")
            return state

        with (
            data.prefetch(start, total_steps) as batches,
            Progress(total_steps, "steps", initial=start) as progress,
        ):
            chosen = attention.resolve(
                model.compute_dtype, config.model.head_dim, config.data.seq_len,
                config.data.document_mask,
            )  # fmt: skip
            attention_name = config.model.attention.replace("auto", chosen)

            def compiled(state: TrainState, batch: Batch, rows: int) -> jax.stages.Compiled:
                began = time.perf_counter()
                with timer.paused(), watchdog.paused():
                    program = step_fn.lower(state, batch).compile()
                seconds = time.perf_counter() - began
                progress.say(
                    f"compiled the train step of {rows} rows in {seconds:.1f} s, attention: "
                    f"{attention_name}"
                )
                return program

            def finish(step: int, metrics: Metrics) -> None:
                """Waits for a step on the device, and logs it where it is due."""
                jax.block_until_ready(metrics)
                timer.count_step(config.stage_at(step - 1).batch_tokens)
                watchdog.beat()
                progress.advance()
                write_failed_saves()
                if int(metrics["skipped_in_a_row"]) >= config.guard.max_consecutive:
                    raise ValueError(_too_many_skipped(step, metrics, config, data))
                if _is_due(step, config.logging.every_steps) or step in (1, total_steps):
                    record = {name: value.item() for name, value in metrics.items()}
                    del record["skipped_in_a_row"]
                    record |= timer.read()
                    writer.write(_at(step, config) | record)
                    progress.advance(0, _summary(record))

            def save(step: int, state: TrainState) -> None:
                if lock is not None:
                    lock.require_held()
                stall = checkpoints.save(step, state, _metadata(step, data, config))
                timer.count_stall(stall)
                progress.say(f"step {step}: saving held training up for {stall:.2f} s")

            check = make_checks(model, loss_fn, config)
            timer = StepTimer(config)
            in_flight: tuple[int, Metrics] | None = None
            programs: dict[int, jax.stages.Compiled] = {}  # by rows per step, the one in use
            for step in range(start + 1, total_steps + 1):
                rows = config.stage_at(step - 1).batch_rows
                # The readers of the first batch are started for it: no part of a step.
                with timer.waiting_for_data() if programs else timer.paused():
                    batch = rules.place_rows(next(batches), rows)
                if rows not in programs:
                    if in_flight is not None:
                        finish(*in_flight)
                        in_flight = None
                    programs = {rows: compiled(state, batch, rows)}
                if _is_due(step, config.guard.verify_every_steps):
                    with timer.paused(), watchdog.paused():
                        check(step, state.params, batch)
                state, metrics = programs[rows](state, batch)
                # One step is always queued behind the one that runs, so the device never waits
                # for the host, and the host never runs further ahead.
                if in_flight is not None:
                    finish(*in_flight)
                in_flight = (step, metrics)

                last = step == total_steps
                preempted = reached()
                save_due = last or _is_due(step, config.checkpoint.every_steps)
                if preempted or save_due or is_evaluated(step):
                    # Every line up to a step is written before the step can be restored.
                    finish(*in_flight)
                    in_flight = None
                with timer.paused():
                    complete = not is_evaluated(step) or evaluate(step, state.params, progress.say)
                with timer.paused(), watchdog.paused():
                    preempted = not complete or (preempted and not last)
                    if save_due or preempted:
                        save(step, state)
                    if preempted:
                        saved = checkpoints.saved()
                        goes_on = step if saved else max(checkpoints.steps(), default=0)
                        raise Preempted(_asked_to_end(step, goes_on))
        with watchdog.paused():
            saved = checkpoints.saved()
            if not saved:
                checkpoints.save(total_steps, state, _metadata(total_steps, data, config))
                saved = checkpoints.saved()
        if not saved:
            raise OSError(
                f"the last step, {total_steps}, could not be saved in {run_dir}, for the reason "
                "above: make room there and start the same command again; it goes on from step "
                f"{max(checkpoints.steps(), default=0)}"
            )
    return state


def _resumed(
    shapes: TrainState,
    resume: str,
    checkpoints: Checkpointer,
    writer: Writer,
    data: TrainingData,
    keep: Callable[[], None],
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
    skip = restored.metadata.get("data_skip", "")
    data.require_same_past(restored.step, skip)
    saved = restored.metadata.get("data_fingerprint")
    now = data.fingerprint(restored.step, skip=skip)
    if saved is not None and saved != now:
        raise ValueError(
            f"the data after step {restored.step} is not what the run would have seen (fingerprint "
            f"of the next rows {now[:12]}, saved {saved[:12]}): some rows would be read twice and "
            "some never; bring back the prepared corpus that the run started with, or start a new "
            "run in another --workdir"
        )
    with distributed.together():
        if resume != "auto":
            checkpoints.rewind(restored.step)
        writer.rewind(restored.step)
    keep()  # before anybody is told that later starts go on from here, past the same batches
    with distributed.together():
        if distributed.is_main() and resume != "auto" and os.environ.get(REWOUND):
            Path(os.environ[REWOUND]).touch()
    print(f"resumed from step {restored.step}", flush=True)
    return restored.state


def _keep_skip(run_dir: Path, skip: str) -> None:
    with distributed.together():
        if distributed.is_main():
            keep_skip(run_dir, skip)


def _metadata(step: int, data: TrainingData, config: Config) -> dict[str, str]:
    """What a step keeps beside its arrays: which data the run goes on with."""
    skip = config.data.skip
    return {"data_fingerprint": data.fingerprint(step, skip=skip), "data_skip": skip}


def _too_many_skipped(step: int, metrics: Metrics, config: Config, data: TrainingData) -> str:
    rows = data.documents_at(step - 1)
    shown = "".join(f"\n  - {document}" for documents in rows[:4] for document in documents[:3])
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    first = data.batch_number(max(0, step - config.guard.max_consecutive))
    end = data.batch_number(step - 1) + 1
    return (
        f"step {step} is the {config.guard.max_consecutive}th in a row that was skipped (loss "
        f"{loss:.4g}, gradient norm {norm:.4g}; guard.sigmas = {config.guard.sigmas:g}): the run "
        f"no longer learns. Start it again from an earlier step and past these batches with "
        f"--resume=STEP --skip_steps={first}:{end}, or lower the learning rate. Documents of the "
        f"last batch's first rows:{shown}"
    )


def _asked_to_end(step: int, goes_on: int) -> str:
    return (
        f"asked to end at step {step}; start the same command again, and it goes on from step "
        f"{goes_on}"
    )


def _at(step: int, config: Config) -> dict[str, int]:
    return {"step": step, "tokens_seen": config.tokens_at(step)}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _summary(record: Mapping[str, float]) -> str:
    text = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"
    return text + (f", MFU {record['mfu_causal']:.1%}" if "mfu_causal" in record else "")
