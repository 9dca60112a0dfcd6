"""Checkpoints of a run: saved in the background, sealed, kept by a rule, restored verified.

Orbax writes and reads the arrays and is imported here alone. Sealing, choosing and deleting steps
are ours: Orbax restores a flipped bit without a word and takes an empty directory for the latest
step.

A save is written under `<step>.unsealed`, sealed there and then renamed to `<step>`, so that a kill
at any moment leaves every earlier step as it was. Params and everything else (`training`) are
separate parts of a step: generation and conversion read the params alone.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.runs import integrity

PyTree = Any

CHECKPOINTS = "checkpoints"
METADATA = "metadata.json"
_TRANSIENT = re.compile(r"\d+\.(unsealed|replaced|removed)")


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
        _undo_interrupted_replacement(self._directory)

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
        self.wait()
        self._failed = False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _remove_transient(self._directory)
            params, training = _parts(state)
            arrays = _named(params, "params") | training
            self._step_bytes = sum(array.nbytes for array in arrays.values())
            prints = integrity.fingerprints(arrays)
            descriptions = {name: _abstract(array) for name, array in arrays.items()}
            with _orbax_context():
                writing = ocp.save_checkpointables_async(
                    _unsealed(self._directory, step), {"params": params, "training": training}
                )
        except Exception as error:  # whatever it is, training is worth more than this save
            self._report_failure(step, error)
            return time.perf_counter() - began

        def finish() -> None:
            try:
                writing.result()
                described = integrity.describe(descriptions, jax.device_get(prints))
                _seal_and_publish(self._directory, step, described, metadata)
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
            params, training = _parts(abstract_state)
            _require_same_arrays(directory, content, _named(params, "params") | training)
            found = _read(
                directory, content, {"params": params, "training": training}, on_device=True
            )
            return Restored(
                int(directory.name),
                _joined(abstract_state, found["params"], found["training"]),
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
            expected = _named(abstract_params, "params")
            _require_same_arrays(directory, content, expected)
            return _read(directory, content, {"params": abstract_params}, on_device=True)["params"]

        if 0 not in _sealed_steps(self._directory):
            return None
        return _newest_good(self._directory, 0, read)

    def steps(self) -> list[int]:
        """The sealed steps, ascending."""
        return _sealed_steps(self._directory)

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
        keep = steps_to_keep(
            [step for step in sealed if step <= newest],
            self._settings.keep_last,
            self._settings.milestone_tokens,
            self._tokens_per_step,
        )
        for step in sealed:
            params_only = not (self._directory / str(step) / "training").is_dir()
            if step not in keep and not params_only:
                _remove(self._directory / str(step))

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failed = True
        try:
            _remove_transient(self._directory)
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


def steps_to_keep(
    steps: Sequence[int], keep_last: int, milestone_tokens: int, tokens_per_step: int
) -> set[int]:
    """The newest `keep_last` steps, and the first step at or past each multiple of
    `milestone_tokens` (0: none) tokens.

    Args:
      steps: the sealed steps, ascending.
    """
    keep = set(steps[-keep_last:])
    reached = 0
    for step in steps if milestone_tokens else ():
        multiple = step * tokens_per_step // milestone_tokens
        if multiple > reached:
            keep.add(step)
            reached = multiple
    return keep


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
    directory = Path(run_dir).resolve() / CHECKPOINTS

    def read(directory: Path, content: dict[str, Any]) -> tuple[int, PyTree]:
        params: dict[str, Any] = {}
        for name, array in content["arrays"].items():
            part, *parents, key = name.split("/")
            if part == "params":
                node = params
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[key] = jax.ShapeDtypeStruct(array["shape"], np.dtype(array["dtype"]))
        return int(directory.name), _read(directory, content, {"params": params})["params"]

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
    if _sealed_steps(directory):
        raise ValueError(
            f"{directory} already holds the steps {_sealed_steps(directory)}, which these params "
            "do not belong to; name a new run directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    _remove_transient(directory)
    arrays = _named(params, "params")
    described = integrity.describe(arrays, jax.device_get(integrity.fingerprints(arrays)))
    with _orbax_context():
        ocp.save_checkpointables(_unsealed(directory, 0), {"params": params})
    _seal_and_publish(directory, 0, described, metadata)


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
            others = [other for other in _sealed_steps(directory) if other != step]
            raise ValueError(
                f"step {step} of {directory} cannot be restored: {error}; "
                + (f"name one of the steps {others}" if others else "no other step is sealed")
            ) from error
    reasons = []
    for path in reversed(_step_directories(directory)):
        sealed = (path / integrity.SEAL).exists()
        try:
            content = integrity.read_seal(path)
            if any(name.startswith(f"{needs}/") for name in content["files"]):
                return read(path, content)
        except integrity.DamagedError as error:
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
    as_leaf = _abstract if on_device else _abstract_numpy
    try:
        found = ocp.load_checkpointables(directory, jax.tree.map(as_leaf, abstract))
    except (OSError, ValueError) as error:
        raise integrity.DamagedError(f"it cannot be read: {_first_line(error)}") from error
    arrays = _named(found["params"], "params") | found.get("training", {})
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
    directory: Path, step: int, described: Mapping[str, Any], metadata: dict[str, Any]
) -> None:
    unsealed, final = _unsealed(directory, step), directory / str(step)
    (unsealed / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
    integrity.seal(unsealed, step, described)
    if final.exists():
        replaced = directory / f"{step}.replaced"
        final.rename(replaced)
        unsealed.rename(final)
        shutil.rmtree(replaced)
    else:
        unsealed.rename(final)
    integrity.sync_directory(directory)


def _undo_interrupted_replacement(directory: Path) -> None:
    for replaced in directory.glob("*.replaced"):
        final = replaced.with_suffix("")
        if not final.exists():
            replaced.rename(final)


def _unsealed(directory: Path, step: int) -> Path:
    return directory / f"{step}.unsealed"


def _remove(path: Path) -> None:
    """Deletes a step so that a kill leaves no half of it under its name."""
    removed = path.with_name(f"{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed)


def _remove_transient(directory: Path) -> None:
    """Deletes what killed or failed saves and deletions have left."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if _TRANSIENT.match(path.name):
            shutil.rmtree(path)


