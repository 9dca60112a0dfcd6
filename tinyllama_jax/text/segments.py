"""Exact tokenization at several times SentencePiece's own speed.

Byte-pair merging never joins two characters that stand side by side in no piece of the vocabulary.
Where text is cut between such characters, the parts can be encoded alone and their ids joined. With
Llama 2's settings each space that follows a non-space is such a place, and both sides of a newline:
a text is cut into words (with the spaces before them), and most words were met before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_SEGMENT = re.compile(r"\n| *[^ \n]+| +")
_CUT = re.compile(r"(?<=[^ \n])[ \n]")  # a segment starts at the match
_SLICE_CHARS = 1 << 16  # so that one huge document does not become one huge list of segments
_CACHE_CHARS = 1 << 23  # segments known at once, in characters; about 200 MB at most


class SegmentEncoder:
    """Encodes texts through a cache of their segments.

    Args:
      processor: a SentencePieceProcessor that adds no space before a text.
      prefix: what the tokenizer itself puts before each text.
    """

    def __init__(self, processor: Any, prefix: str):
        self._processor = processor
        self._prefix = prefix
        self._ids: dict[str, bytes] = {}  # int32 ids of each segment
        self._cached_chars = 0

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
        literal = (pb2.ModelProto.SentencePiece.NORMAL, pb2.ModelProto.SentencePiece.USER_DEFINED)
        for piece in spec.pieces:
            if piece.type in literal and _is_cut(piece.piece.replace("\u2581", " ")):
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
        spaced = [self._prefix + text.replace("\u2581", " ") if text else "" for text in texts]
        slices = [list(_slices(text)) for text in spaced]
        flat = [part for parts in slices for part in parts]
        encoded = iter(self._encode_slices(flat))
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
            if self._cached_chars > _CACHE_CHARS:
                self._ids.clear()
                self._cached_chars = 0
            segmented = [_SEGMENT.findall(part) for part in slices[start:stop]]
            self._learn(set().union(*segmented).difference(self._ids))
            for segments in segmented:
                yield b"".join(map(self._ids.__getitem__, segments))
            start = stop

    def _learn(self, segments: set[str]) -> None:
        new = list(segments)
        for segment, ids in zip(new, self._processor.encode(new), strict=True):
            self._ids[segment] = np.array(ids, np.int32).tobytes()
        self._cached_chars += sum(map(len, new))


def _is_cut(piece: str) -> bool:
    return len(_SEGMENT.findall(piece)) != 1


def _slices(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _SLICE_CHARS)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
