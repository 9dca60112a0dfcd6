"""Exact tokenization at several times SentencePiece's own speed.

Byte-pair merging never joins two characters that stand side by side in no piece of the vocabulary.
Where text is cut between such characters, the parts can be encoded alone and their ids joined. With
Llama 2's settings the place before a newline is such a one, and the place before a space that
follows neither a space nor a newline: a text is cut into words (with the spaces before them), and
most words were met before.

All that is done to each word is done by single calls for many of them: the text is rewritten such
that `str.split` cuts it, and a dict gives the ids.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_MARK = "\u2581"  # SentencePiece's own sign for a space
_CUT = re.compile(r"\n|(?<=[^ \n]) ")  # a segment starts at the match
# What a key begins with: a segment that begins with a space has lost it; another sign stands before
# what a text begins with; a newline is its own.
_WORD, _HEAD, _LINE = "", " ", "\n"
_SLICE_CHARS = 1 << 16  # so that one huge document does not become one huge list of segments
# Memory of the segments met lately, and as much of those that were before. A segment takes about
# 160 bytes in the dict and for its two objects, beside its characters and its ids.
_CACHE_BYTES = 150_000_000
_SEGMENT_BYTES = 160


class SegmentEncoder:
    """Encodes texts through a cache of their segments.

    Args:
      processor: a SentencePieceProcessor that adds no space before a text.
      prefix: what the tokenizer itself puts before each text.
    """

    def __init__(self, processor: Any, prefix: str):
        self._processor = processor
        self._prefix = prefix
        (self._newline,) = processor.encode("\n")
        # The int32 ids of each segment, by what `_keys` makes of it.
        self._ids: dict[str, bytes] = {}
        self._older: dict[str, bytes] = {}
        self._cached_bytes = 0

    @classmethod
    def of_model(cls, spec: Any) -> SegmentEncoder | None:
        """The encoder of a ModelProto; None where segments might not give the same ids."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as pb2

        byte_pairs = spec.trainer_spec.model_type == pb2.TrainerSpec.BPE
        identity = (
            not spec.normalizer_spec.precompiled_charsmap
            and not spec.normalizer_spec.normalization_rule_tsv
            and not spec.normalizer_spec.remove_extra_whitespaces
            and spec.normalizer_spec.escape_whitespaces
            and not spec.trainer_spec.treat_whitespace_as_suffix
        )
        # Without byte fallback, neighbouring unknown characters fuse into one id across a cut.
        if not (byte_pairs and identity and spec.trainer_spec.byte_fallback):
            return None
        kinds = pb2.ModelProto.SentencePiece
        literal = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)  # these are merged through
        for piece in spec.pieces:
            text = piece.piece.replace(_MARK, " ")
            if piece.type in literal and ("\n" in text or _CUT.search(text, 1)):
                return None
        unprefixed = pb2.ModelProto()
        unprefixed.CopyFrom(spec)
        unprefixed.normalizer_spec.add_dummy_prefix = False
        processor = sentencepiece.SentencePieceProcessor(
            model_proto=unprefixed.SerializeToString(), num_threads=1
        )
        return cls(processor, " " if spec.normalizer_spec.add_dummy_prefix else "")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, `(tokens,)` int32."""
        # SentencePiece writes a space as U+2581, so it takes one in a text for a space too.
        spaced = [self._prefix + text.replace(_MARK, " ") if text else "" for text in texts]
        slices = [list(_slices(text)) for text in spaced]
        encoded = self._encode_slices([part for parts in slices for part in parts])
        return [
            np.frombuffer(b"".join([next(encoded) for _ in parts]), np.int32) for parts in slices
        ]

    def _encode_slices(self, slices: list[str]) -> Iterator[bytes]:
        start = 0
        while start < len(slices):
            stop, chars = start, 0
            while stop < len(slices) and chars < _SLICE_CHARS:
                chars += len(slices[stop])
                stop += 1
            if self._cached_bytes > _CACHE_BYTES:
                self._older, self._ids, self._cached_bytes = self._ids, {}, 0
            keys = [_keys(text) for text in slices[start:stop]]
            ids = [list(map(self._ids.get, of_slice)) for of_slice in keys]
            missing = [[at for at, found in enumerate(of) if found is None] for of in ids]
            self._learn({k[at] for k, places in zip(keys, missing, strict=True) for at in places})
            for of_slice, found, places in zip(keys, ids, missing, strict=True):
                for at in places:
                    found[at] = self._ids[of_slice[at]]
                yield b"".join(found)  # type: ignore[arg-type]  # none is missing any more
            start = stop

    def _learn(self, keys: set[str]) -> None:
        """Finds the ids of segments that were not met lately."""
        new: dict[str, list[str]] = {_WORD: [], _HEAD: [], _LINE: []}
        for key in keys:
            if key in self._older:
                self._ids[key] = self._older[key]
            else:
                new[key[:1] if key[:1] in new else _WORD].append(key)
        if any(new.values()):
            self._encode_new(new)
        self._cached_bytes += sum(_SEGMENT_BYTES + len(key) + len(self._ids[key]) for key in keys)

    def _encode_new(self, new: dict[str, list[str]]) -> None:
        """All in one text, each behind a newline: its id tells where they end."""
        texts = [f"\n {key}" for key in new[_WORD]]
        texts += [f"\n{key[1:]}" for key in new[_HEAD]]
        texts += new[_LINE]
        ids = np.array(self._processor.encode("".join(texts).replace(_MARK, " ")), np.int32)
        starts = np.flatnonzero(ids == self._newline)
        ends = 4 * np.append(starts[1:], len(ids))
        starts = 4 * (starts + 1)
        starts[len(new[_WORD]) + len(new[_HEAD]) :] -= 4  # the newline is their own
        packed = ids.tobytes()
        found = (packed[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True))
        self._ids.update(zip(itertools.chain(*new.values()), found, strict=True))


def _keys(text: str) -> list[str]:
    """The segments of a slice, each without the space that it begins with.

    Of several spaces in a row, and of all that follow a newline, no text is cut before any but the
    first: those become marks, and a space is put before each newline, so that spaces are exactly
    where the text is cut. What a text begins with, where that is neither, gets a space as its sign.
    """
    text = text.replace("  ", " " + _MARK).replace(_MARK + " ", 2 * _MARK)
    text = text.replace("\n ", "\n" + _MARK).replace("\n", " \n")
    keys = text.split(" ")
    if keys[0]:
        keys[0] = _HEAD + keys[0]
    else:
        del keys[0]
    return keys


def _slices(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _SLICE_CHARS)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
