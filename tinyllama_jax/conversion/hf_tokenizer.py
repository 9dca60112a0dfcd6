"""Hugging Face's tokenizer files, written from a SentencePiece model.

transformers' own `LlamaTokenizer` mis-tokenises text with leading spaces (seen with 5.23), so the
export states everything in an explicit tokenizer.json and names the class that reads just that.
Writing it needs neither the tokenizers package nor transformers.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

# sentencepiece_model.proto, ModelProto.SentencePiece.Type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2  # TrainerSpec.ModelType
_SPACE = "▁"  # how SentencePiece spells a space inside a piece


def write(directory: pathlib.Path, model_proto: bytes, max_seq_len: int) -> None:
    """Writes tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
      directory: an existing directory.
      model_proto: a serialised SentencePiece ModelProto.
      max_seq_len: the model's context, in tokens.

    Raises:
      ValueError: the model uses something that tokenizer.json could not reproduce.
    """
    proto = _parse(model_proto)
    names = _special_names(proto)
    special = {
        key: {"content": piece, "lstrip": False, "normalized": False, "rstrip": False,
              "single_word": False}
        for key, piece in names.items()
    }  # fmt: skip
    settings = {
        # Not LlamaTokenizer: see the top of this module.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer.model").write_bytes(model_proto)
    _write_json(directory / "tokenizer.json", tokenizer_json(model_proto))
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "special_tokens_map.json", special)


def tokenizer_json(model_proto: bytes) -> dict[str, Any]:
    """The tokenizer.json that gives a SentencePiece BPE model's ids.

    Literal special tokens in a text ("</s>") become their ids, as is usual with tokenizer.json;
    SentencePiece itself spells them out.

    Raises:
      ValueError: as for `write`.
    """
    proto = _parse(model_proto)
    _refuse(proto)
    added = [
        {"id": i, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, piece in enumerate(proto.pieces)
        if piece.type in (_UNKNOWN, _CONTROL)
    ]  # fmt: skip
    prefix = proto.normalizer_spec.add_dummy_prefix
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *prepend,
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _bos_template(proto),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
            "merges": _merges(proto),
        },
    }


def _merges(proto) -> list[list[str]]:
    """Every way to join two pieces into a third, best first.

    SentencePiece joins the neighbours whose union scores highest, and of equals the leftmost.
    tokenizers ranks pairs instead; of equal scores the longer left part goes first, so that a run
    of spaces is eaten from the left in both.
    """
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (left, right)
        for piece in score
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in score and right in score
    ]
    merges.sort(key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))
    return [list(pair) for pair in merges]


def _bos_template(proto) -> dict[str, Any] | None:
    """Puts BOS before a text, and before each of two."""
    bos = _special_names(proto).get("bos_token")
    if bos is None:
        return None
    sequence = {
        name: [
            {"SpecialToken": {"id": bos, "type_id": i}},
            {"Sequence": {"id": name, "type_id": i}},
        ]
        for i, name in enumerate("AB")
    }
    return {
        "type": "TemplateProcessing",
        "single": sequence["A"],
        "pair": sequence["A"] + sequence["B"],
        "special_tokens": {bos: {"id": bos, "ids": [proto.trainer_spec.bos_id], "tokens": [bos]}},
    }


def _special_names(proto) -> dict[str, str]:
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id,
           "pad_token": spec.pad_id}  # fmt: skip
    return {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}


def _parse(model_proto: bytes):
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        return sentencepiece_model_pb2.ModelProto.FromString(model_proto)
    except DecodeError as error:
        raise ValueError(f"the tokenizer is not a SentencePiece model ({error})") from error


def _refuse(proto) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    problems = []
    if trainer.model_type != _BPE:
        problems.append("it is not a BPE model")
    if trainer.treat_whitespace_as_suffix:
        problems.append("it writes spaces after words (treat_whitespace_as_suffix)")
    if normalizer.precompiled_charsmap:
        problems.append(f'it normalises characters ("{normalizer.name}"); train with "identity"')
    if normalizer.remove_extra_whitespaces:
        problems.append("it drops repeated spaces (remove_extra_whitespaces)")
    if not normalizer.escape_whitespaces:
        problems.append("it keeps spaces as they are (escape_whitespaces is off)")
    if _USER_DEFINED in kinds:
        problems.append("it has user-defined pieces")
    if _UNUSED in kinds:
        problems.append("it has unused pieces")
    if problems:
        raise ValueError(
            "tokenizer.json could not reproduce this SentencePiece model: " + "; ".join(problems)
        )


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
