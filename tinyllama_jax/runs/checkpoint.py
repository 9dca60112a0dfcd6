"""Checkpoints of a run: saved in the background, sealed, kept by a rule, restored verified.

Orbax writes and reads the arrays and is imported here and in `restore` alone. Sealing, choosing and
deleting steps are ours: Orbax restores a flipped bit without a word and takes an empty directory
for the latest step.

A save is written under `<step>.unsealed-<n>`, sealed there and then renamed to `<step>`, so that a
kill at any moment leaves every earlier step as it was. Params and everything else (`training`) are
separate parts of a step: generation and conversion read the params alone.

Of several processes each writes and reads its own parts of the arrays; the main one makes room,
chooses, verifies files, seals and deletes. All must call `save`, `restore` and `saved` alike.
"""

from __future__ import annotations

import itertools
import json
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.parallel import distributed
from tinyllama_jax.runs import integrity, parts, steps
from tinyllama_jax.runs.parts import PyTree
from tinyllama_jax.runs.restore import CHECKPOINTS, first_line, newest_good, read_parts, say

METADATA = "metadata.json"
_ASK_SECONDS = 1.0
_NONE_SAVED = "no step is saved yet"
_saves = itertools.count()  # all processes come to the same ones in the same order

# Orbax logs a traceback per thread of a failed save; `_report_failure` says the same in one line.
logging.getLogger("absl").addFilter(
    lambda record: "_SignalingThread.run() raised an exception" not in str(record.msg)
)


class PeerFailed(OSError):
    """Another process could not write its part."""


class Restored(NamedTuple):
    step: int
    state: PyTree
    metadata: dict[str, Any]