def _step_directories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    steps = (path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())
    return sorted(steps, key=lambda path: int(path.name))


def _sealed_steps(directory: Path) -> list[int]:
    paths = _step_directories(directory)
    return [int(path.name) for path in paths if (path / integrity.SEAL).is_file()]


def _named(tree: PyTree, prefix: str) -> dict[str, Any]:
    """The leaves of a tree by their path: `params/layers/query`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert len(set(names)) == len(names), names
    return {f"{prefix}/{name}": leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _parts(state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """A state's params, and all its other leaves by name."""
    params = state["params"] if isinstance(state, Mapping) else state.params
    return params, {
        name: leaf
        for name, leaf in _named(state, "training").items()
        if not name.startswith("training/params/")
    }


def _joined(state: PyTree, params: PyTree, training: Mapping[str, Any]) -> PyTree:
    """The inverse of `_parts`, in the structure of `state`."""
    found = {**training, **_named(params, "training/params")}
    return jax.tree.unflatten(
        jax.tree.structure(state), [found[name] for name in _named(state, "training")]
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _abstract_numpy(leaf: Any) -> np.ndarray:
    return np.empty(leaf.shape, leaf.dtype)  # never touched, so it takes no memory


def _require_same_arrays(
    directory: Path, content: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    saved = {name: (a["dtype"], tuple(a["shape"])) for name, a in content["arrays"].items()}
    now = {name: (str(np.dtype(a.dtype)), tuple(a.shape)) for name, a in expected.items()}
    problems = [
        f"{name}: saved {_kind(saved.get(name))}, expected {_kind(now.get(name))}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"step {directory.name} of {directory.parent} holds other arrays than this config "
            f"makes, so training cannot go on from it; use the run's own config.json, or another "
            f"run directory:{shown}{more}"
        )


def _kind(array: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{array[0]}{list(array[1])}" if array else "nothing"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
