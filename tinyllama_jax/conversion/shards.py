"""Safetensors files on disk: a checkpoint of one or several shards, read and written in turn.

Neither direction needs torch; bfloat16 comes through ml_dtypes, which jax brings.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_READABLE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB", "500MB" or "1000000" (powers of ten, as Hugging Face)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise ValueError(f'"{text}" is not a size; write it like 5GB or 500MB')
    return size


class Reader:
    """The tensors of a directory's safetensors shards, read one at a time.

    Raises:
      ValueError: no safetensors files, an index that names files that are not there, a file that is
        cut short or is a Git-LFS pointer, or a dtype that is not a float of 16 or 32 bits.
    """

    def __init__(self, directory: pathlib.Path):
        self._names: list[tuple[str, pathlib.Path]] = []
        with contextlib.ExitStack() as stack:
            self._files = {path: stack.enter_context(_open(path)) for path in _shards(directory)}
            self._names = [
                (name, path)
                for path, file in self._files.items()
                for name in file.keys()  # noqa: SIM118 (a file is not a mapping)
            ]
            self._stack = stack.pop_all()
        self._where = dict(self._names)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """Names in all shards; one that two shards hold occurs twice."""
        return [name for name, _ in self._names]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """ "float32", "bfloat16" or "float16"."""
        path = self._where[name]
        stored = self._files[path].get_slice(name).get_dtype()
        if stored not in _READABLE:
            raise ValueError(
                f"{name} in {path.name} is stored as {stored}; only {', '.join(_READABLE)} weights "
                f"are read: quantised checkpoints must be converted back to floats first"
            )
        return _READABLE[stored]

    def read(self, name: str) -> np.ndarray:
        """One tensor in the dtype it is stored in."""
        self.dtype(name)
        return self._files[self._where[name]].get_tensor(name)


def _shards(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / INDEX
    if index.exists():
        try:
            files = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not an index of weights ({_pointer_or(index, 'no weight_map in it')})"
            ) from error
        paths = [directory / name for name in sorted(files)]
        absent = [p.name for p in paths if not p.is_file() or p.parent != directory]
        if absent:
            raise ValueError(
                f"{index} names shards that are not beside it: {', '.join(absent)}; "
                f"finish the download"
            )
        return paths
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    torch_files = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if torch_files:
        raise ValueError(
            f"{directory} holds its weights as {torch_files[0]}, a pickle, which this package does "
            f"not load; save them as safetensors (transformers: save_pretrained)"
        )
    raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}: there are no weights to read")


def _open(path: pathlib.Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({_pointer_or(path, str(error))})"
        ) from error


def _pointer_or(path: pathlib.Path, reason: str) -> str:
    with open(path, "rb") as file:
        pointer = file.read(7) == b"version"
    return "a Git-LFS pointer, not the file: run git lfs pull" if pointer else reason


def write(
    directory: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> list[pathlib.Path]:
    """Writes tensors as safetensors shards, with an index if there are several.

    Memory holds one shard at a time.

    Args:
      directory: an existing directory.
      shapes: every tensor's name and shape, in the order they are written.
      dtype: the dtype on disk.
      tensor: gives a tensor by name, when its shard is written.
      max_shard_bytes: no shard is larger, unless a single tensor is.

    Returns:
      The shards' paths.

    Raises:
      ValueError: a value that float16 cannot hold.
    """
    import safetensors.numpy

    plan = list(_plan(shapes, dtype.itemsize, max_shard_bytes))
    weight_map: dict[str, str] = {}
    paths = []
    for number, names in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors = {name: _cast(name, tensor(name), dtype) for name in names}
        for name, array in tensors.items():
            assert array.shape == tuple(shapes[name]), (name, array.shape, shapes[name])
        path = directory / file
        path.touch()
        mode = path.stat().st_mode
        # transformers refuses files whose metadata does not name a framework.
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes files that only their owner can read
        del tensors
        weight_map |= dict.fromkeys(names, file)
        paths.append(path)
    if len(plan) > 1:
        total = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return paths


def _cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor, dtype)
    if dtype == np.float16 and np.isinf(cast).any():
        raise ValueError(
            f"{name} holds {np.abs(tensor).max():g}, past the largest float16 of 65504, so it "
            f"would become infinite; choose bfloat16 or float32"
        )
    return cast


def _plan(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_bytes: int
) -> Iterator[list[str]]:
    shard: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        if shard and held + size > max_shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    yield shard
