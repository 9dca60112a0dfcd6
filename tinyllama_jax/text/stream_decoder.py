"""Text from token ids that arrive one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_SPACE = "\u2581"  # SentencePiece's space


class StreamDecoder:
    """Turns ids into text as they come; the parts joined are what decoding all ids gives.

    A character that is spread over byte pieces is held back until it is whole, and bytes that can
    no longer become one are given as U+FFFD each, as SentencePiece does.

    Args:
      piece_texts: what each id adds to a text: bytes for byte pieces, for others text with its
        spaces as U+2581.
      check_id: raises where an id is outside the vocabulary.
      strips_leading_space: whether the space that the tokenizer puts before a text is removed.
    """

    def __init__(
        self,
        piece_texts: Sequence[str | bytes],
        check_id: Callable[[int], None],
        strips_leading_space: bool,
    ):
        self._piece_texts = piece_texts
        self._check_id = check_id
        self._held = b""  # the bytes of a character that is not whole yet
        self._at_start = strips_leading_space  # the next piece loses its leading space

    def add(self, token_id: int) -> str:
        """Takes the next id and returns the text that is certain now, often one piece.

        Raises:
          ValueError: the id is outside the vocabulary.
        """
        self._check_id(token_id)
        piece = self._piece_texts[token_id]
        if isinstance(piece, bytes):
            text, self._held = _decode(self._held + piece)
        else:
            text = self.finish()
            if self._at_start and piece.startswith(_SPACE):
                piece, self._at_start = piece[1:], False
            text += piece.replace(_SPACE, " ")
        self._at_start = self._at_start and not text
        return text

    def finish(self) -> str:
        """Ends the text: what was held back, as U+FFFD."""
        text, self._held = "\ufffd" * len(self._held), b""
        self._at_start = self._at_start and not text
        return text


def _decode(data: bytes) -> tuple[str, bytes]:
    """Text of the whole characters at the front of `data`, and the bytes that may become one."""
    text = ""
    while data:
        length = _character_bytes(data[0])
        try:
            text += data[:length].decode()
            data = data[length:]
        except UnicodeDecodeError as error:
            if len(data) < length and error.reason == "unexpected end of data":
                break
            text += "\ufffd"
            data = data[1:]
    return text, data


def _character_bytes(first: int) -> int:
    if first < 0xC0:
        return 1
    return 2 if first < 0xE0 else 3 if first < 0xF0 else 4
