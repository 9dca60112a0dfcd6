"""A model as a Hugging Face directory: weights, config.json and tokenizer files, both ways."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from tinyllama_jax.config import ModelConfig
from tinyllama_jax.conversion import hf_config, hf_tokenizer, names, shards
from tinyllama_jax.model.llama import Llama, Params
from tinyllama_jax.text.tokenizer import Tokenizer

# A right export differs by rounding, about 1e-6 of the logits' standard deviation; a wrong one by
# about 1.
VERIFY_TOLERANCE = 1e-3


def read_params(directory: pathlib.Path, config: ModelConfig) -> Params:
    """The float32 params of a Hugging Face Llama, as arrays on the default device.

    Tensors are read one at a time: host memory holds one stacked leaf beside what is on the device.

    Raises:
      ValueError: tensors unknown, missing, stored twice, of a wrong shape or of a dtype that is not
        a 16- or 32-bit float; a tied model whose output matrix is not its embedding.
    """
    leaves: dict[str, jax.Array] = {}
    with shards.Reader(directory) as reader:
        names.check_names(reader.names(), config)
        entries = list(names.entries(config))
        for entry in entries:
            names.check_shape(entry, reader.shape(entry.name), config)
        for row in names.rows(config):
            leaf = np.empty(row.shape(config), np.float32)
            for entry in entries:
                if entry.row is row:
                    entry.put(leaf, reader.read(entry.name), config)
            leaves[row.path] = jax.device_put(leaf)
        if config.tie_embeddings and names.OUTPUT_MATRIX in reader:
            _check_tied(reader)
    return unflatten_dict(leaves, sep="/")


def _check_tied(reader: shards.Reader) -> None:
    if not np.array_equal(reader.read(names.OUTPUT_MATRIX), reader.read(names.INPUT_MATRIX)):
        raise ValueError(
            f"config.json says tie_word_embeddings, but {names.OUTPUT_MATRIX} differs from "
            f"{names.INPUT_MATRIX}: one of them would be lost; set tie_word_embeddings to false "
            f"to load both"
        )


def write(
    directory: pathlib.Path,
    config: ModelConfig,
    leaves: Mapping[str, np.ndarray | jax.Array],
    tokenizer: Tokenizer | None,
    ids: hf_config.SpecialIds,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that transformers loads with `from_pretrained`.

    Host memory holds one shard and one of our leaves.

    Args:
      directory: an existing, empty directory.
      config: the model's config.
      leaves: float32 params by path ("layers/attention/query"), each asked for once.
      tokenizer: its files are written too; None: none are.
      ids: what config.json names as BOS and EOS.
      dtype: of the weights on disk, one of `shards.DTYPES`.
      max_shard_bytes: no weight file is larger, unless a single tensor is.

    Raises:
      ValueError: a dtype that is not known, weights that do not fit it, a tokenizer that
        tokenizer.json could not reproduce, or a shape that transformers refuses.
    """
    if dtype not in shards.DTYPES:
        raise ValueError(f'dtype "{dtype}" is not one of {", ".join(shards.DTYPES)}')
    _write_json(directory / "config.json", hf_config.from_model_config(config, dtype, ids))
    _write_json(directory / "generation_config.json", hf_config.generation_config(config, ids))
    if tokenizer is not None:
        hf_tokenizer.write(directory, tokenizer.model_proto, config.max_seq_len)
    unknown = leaves.keys() - {row.path for row in names.rows(config)}
    if unknown:
        raise ValueError(f"a Hugging Face Llama has no place for the params {sorted(unknown)}")
    # Leaf by leaf rather than layer by layer: so each is read once, and one is held.
    order = {row.path: number for number, row in enumerate(names.rows(config))}
    entries = {
        entry.name: entry
        for entry in sorted(names.entries(config), key=lambda entry: order[entry.row.path])
    }

    held: dict[str, np.ndarray] = {}  # the leaf of the tensor before

    def tensor(name: str) -> np.ndarray:
        row = entries[name].row
        if row.path not in held:
            held.clear()
            held[row.path] = np.asarray(leaves[row.path])
            assert held[row.path].shape == row.shape(config), (row.path, held[row.path].shape)
        return entries[name].take(held[row.path], config)

    shapes = {name: entry.row.their_shape(config) for name, entry in entries.items()}
    shards.write(directory, shapes, shards.DTYPES[dtype], tensor, max_shard_bytes)


@dataclasses.dataclass(frozen=True)
class Verification:
    """How an exported model, run by transformers, compares with ours.

    Attributes:
      transformers: the version that ran it.
      largest_difference: of any logit.
      relative_difference: the same over the standard deviation of our logits.
      texts: texts whose ids were compared; 0 without a tokenizer.
      wrong_texts: those whose ids differ.
    """

    transformers: str
    largest_difference: float
    relative_difference: float
    texts: int
    wrong_texts: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.relative_difference < VERIFY_TOLERANCE and not self.wrong_texts


# Leading, trailing and repeated spaces, line ends, digits, bytes, and pieces that are never merged.
_TEXTS = (
    "Once upon a time", " leading", "  two  spaces  ", "\n\ttabs\n\n", "def f(x):\n    return x+1",
    "3.14159 and 2026", "naïve Größe", "日本語と한국어", "🙂👩‍👩‍👧", "\x00\x7f\u200b", "</ s>",
)  # fmt: skip


def check_verifiable() -> None:
    """Raises ValueError where transformers or torch is not installed."""
    import importlib.util

    absent = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if absent:
        raise ValueError(
            f"--verify runs the export with {' and '.join(absent)}, which is not installed; "
            f"pip install 'tinyllama_jax[parity]', or leave --verify out"
        )


def verify(
    directory: pathlib.Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None
) -> Verification:
    """Runs an exported directory with transformers and our model on the same ids, both in float32.

    Our weights are rounded to the export's dtype first, so that what differs is the conversion.
    Needs memory for another copy of the model, in torch.
    """
    import torch
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    dtype = shards.DTYPES[hf_config.read(directory)["torch_dtype"]]
    if dtype != np.float32:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params)
    ours = Llama(dataclasses.replace(config, compute_dtype="float32"))
    length = min(64, config.max_seq_len)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    with jax.default_matmul_precision("highest"):
        hidden, _ = jax.jit(ours.apply)(params, tokens.astype(np.int32))
        expected = np.asarray(ours.logits(params, hidden))
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens)).logits.numpy()
    wrong: tuple[str, ...] = ()
    if tokenizer is not None:
        loaded = transformers.AutoTokenizer.from_pretrained(directory)
        wrong = tuple(
            text
            for text in _TEXTS
            if loaded.encode(text, add_special_tokens=False) != tokenizer.encode(text)
        )
    difference = float(np.abs(found - expected).max())
    return Verification(
        transformers=transformers.__version__,
        largest_difference=difference,
        relative_difference=difference / float(expected.std()),
        texts=len(_TEXTS) if tokenizer is not None else 0,
        wrong_texts=wrong,
    )


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