class Checkpointer:
    """Saves and restores the state of one run; the caller holds the run's lock.

    Args:
      run_dir: the run directory.
      settings: how many steps are kept.
      tokens_at: the tokens that so many steps see; needed where there are milestones.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        tokens_at: Callable[[int], int] | None = None,
    ):
        assert tokens_at or not settings.milestone_tokens, settings
        self._directory = Path(run_dir).resolve() / CHECKPOINTS
        self._settings = settings
        self._tokens_at = tokens_at
        self._sealing: threading.Thread | None = None
        self._failed = False
        self._failures: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._failure = ""  # what processes tell each other of where the save under way fails
        self._step_bytes = 0
        if distributed.is_main():
            steps.undo_interrupted_replacement(self._directory)

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> float:
        """Starts to save a state, and returns the seconds the caller was held up.

        The state may be donated as soon as this returns. A failure (full disk, no permission) is
        printed and never raised: the older steps stay, and the next save tries again. Steps beyond
        `step`, left where a newer one was damaged, are removed once this one is sealed.

        Args:
          step: optimizer steps done; a saved step of this number is replaced.
          state: arrays; `params` is its attribute or key.
          metadata: JSON, stored beside the arrays.
        """
        began = time.perf_counter()
        metadata_text = json.dumps(metadata, indent=1) + "\n"  # now, as the caller may change it
        self.wait()
        self._failed = False
        attempt = next(_saves)
        self._failure = f"save {attempt} failed"
        unsealed = steps.unsealed_path(self._directory, step, attempt)
        try:
            with distributed.together():
                if distributed.is_main():
                    self._directory.mkdir(parents=True, exist_ok=True)
                    steps.remove_transient(self._directory)
                    _try_to_write(unsealed)
            params, training = parts.split_state(state)
            arrays = parts.named_leaves(params, "params") | training
            self._step_bytes = sum(array.nbytes for array in arrays.values())
            prints = integrity.fingerprints(arrays)
            descriptions = {name: parts.abstract_array(array) for name, array in arrays.items()}
            with distributed.together(), _orbax_context():
                writing = ocp.save_checkpointables_async(
                    unsealed,
                    {"params": params, "training": training},
                )
        except Exception as error:  # whatever it is, training is worth more than this save
            if jax.process_count() > 1 and not isinstance(error, (ValueError, OSError)):
                raise  # a process is lost, or this one alone knows of it
            self._report_failure(step, error)
            return time.perf_counter() - began

        def finish() -> None:
            try:
                self._wait_for_all(writing)
                if not distributed.is_main():
                    return
                described = integrity.describe(descriptions, jax.device_get(prints))
                _seal_and_publish(unsealed, step, described, metadata_text)
                self._remove_old(step)
            except Exception as error:
                if not isinstance(error, PeerFailed):
                    distributed.tell(self._failure, first_line(error))  # at once: they wait
                self._report_failure(step, error)

        # Not a daemon: a program that ends without close() still finishes its last save.
        self._sealing = threading.Thread(target=finish, name=f"seal step {step}")
        self._sealing.start()
        return time.perf_counter() - began

    def restore(self, abstract_state: PyTree, step: int | None = None) -> Restored | None:
        """Restores a sealed step and verifies every file and every array of it.

        Args:
          abstract_state: a state, or its `ShapeDtypeStruct`s; shardings are taken from it.
          step: the step to restore; None: the newest good one.

        Returns:
          The step, or None if nothing was ever saved. Steps that are passed over are printed with
          the reason.

        Raises:
          ValueError: the named step is missing or damaged; or steps exist and all are damaged; or
            a step holds other arrays than `abstract_state`.
        """
        self.wait()

        def read(directory: Path, content: dict[str, Any]) -> Restored:
            params, training = parts.split_state(abstract_state)
            expected = parts.named_leaves(params, "params") | training
            parts.require_same_arrays(directory, content, expected)
            found = read_parts(
                directory, content, {"params": params, "training": training}, on_device=True
            )
            return Restored(
                int(directory.name),
                parts.join_state(abstract_state, found["params"], found["training"]),
                json.loads((directory / METADATA).read_bytes()),
            )

        return newest_good(self._directory, step, read, needs="training")

    def rewind(self, step: int) -> None:
        """Takes the steps beyond `step` out of the run, so that no later start finds them.

        The next save deletes them; until then they lie beside the others as `<step>.superseded`.
        """
        if distributed.is_main() and (beyond := steps.supersede(self._directory, step)):
            say(
                f"steps {beyond} lie beyond step {step}; they are kept as STEP.superseded until "
                "the next save: copy them now if you want to keep them"
            )

    def restore_initial_params(self, abstract_params: PyTree) -> PyTree | None:
        """The params that `save_params` put into the run, or None; raises as `restore` does."""

        def read(directory: Path, content: dict[str, Any]) -> PyTree:
            expected = parts.named_leaves(abstract_params, "params")
            parts.require_same_arrays(directory, content, expected)
            return read_parts(directory, content, {"params": abstract_params}, on_device=True)[
                "params"
            ]

        if 0 not in distributed.from_main(steps.sealed_steps(self._directory)):
            return None
        return newest_good(self._directory, 0, read)

    def steps(self) -> list[int]:
        """The sealed steps, ascending."""
        return steps.sealed_steps(self._directory)

    def wait(self) -> bool:
        """Waits until the last save is sealed; False if it failed."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        return not self._failed

    def saved(self) -> bool:
        """As `wait`, for all processes: whether the last save of each succeeded."""
        try:
            with distributed.together():
                if not self.wait():
                    raise ValueError
        except ValueError:
            return False
        return True

    def failures(self) -> list[tuple[int, str]]:
        """The steps that could not be saved, with the reason: of main, those not given before."""
        return [self._failures.get() for _ in range(self._failures.qsize())]

    def close(self) -> None:
        self.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _remove_old(self, newest: int) -> None:
        """Deletes what the rule does not keep; called only when `newest` is sealed."""
        sealed = self.steps()
        keep = steps.steps_to_keep(
            [step for step in sealed if step <= newest],
            self._settings.keep_last,
            self._settings.milestone_tokens,
            self._tokens_at,
        )
        for step in sealed:
            params_only = not (self._directory / str(step) / "training").is_dir()
            if step not in keep and not params_only:
                steps.remove(self._directory / str(step))

    def _wait_for_all(self, writing: ocp.AsyncResponse[None]) -> None:
        """Waits until all processes have written their parts; raises where one could not.

        Orbax would wait for that one for 20 minutes, and training with it.
        """
        if jax.process_count() == 1:
            return writing.result()
        # Asked for the result of a failed write, Orbax first waits for all that is left of it.
        future = writing._thread_runner._future  # type: ignore[attr-defined]
        while True:
            began = time.monotonic()
            try:
                error = future.exception(timeout=_ASK_SECONDS)
                break
            except TimeoutError:
                if time.monotonic() - began < _ASK_SECONDS:
                    raise
                if others := distributed.told(self._failure):
                    number, text = next(iter(others.items()))
                    raise PeerFailed(f"process {number} could not write its part: {text}") from None
        if error is not None:
            raise error
        writing.result()

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failed = True
        if not distributed.is_main():
            say(f"step {step} could not be saved: {first_line(error)}", by_all=True)
            return
        self._failures.put((step, first_line(error)))
        if jax.process_count() > 1:
            # One whose files go before it has asked would tell of that instead of the reason. What
            # it still writes comes into being again, and goes with the next save.
            time.sleep(2 * _ASK_SECONDS)
        try:
            steps.remove_transient(self._directory)
            free = f"{shutil.disk_usage(self._directory.parent).free / 1e9:.3f} GB are free there"
        except OSError as also:
            free = f"and cleaning up failed too: {also}"
        try:
            good = self.steps()
            newest = f"step {good[-1]} is the newest to resume from" if good else _NONE_SAVED
        except OSError as also:
            newest = f"which steps there are cannot be seen ({also})"
        say(
            f"step {step} could not be saved: {first_line(error)}; training goes on, and {newest}. "
            f"Make {self._directory} writable with room for a step "
            f"({self._step_bytes / 1e9:.3f} GB; {free}); the next save tries again"
        )


