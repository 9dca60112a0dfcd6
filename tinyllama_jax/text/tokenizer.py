"""Text to token ids and back, with a SentencePiece model."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from tinyllama_jax.text.segments import SegmentEncoder
from tinyllama_jax.text.stream_decoder import StreamDecoder

SHIPPED_MODEL = pathlib.Path(__file__).parent / "assets" / "tokenizer_4096.model"

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Tokenizer:
    """A SentencePiece model: ids without control tokens, which the caller adds where it wants them.

    Text that looks like a control token ("</s>") is text: it never becomes a control id.

    Args:
      path: a SentencePiece `.model` file; "": the 4096-piece model shipped with the package.

    Attributes:
      model_proto: the model file's bytes.
      sha256: of those bytes; what prepared data and checkpoints are tied to.
      vocab_size: number of pieces; ids are in `[0, vocab_size)`.
      bos_id, eos_id, unk_id: control ids; -1 where the model has none.

    Raises:
      ValueError: the file is missing, a Git-LFS pointer, or not a SentencePiece model.
    """

    model_proto: bytes
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int

    def __init__(self, path: str = ""):
        path = path or str(SHIPPED_MODEL)
        self._load(_read_model(pathlib.Path(path)), path)

    @classmethod
    def from_bytes(cls, model_proto: bytes) -> Tokenizer:
        """The tokenizer of a serialized ModelProto; raises ValueError where it is none."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(model_proto, "the given model")
        return tokenizer

    def _load(self, model_proto: bytes, name: str) -> None:
        import sentencepiece

        try:
            # An empty file parses, as a model without pieces.
            processor = sentencepiece.SentencePieceProcessor(
                model_proto=model_proto or b"\0", num_threads=1
            )
        except RuntimeError as error:
            raise ValueError(
                f"{name} is not a SentencePiece model ({len(model_proto)} bytes that begin with "
                f"{model_proto[:16]!r}); give the binary tokenizer.model file, not tokenizer.json"
            ) from error
        self._processor = processor
        self.model_proto = model_proto
        self.sha256 = hashlib.sha256(model_proto).hexdigest()
        self.vocab_size = processor.vocab_size()
        self.bos_id = processor.bos_id()
        self.eos_id = processor.eos_id()
        self.unk_id = processor.unk_id()

    def __reduce__(self) -> tuple:
        return Tokenizer.from_bytes, (self.model_proto,)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS.

        Raises:
          UnicodeEncodeError: the text has lone surrogates, so it is no Unicode text.
        """
        return self._processor.encode(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, `(tokens,)` int32: what `encode` gives, several times as fast."""
        if self._segments is not None:
            return self._segments.encode_batch(texts)
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control ids give nothing, bytes that are no UTF-8 give U+FFFD.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            self._check_id(i)
        return self._processor.decode(ids)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder to which ids are given one by one, for text that is shown as it comes."""
        return StreamDecoder(self._piece_texts, self._check_id, self._strips_leading_space)

    def piece(self, token_id: int) -> str:
        """How the vocabulary writes an id: "▁the", "<0x0A>", "<s>"."""
        self._check_id(token_id)
        return self._processor.id_to_piece(token_id)

    def piece_bytes(self) -> list[int]:
        """How many bytes of text each id stands for; control ids: none."""
        sizes = []
        for text in self._piece_texts:
            text = text.replace("\u2581", " ") if isinstance(text, str) else text
            sizes.append(len(text.encode() if isinstance(text, str) else text))
        return sizes

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"id {token_id} is not in the vocabulary of {self.vocab_size} pieces: these ids "
                f"come from another tokenizer"
            )

    @functools.cached_property
    def _segments(self) -> SegmentEncoder | None:
        return SegmentEncoder.of_model(self._spec)

    @functools.cached_property
    def _spec(self):
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self.model_proto)

    @property
    def _strips_leading_space(self) -> bool:
        return self._spec.normalizer_spec.add_dummy_prefix

    @functools.cached_property
    def _piece_texts(self) -> list[str | bytes]:
        """What each id adds to a text: bytes for byte pieces, else text with U+2581."""
        from sentencepiece import sentencepiece_model_pb2

        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        texts: list[str | bytes] = []
        for piece in self._spec.pieces:
            if piece.type == kinds.BYTE:
                texts.append(bytes([int(piece.piece[3:5], 16)]))
            elif piece.type == kinds.CONTROL:
                texts.append("")
            elif piece.type == kinds.UNKNOWN:
                texts.append(self._spec.trainer_spec.unk_surface)
            else:
                texts.append(piece.piece)
        return texts


def _read_model(path: pathlib.Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read the tokenizer {path}: {error.strerror}; set data.tokenizer to a "
            f'SentencePiece .model file, or to "" for the one shipped with the package'
        ) from error
    if content.startswith(_LFS_POINTER):
        raise ValueError(
            f"{path} is a Git-LFS pointer, not the tokenizer itself; run `git lfs pull` in the "
            f"repository that it came from"
        )
    return content
