"""Trains a SentencePiece model on a source of raw text, with the settings of Llama 2's own.

The shipped model, text/assets/tokenizer_4096.model, is the result of

    python -m tinyllama_jax.data.train_tokenizer --out=tokenizer_4096.model

on the embedded corpus of CPython 3.11.7, its training part. The same texts give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import re
from collections.abc import Iterable, Iterator

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data.sources import Tally, list_inputs, read_documents

_MAX_LINE_BYTES = 4192  # SentencePiece's default: what is longer is left out
# As many characters as fit in any script, up to a space if there is one.
_PARTS = re.compile(rf".{{1,{_MAX_LINE_BYTES // 4}}}(?= |$)|.{{1,{_MAX_LINE_BYTES // 4}}}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a byte-pair model of `vocab_size` pieces; all texts are held in memory.

    The settings are those in Llama 2's model file: byte fallback, digits apart, no normalization,
    spaces kept, ids 0 for unknown, 1 for BOS and 2 for EOS. One thread, and no path or date in the
    result: the same texts in the same order give the same bytes.

    Returns:
      The serialized ModelProto.

    Raises:
      ValueError: the texts do not hold that many different pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_LINE_BYTES,
            max_sentencepiece_length=16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ValueError(
            f"a tokenizer of {vocab_size} pieces cannot be trained on this text ({error}); "
            f"give more text or a smaller vocab_size"
        ) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines that SentencePiece takes; longer ones are cut ahead of a space, where no piece lies."""
    for text in texts:
        for line in filter(None, text.split("\n")):
            short = len(line) * 4 <= _MAX_LINE_BYTES or len(line.encode()) <= _MAX_LINE_BYTES
            yield from [line] if short else _PARTS.findall(line)


def _training_texts(source: SourceConfig) -> Iterator[str]:
    for entry in list_inputs(source):
        for document in read_documents(source, entry, Tally()):
            if not document.validation:
                yield document.text


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a SentencePiece model on raw text.")
    parser.add_argument("--out", required=True, help="where the .model file goes")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--path", nargs="+", help="data.sources.*.path; default: embedded corpus")
    parser.add_argument("--format", default="auto", help="data.sources.*.format")
    parser.add_argument("--text_key", default="text", help="data.sources.*.text_key")
    parser.add_argument("--separator", default="", help="data.sources.*.separator")
    flags = parser.parse_args()
    if flags.path is None:
        flags.path, flags.format = ["code", "text"], "embedded"

    sources = [
        SourceConfig(
            name="tokenizer",
            path=path,
            format=flags.format,
            text_key=flags.text_key,
            separator=flags.separator,
        )
        for path in flags.path
    ]
    texts = (text for source in sources for text in _training_texts(source))
    try:
        model = train_tokenizer(texts, flags.vocab_size)
        pathlib.Path(flags.out).write_bytes(model)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{flags.out}: {flags.vocab_size} pieces, {len(model)} bytes")
    print(f'next: set config.data.tokenizer = "{flags.out}" and config.model.vocab_size')


if __name__ == "__main__":
    main()
