"""Checkpoints of a run: saved in the background, sealed, kept by a rule, restored verified.

Orbax writes and reads the arrays and is imported here alone. Sealing, choosing and deleting steps
are ours: Orbax restores a flipped bit without a word and takes an empty directory for the latest
step.

A save is written under `<step>.unsealed`, sealed there and then renamed to `<step>`, so that a kill
at any moment leaves every earlier step as it was. Params and everything else (`training`) are
separate parts of a step: generation and conversion read the params alone.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.runs import integrity, parts, steps
from tinyllama_jax.runs.parts import PyTree

CHECKPOINTS = "checkpoints"
METADATA = "metadata.json"

# Orbax logs a traceback per thread of a failed save; `_report_failure` says the same in one line.
logging.getLogger("absl").addFilter(
    lambda record: "_SignalingThread.run() raised an exception" not in str(record.msg)
)


class Restored(NamedTuple):
    step: int
    state: PyTree
    metadata: dict[str, Any]


class Checkpointer:
    """Saves and restores the state of one run; the caller holds the run's lock.

    Args:
      run_dir: the run directory.
      settings: how many steps are kept.
      tokens_per_step: tokens per optimizer step, for milestones.
    """

    def __init__(self, run_dir: Path, settings: CheckpointConfig, tokens_per_step: int):
        self._directory = Path(run_dir).resolve() / CHECKPOINTS
        self._settings = settings
        self._tokens_per_step = tokens_per_step
        self._sealing: threading.Thread | None = None
        self._failed = False
        self._step_bytes = 0
        steps.undo_interrupted_replacement(self._directory)

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> float:
        """Starts to save a state, and returns the seconds the caller was held up.

        The state may be donated as soon as this returns. A failure (full disk, no permission) is
        printed and never raised: the older steps stay, and the next save tries again. Steps beyond
        `step`, left from before a rewind, are removed once this one is sealed.

        Args:
          step: optimizer steps done; a saved step of this number is replaced.
          state: arrays; `params` is its attribute or key.
          metadata: JSON, stored beside the arrays.
        """
        began = time.perf_counter()
        metadata_text = json.dumps(metadata, indent=1) + "\n"  # now, as the caller may change it
        self.wait()
        self._failed = False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            steps.remove_transient(self._directory)
            params, training = parts.split_state(state)
            arrays = parts.named_leaves(params, "params") | training
            self._step_bytes = sum(array.nbytes for array in arrays.values())
            prints = integrity.fingerprints(arrays)
            descriptions = {name: parts.abstract_array(array) for name, array in arrays.items()}
            with _orbax_context():
                writing = ocp.save_checkpointables_async(
                    steps.unsealed_path(self._directory, step),
                    {"params": params, "training": training},
                )
        except Exception as error:  # whatever it is, training is worth more than this save
            self._report_failure(step, error)
            return time.perf_counter() - began

        def finish() -> None:
            try:
                writing.result()
                described = integrity.describe(descriptions, jax.device_get(prints))
                _seal_and_publish(self._directory, step, described, metadata_text)
                self._remove_old(step)
            except Exception as error:
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
            found = _read(
                directory, content, {"params": params, "training": training}, on_device=True
            )
            return Restored(
                int(directory.name),
                parts.join_state(abstract_state, found["params"], found["training"]),
                json.loads((directory / METADATA).read_bytes()),
            )

        restored = _newest_good(self._directory, step, read, needs="training")
        if restored is not None:
            later = [saved for saved in self.steps() if saved > restored.step]
            if later:
                _say(f"steps {later} lie beyond step {restored.step} and are removed when the next "
                     "step is saved; copy them now if you want to keep them")  # fmt: skip
        return restored

    def restore_initial_params(self, abstract_params: PyTree) -> PyTree | None:
        """The params that `save_params` put into the run, or None; raises as `restore` does."""

        def read(directory: Path, content: dict[str, Any]) -> PyTree:
            expected = parts.named_leaves(abstract_params, "params")
            parts.require_same_arrays(directory, content, expected)
            return _read(directory, content, {"params": abstract_params}, on_device=True)["params"]

        if 0 not in steps.sealed_steps(self._directory):
            return None
        return _newest_good(self._directory, 0, read)

    def steps(self) -> list[int]:
        """The sealed steps, ascending."""
        return steps.sealed_steps(self._directory)

    def wait(self) -> bool:
        """Waits until the last save is sealed; False if it failed."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        return not self._failed

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
            self._tokens_per_step,
        )
        for step in sealed:
            params_only = not (self._directory / str(step) / "training").is_dir()
            if step not in keep and not params_only:
                steps.remove(self._directory / str(step))

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failed = True
        try:
            steps.remove_transient(self._directory)
            free = f"{shutil.disk_usage(self._directory.parent).free / 1e9:.3f} GB are free there"
        except OSError as also:
            free = f"and cleaning up failed too: {also}"
        good = self.steps()
        _say(
            f"step {step} could not be saved: {_first_line(error)}; training goes on, and "
            + (f"step {good[-1]} is the newest to resume from" if good else "no step is saved yet")
            + f". Make {self._directory} writable with room for a step "
            f"({self._step_bytes / 1e9:.3f} GB; {free}); the next save tries again"
        )


