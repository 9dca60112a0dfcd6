"""The seal of a checkpoint: proof that what is read back is what was saved.

`integrity.json` names every file of a step with its size and sha256, and every array with a
fingerprint of its bits that was computed on the device before anything was written. The hashes find
damage on disk; the fingerprints find a wrong save or restore, which hashes of files cannot. The
file carries a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.durable import write_durably

SEAL = "integrity.json"
_FORMAT = 1
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class DamagedError(ValueError):
    """A checkpoint that is not what was sealed; the message says in what."""


@jax.jit
def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A uint32 scalar per array, from its bits and their positions.

    The sum modulo 2^32 over elements of murmur3's finaliser of (bits xor position * odd constant).
    For a fixed position the finaliser is a bijection, so a change of any one element always changes
    the result; a plain weighted sum would miss the exchange of x and -x at positions of one parity.
    A sum needs no order, so the result does not depend on how the array is sharded.

    Args:
      arrays: by name; any shape; elements of 1, 2 or 4 bytes.

    Source of the mixing constants: A. Appleby, MurmurHash3, fmix32 (public domain).
    """
    return {name: _fingerprint(array) for name, array in arrays.items()}


def _fingerprint(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = array.dtype.itemsize
    assert width in _BITS, f"no fingerprint for elements of {array.dtype}"
    bits = jax.lax.bitcast_convert_type(array, _BITS[width]).astype(jnp.uint32)

    # Positions by dimension, not by reshaping to one: a reshape would gather a sharded array.
    position = jnp.zeros(array.shape, jnp.uint32)
    stride = 1
    for dimension in reversed(range(array.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, dimension)
        position += index * jnp.uint32(stride % 2**32)
        stride *= array.shape[dimension]

    mixed = bits ^ (position * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def describe(arrays: Mapping[str, Any], prints: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The `arrays` entry of a seal: dtype, shape and fingerprint of each array, by name."""
    return {
        name: {
            "dtype": str(np.dtype(array.dtype)),
            "shape": list(array.shape),
            "fingerprint": int(prints[name]),
        }
        for name, array in arrays.items()
    }


def seal(directory: Path, step: int, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes integrity.json for the files that lie in `directory` now.

    Args:
      directory: a checkpoint that nobody writes to any more.
      step: its step, so that a renamed copy is not taken for another one.
      arrays: what `describe` gave.

    Raises:
      OSError: the disk is full or fails; there is no integrity.json then.
    """
    paths = _files(directory)
    content = {
        "format": _FORMAT,
        "step": step,
        "files": {
            name: {"size": (directory / name).stat().st_size, "sha256": digest}
            for name, digest in zip(paths, _hash_all(directory, paths), strict=True)
        },
        "arrays": dict(arrays),
    }
    write_durably(directory / SEAL, _serialize(content))


def read_seal(directory: Path) -> dict[str, Any]:
    """The content of a step's integrity.json, once its own checksum holds.

    Raises:
      DamagedError: there is none (the save was never finished), it is not what was written, or it
        belongs to another step.
    """
    try:
        raw = (directory / SEAL).read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"it was never sealed (no {SEAL}): its save did not finish") from None
    except OSError as error:
        raise DamagedError(f"{SEAL} cannot be read: {error}") from error
    try:
        content = json.loads(raw)
        del content["checksum"]
        # Byte for byte, since a flipped bit may also hit a space or the case of a digit.
        intact = _serialize(content) == raw and content["format"] == _FORMAT
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DamagedError(f"{SEAL} itself is damaged: its checksum does not hold")
    if str(content["step"]) != directory.name:
        raise DamagedError(f"it was sealed as step {content['step']} and renamed since")
    return content


def verify_files(directory: Path, content: Mapping[str, Any], parts: Collection[str] = ()) -> int:
    """Compares the files of a step with its seal, and returns the bytes that were read.

    Args:
      directory: the step.
      content: what `read_seal` gave.
      parts: subdirectories whose contents are read and hashed (files at the top always are); of
        the others only presence and size are checked. Empty: everything is hashed.

    Raises:
      DamagedError: a file is missing, was added, or has other contents.
    """
    sealed, found = content["files"], _files(directory)
    missing, added = sorted(set(sealed) - set(found)), sorted(set(found) - set(sealed))
    if missing:
        raise DamagedError(f"{_listed(missing)} is missing")
    if added:
        raise DamagedError(f"{_listed(added)} was added after it was sealed")
    for name in found:
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"it cannot be read: {error}") from error
        if size != sealed[name]["size"]:
            raise DamagedError(f"{name} has {size} bytes, sealed with {sealed[name]['size']}")
    read = [name for name in found if not parts or "/" not in name or name.split("/")[0] in parts]
    try:
        digests = _hash_all(directory, read)
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error}") from error
    wrong = [name for name, digest in zip(read, digests, strict=True)
             if digest != sealed[name]["sha256"]]  # fmt: skip
    if wrong:
        raise DamagedError(f"the contents of {_listed(wrong)} changed after it was sealed")
    return sum(sealed[name]["size"] for name in read)


def verify_arrays(arrays: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Compares restored arrays with the fingerprints taken before they were saved.

    Raises:
      DamagedError: arrays that differ, by name.
    """
    prints = jax.device_get(fingerprints(dict(arrays)))
    sealed = content["arrays"]
    wrong = [name for name in arrays if int(prints[name]) != sealed[name]["fingerprint"]]
    if wrong:
        raise DamagedError(f"{_listed(wrong)} was restored with other bits than were saved")


def _serialize(content: Mapping[str, Any]) -> bytes:
    def canonical(value: Any) -> bytes:
        return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"

    checksum = hashlib.sha256(canonical(content)).hexdigest()
    return canonical({**content, "checksum": checksum})


def _files(directory: Path) -> list[str]:
    """Every file but the seal, relative and sorted; links count, so that an added one is seen."""
    names = []
    for root, directories, files in os.walk(directory):
        linked = [name for name in directories if os.path.islink(os.path.join(root, name))]
        names += [Path(root, name).relative_to(directory).as_posix() for name in files + linked]
    return sorted(name for name in names if name != SEAL)


def _hash_all(directory: Path, names: list[str]) -> list[str]:
    def digest(name: str) -> str:
        with open(directory / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # hashlib releases the interpreter lock, so threads share the work.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, names))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