def save_params(run_dir: Path, params: PyTree, metadata: dict[str, Any]) -> None:
    """Makes params that were trained elsewhere the step 0 of a run, sealed.

    `restore_params` reads them, and training starts from them
    (`Checkpointer.restore_initial_params`). The step is never deleted by a later save.

    Args:
      run_dir: the run directory; it must hold no checkpoint yet.
      params: a nested dict of arrays, numpy or jax.
      metadata: JSON, where the params come from.

    Raises:
      ValueError: the run has checkpoints.
      OSError: they cannot be written.
    """
    directory = Path(run_dir).resolve() / CHECKPOINTS
    if present := steps.sealed_steps(directory):
        raise ValueError(
            f"{directory} already holds the steps {present}, which these params do not belong to; "
            "name a new run directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    steps.remove_transient(directory)
    unsealed = steps.unsealed_path(directory, 0, next(_saves))
    arrays = parts.named_leaves(params, "params")
    described = integrity.describe(arrays, jax.device_get(integrity.fingerprints(arrays)))
    with _orbax_context():
        ocp.save_checkpointables(unsealed, {"params": params})
    _seal_and_publish(unsealed, 0, described, json.dumps(metadata, indent=1) + "\n")


def _orbax_context() -> ocp.Context:
    context = ocp.Context()
    # zstd takes 8% off float32 weights and makes a save many times slower.
    context.array.saving.use_compression = False
    # Where a directory cannot be made, Orbax's background threads would wait for it for 20 minutes.
    context.async_options.create_directories_asynchronously = False
    return context


def _try_to_write(unsealed: Path) -> None:
    """Raises OSError where the disk takes nothing.

    In Orbax's own attempt the other processes would wait five minutes for one that fails there.
    """
    probe = unsealed.with_name(f"{unsealed.name}.probe")
    try:
        for part in ("params", "training"):
            (probe / part).mkdir(parents=True)
            (probe / part / METADATA).write_bytes(bytes(4096))
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _seal_and_publish(
    unsealed: Path, step: int, described: Mapping[str, Any], metadata: str
) -> None:
    (unsealed / METADATA).write_text(metadata)
    integrity.seal(unsealed, step, described)
    steps.publish(unsealed, step)