class StoredParams(Mapping[str, np.ndarray]):
    """The params of a step by path ("layers/attention/query"), each read when it is asked for.

    The files were verified when the step was chosen; each array is verified when it is read
    (`DamagedError`). Nothing is kept.
    """

    def __init__(self, directory: Path, content: dict[str, Any]):
        self._directory, self._content = directory, content
        self.step = int(directory.name)
        self._abstract = flatten_dict(parts.abstract_params(content), sep="/")

    def __getitem__(self, path: str) -> np.ndarray:
        gc.collect()  # Orbax leaves what it read in a cycle of references
        abstract: dict[str, Any] = dict.fromkeys(self._abstract, ocp.PLACEHOLDER)
        abstract[path] = parts.abstract_numpy(self._abstract[path])
        try:
            found = ocp.load_checkpointables(
                self._directory, {"params": unflatten_dict(abstract, sep="/")}
            )
        except (OSError, ValueError) as error:
            reason = f"{path} cannot be read: {_first_line(error)}"
            if not self._directory.exists():
                reason = f"training removed step {self.step} meanwhile; start again for a newer one"
            raise integrity.DamagedError(reason) from error
        array = flatten_dict(found["params"], sep="/")[path]
        integrity.verify_arrays({f"params/{path}": array}, self._content)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)


def open_params(run_dir: Path, step: int | None = None) -> StoredParams:
    """The params of a run, to be read one by one; arguments and errors as `restore_params`."""

    def open_step(directory: Path, content: dict[str, Any]) -> StoredParams:
        integrity.verify_files(directory, content, parts=["params"])
        return StoredParams(directory, content)

    return _of_run(run_dir, step, open_step)


def restore_params(run_dir: Path, step: int | None = None) -> tuple[int, PyTree]:
    """Reads and verifies the params of a run, without its optimizer state.

    Args:
      run_dir: the run directory.
      step: the step; None: the newest good one.

    Returns:
      The step, and the params as a nested dict of numpy arrays.

    Raises:
      ValueError: there is no such step, or no good one, with the reason.
    """

    def read(directory: Path, content: dict[str, Any]) -> tuple[int, PyTree]:
        params = parts.abstract_params(content)
        return int(directory.name), _read(directory, content, {"params": params})["params"]

    return _of_run(run_dir, step, read)


def _of_run(run_dir: Path, step: int | None, read: Any) -> Any:
    directory = Path(run_dir).resolve() / CHECKPOINTS
    found = _newest_good(directory, step, read)
    if found is None:
        raise ValueError(
            f"{directory} holds no sealed checkpoint, so there are no params to read; train the "
            "run until it has saved a step, or name another run directory"
        )
    return found


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
    arrays = parts.named_leaves(params, "params")
    described = integrity.describe(arrays, jax.device_get(integrity.fingerprints(arrays)))
    with _orbax_context():
        ocp.save_checkpointables(steps.unsealed_path(directory, 0), {"params": params})
    _seal_and_publish(directory, 0, described, json.dumps(metadata, indent=1) + "\n")


def _newest_good(directory: Path, step: int | None, read: Any, needs: str = "params") -> Any:
    """What `read(step directory, seal)` returns for the named step, or for the newest that it can
    read; None if nothing was ever sealed that has the part `needs`."""
    if step is not None:
        path = directory / str(step)
        try:
            if not path.is_dir():
                raise integrity.DamagedError("there is no such step")
            return read(path, integrity.read_seal(path))
        except integrity.DamagedError as error:
            others = [other for other in steps.sealed_steps(directory) if other != step]
            raise ValueError(
                f"step {step} of {directory} cannot be restored: {error}; "
                + (f"name one of the steps {others}" if others else "no other step is sealed")
            ) from error
    reasons = []
    for path in reversed(steps.step_directories(directory)):
        sealed = (path / integrity.SEAL).exists()
        try:
            content = integrity.read_seal(path)
            if any(name.startswith(f"{needs}/") for name in content["files"]):
                return read(path, content)
        except integrity.DamagedError as error:
            if not path.exists():  # deleted by the running training while it was read
                return _newest_good(directory, None, read, needs)
            _say(f"passing over step {path.name}: {error}")
            reasons += [f"step {path.name}: {error}"] if sealed else []
    if reasons:
        raise ValueError(
            f"no checkpoint in {directory} is whole ({'; '.join(reasons)}); starting from the "
            "beginning would hide that: bring a copy back, or remove the directory to start over"
        )
    return None


def _read(
    directory: Path, content: dict[str, Any], abstract: dict[str, PyTree], on_device: bool = False
) -> dict[str, PyTree]:
    """Reads the named parts of a step, verified before and after."""
    began = time.perf_counter()
    size = integrity.verify_files(directory, content, parts=abstract.keys())
    as_leaf = parts.abstract_array if on_device else parts.abstract_numpy
    try:
        found = ocp.load_checkpointables(directory, jax.tree.map(as_leaf, abstract))
    except (OSError, ValueError) as error:
        raise integrity.DamagedError(f"it cannot be read: {_first_line(error)}") from error
    arrays = parts.named_leaves(found["params"], "params") | found.get("training", {})
    integrity.verify_arrays(arrays, content)
    total = sum(array.nbytes for array in arrays.values())
    seconds = time.perf_counter() - began
    _say(
        f"read step {directory.name} of {directory.parent.parent}: {total / 1e9:.3f} GB of arrays "
        f"in {seconds:.2f} s ({total / 1e9 / seconds:.2f} GB/s), {size / 1e9:.3f} GB of files and "
        f"{len(arrays)} arrays verified"
    )
    return found


def _orbax_context() -> ocp.Context:
    context = ocp.Context()
    # zstd takes 8% off float32 weights and makes a save many times slower.
    context.array.saving.use_compression = False
    # Where a directory cannot be made, Orbax's background threads would wait for it for 20 minutes.
    context.async_options.create_directories_asynchronously = False
    return context


def _seal_and_publish(
    directory: Path, step: int, described: Mapping[str, Any], metadata: str
) -> None:
    unsealed = steps.unsealed_path(directory, step)
    (unsealed / METADATA).write_text(metadata)
    integrity.seal(unsealed, step, described)
    steps.publish(directory, step)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
