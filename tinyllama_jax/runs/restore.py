"""Reading checkpoints: the newest step that is whole, verified before and after it is read."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from tinyllama_jax.parallel import distributed
from tinyllama_jax.runs import integrity, parts, steps
from tinyllama_jax.runs.parts import PyTree

CHECKPOINTS = "checkpoints"
_DELAY_SECONDS = 30.0


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
            reason = f"{path} cannot be read: {first_line(error)}"
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
        return int(directory.name), read_parts(directory, content, {"params": params})["params"]

    return _of_run(run_dir, step, read)


def _of_run(run_dir: Path, step: int | None, read: Any) -> Any:
    directory = Path(run_dir).resolve() / CHECKPOINTS
    found = newest_good(directory, step, read)
    if found is None:
        raise ValueError(
            f"{directory} holds no sealed checkpoint, so there are no params to read; train the "
            "run until it has saved a step, or name another run directory"
        )
    return found


def newest_good(directory: Path, step: int | None, read: Any, needs: str = "params") -> Any:
    """What `read(step directory, seal)` returns for the named step, or for the newest that it can
    read; None if nothing was ever sealed that has the part `needs`."""
    if step is not None:
        path = directory / str(step)
        try:
            with distributed.together(integrity.DamagedError):
                if not path.is_dir():
                    raise integrity.DamagedError("there is no such step")
                content = integrity.read_seal(path)
            return read(path, content)
        except integrity.DamagedError as error:
            others = [other for other in steps.sealed_steps(directory) if other != step]
            raise ValueError(
                f"step {step} of {directory} cannot be restored: {error}; "
                + (f"name one of the steps {others}" if others else "no other step is sealed")
            ) from error
    reasons = []
    numbers = [int(path.name) for path in steps.step_directories(directory)]
    for number in reversed(distributed.from_main(numbers)):
        path = directory / str(number)
        sealed = distributed.from_main((path / integrity.SEAL).exists())
        _wait_until_seen(path / integrity.SEAL if sealed else path)
        try:
            with distributed.together(integrity.DamagedError):
                content = integrity.read_seal(path)
            if any(name.startswith(f"{needs}/") for name in content["files"]):
                return read(path, content)
        except integrity.DamagedError as error:
            if not distributed.from_main(
                path.exists()
            ):  # deleted by the running training while it was read
                return newest_good(directory, None, read, needs)
            say(f"passing over step {path.name}: {error}")
            reasons += [f"step {path.name}: {error}"] if sealed else []
    if reasons:
        raise ValueError(
            f"no checkpoint in {directory} is whole ({'; '.join(reasons)}); starting from the "
            "beginning would hide that: bring a copy back, or remove the directory to start over"
        )
    return None


def _wait_until_seen(path: Path) -> None:
    """A network disk shows a process what another one made with a delay."""
    deadline = time.monotonic() + (0 if distributed.is_main() else _DELAY_SECONDS)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def read_parts(
    directory: Path, content: dict[str, Any], abstract: dict[str, PyTree], on_device: bool = False
) -> dict[str, PyTree]:
    """Reads the named parts of a step, verified before and after."""
    began = time.perf_counter()
    size = 0
    with distributed.together(integrity.DamagedError):
        if distributed.is_main():
            size = integrity.verify_files(directory, content, parts=abstract.keys())
    as_leaf = parts.abstract_array if on_device else parts.abstract_numpy
    with distributed.together(integrity.DamagedError):
        try:
            found = ocp.load_checkpointables(directory, jax.tree.map(as_leaf, abstract))
        except (OSError, ValueError) as error:
            raise integrity.DamagedError(f"it cannot be read: {first_line(error)}") from error
    arrays = parts.named_leaves(found["params"], "params") | found.get("training", {})
    integrity.verify_arrays(arrays, content)
    total = sum(array.nbytes for array in arrays.values())
    seconds = time.perf_counter() - began
    say(
        f"read step {directory.name} of {directory.parent.parent}: {total / 1e9:.3f} GB of arrays "
        f"in {seconds:.2f} s ({total / 1e9 / seconds:.2f} GB/s), {size / 1e9:.3f} GB of files and "
        f"{len(arrays)} arrays verified"
    )
    return found


def first_line(error: BaseException) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def say(text: str, by_all: bool = False) -> None:
    """Prints a line, once for all processes unless each has its own to tell."""
    if by_all or distributed.is_main():
        print(text, file=sys.stderr, flush=True)
