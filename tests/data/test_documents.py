"""Segment ids and positions against a loop over tokens."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data.documents import positions, positions_and_segments, segment_ids

BOS, EOS = 1, 2


def _by_loop(row, boundary):
    segment, position, segments, places = 0, 0, [], []
    for i, token in enumerate(row):
        begins = row[i - 1] == EOS if boundary == "eos" else token == BOS
        if i > 0 and begins:
            segment, position = segment + 1, 0
        segments.append(segment)
        places.append(position)
        position += 1
    return segments, places


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seq_len=st.sampled_from([1, 2, 33]),  # each shape compiles once
    boundary=st.sampled_from(["bos+eos", "bos", "eos"]),
)
def test_segments_and_positions_equal_those_of_a_loop(seed, seq_len, boundary):
    tokens = np.random.default_rng(seed).integers(0, 6, (4, seq_len)).astype(np.int32)
    found = jax.jit(positions_and_segments, static_argnums=(1, 2, 3))(tokens, boundary, BOS, EOS)
    loop = [_by_loop(row, boundary) for row in tokens]
    np.testing.assert_array_equal(found[0], [places for _, places in loop])
    np.testing.assert_array_equal(found[1], [segments for segments, _ in loop])
    assert found[0].dtype == found[1].dtype == np.int32


def test_a_window_that_starts_inside_a_document():
    tokens = np.array([[7, 8, EOS, BOS, 9, EOS, BOS, 5]])
    segments = segment_ids(tokens, "bos+eos", BOS, EOS)
    np.testing.assert_array_equal(segments, [[0, 0, 0, 1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(positions(segments), [[0, 1, 2, 0, 1, 2, 0, 1]])


def test_an_unknown_boundary_is_refused():
    with pytest.raises(ValueError, match=r'data\.boundary = "bod"'):
        segment_ids(np.ones((1, 2), np.int32), "bod", BOS, EOS)


def test_documents_are_told_apart_without_the_data_libraries():
    script = (
        "import sys\n"
        "for name in ('grain', 'array_record', 'sentencepiece', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "import tinyllama_jax.data.documents, tinyllama_jax.data.batch\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
