"""The fingerprint of an array and the seal of a directory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.runs import integrity
from tinyllama_jax.runs.integrity import DamagedError, fingerprints, read_seal, seal, verify_files

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


def array_of(dtype: str, shape: tuple[int, ...] = (3, 5, 7)) -> jax.Array:
    values = np.random.default_rng(0).integers(-100, 100, shape)
    return jnp.asarray(values, dtype)


def fingerprint(array) -> int:
    return int(fingerprints({"array": array})["array"])


def numpy_fingerprint(array) -> int:
    """The definition, element by element, in Python's integers."""
    flat = np.asarray(array).reshape(-1)
    bits = flat.view(f"uint{8 * flat.itemsize}").tolist()
    total = 0
    for position, word in enumerate(bits):
        mixed = word ^ (position * 0x9E3779B1 % 2**32)
        mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 % 2**32
        total += mixed ^ (mixed >> 16)
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (2, 0, 3)])
def test_fingerprint_follows_its_definition(dtype, shape):
    array = array_of(dtype, shape)
    assert fingerprint(array) == numpy_fingerprint(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_sees_every_single_bit(dtype):
    array = np.asarray(array_of(dtype, (4, 6)))
    bits_per_element = 1 if dtype == "bool" else 8 * array.itemsize
    flipped = []
    for element in range(array.size):
        for bit in range(bits_per_element):
            copy = array.copy()
            words = copy.reshape(-1).view(f"uint{8 * array.itemsize}")
            words[element] ^= 1 << bit
            flipped.append(copy)
    prints = jax.vmap(integrity._fingerprint)(np.stack(flipped))
    assert fingerprint(array) not in prints.tolist()


def test_fingerprint_sees_exchanged_elements():
    array = array_of("float32", (64,))
    negated = array.at[1].set(-array[0])  # a plain position-weighted sum misses this exchange
    exchanged = negated.at[0].set(negated[1]).at[1].set(negated[0])
    assert fingerprint(negated) != fingerprint(exchanged)
    assert fingerprint(array) != fingerprint(array[::-1])
    assert fingerprint(jnp.float32(0.0)) != fingerprint(jnp.float32(-0.0))


def test_fingerprint_tells_equal_bits_of_two_shapes_as_equal_data():
    array = array_of("float32", (6, 4))
    assert fingerprint(array) == fingerprint(array.reshape(2, 3, 4))


@pytest.fixture
def sealed(tmp_path):
    directory = tmp_path / "7"
    (directory / "params" / "d").mkdir(parents=True)
    (directory / "training").mkdir()
    (directory / "params" / "d" / "data").write_bytes(bytes(range(200)))
    (directory / "training" / "data").write_bytes(b"moments")
    (directory / "top.json").write_text("{}")
    (directory / "empty").touch()
    seal(directory, 7, {"params/w": {"dtype": "float32", "shape": [2], "fingerprint": 5}})
    return directory


def test_seal_holds_for_what_was_sealed(sealed):
    content = read_seal(sealed)
    assert content["arrays"]["params/w"]["fingerprint"] == 5
    assert verify_files(sealed, content) == 200 + len("moments") + 2
    assert not list(sealed.glob("*.tmp"))


@pytest.mark.parametrize("bit", [0, 5, pytest.param(7, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_any_byte_of_the_seal_itself_is_found(sealed, bit):
    """Bit 5 is the one between upper and lower case, and between a space and NUL."""
    path = sealed / integrity.SEAL
    raw = path.read_bytes()
    for index in range(len(raw)):
        damaged = bytearray(raw)
        damaged[index] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            read_seal(sealed)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe"])
def test_a_seal_that_is_none_is_damage(sealed, raw):
    (sealed / integrity.SEAL).write_bytes(raw)
    with pytest.raises(DamagedError, match="itself is damaged"):
        read_seal(sealed)


def test_a_missing_seal_is_named(sealed):
    (sealed / integrity.SEAL).unlink()
    with pytest.raises(DamagedError, match="never sealed"):
        read_seal(sealed)


def test_a_renamed_step_is_refused(sealed):
    with pytest.raises(DamagedError, match="sealed as step 7 and renamed"):
        read_seal(sealed.rename(sealed.with_name("8")))


def test_a_seal_of_another_format_is_refused(sealed):
    content = read_seal(sealed)
    (sealed / integrity.SEAL).write_bytes(integrity._serialize({**content, "format": 99}))
    with pytest.raises(DamagedError):
        read_seal(sealed)


def test_damage_is_named(sealed):
    content = read_seal(sealed)

    def refused(reason: str) -> None:
        with pytest.raises(DamagedError, match=reason):
            verify_files(sealed, content)

    data = sealed / "params" / "d" / "data"
    raw = data.read_bytes()
    data.write_bytes(raw[:-1])
    refused("params/d/data has 199 bytes, sealed with 200")
    data.write_bytes(raw[:100] + bytes([raw[100] ^ 4]) + raw[101:])
    refused("contents of params/d/data changed")
    data.unlink()
    refused("params/d/data is missing")
    data.write_bytes(raw)
    (sealed / "empty").unlink()
    refused("empty is missing")
    (sealed / "empty").touch()
    (sealed / "params" / "d" / "new").touch()
    refused("params/d/new was added")
    (sealed / "params" / "d" / "new").unlink()
    (sealed / "link").symlink_to(sealed.parent, target_is_directory=True)
    refused("link was added")
    (sealed / "link").unlink()
    verify_files(sealed, content)


def test_parts_leave_the_contents_of_other_parts_unread(sealed):
    content = read_seal(sealed)
    (sealed / "training" / "data").write_bytes(b"m0ments")
    assert verify_files(sealed, content, parts=("params",)) == 202
    with pytest.raises(DamagedError, match="training/data"):
        verify_files(sealed, content)
    (sealed / "training" / "data").unlink()
    with pytest.raises(DamagedError, match="training/data is missing"):
        verify_files(sealed, content, parts=("params",))


def test_the_seal_is_readable_json(sealed):
    content = json.loads((sealed / integrity.SEAL).read_text())
    assert set(content) == {"format", "step", "files", "arrays", "checksum"}
    assert content["files"]["training/data"]["size"] == 7
