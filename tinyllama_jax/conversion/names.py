"""One table between our params and the tensors of a Hugging Face Llama, read in both directions.

Ours are stacked over layers and keep heads and head width apart; theirs are one matrix per layer,
output axis first. Both use the half-rotation form of rotary embedding, so q and k need no
permutation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from tinyllama_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of parameter.

    Attributes:
      path: ours, nested keys joined by "/"; leaves under "layers/" are stacked over L.
      name: theirs, with "{layer}" where there is one per layer.
      axes: our axes without L, one letter each (model/llama.py names them).
      their_axes: theirs; letters that stand together are one flattened axis.
    """

    path: str
    name: str
    axes: str
    their_axes: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of our leaf, its layer axis included."""
        layers = (config.num_layers,) if self.stacked else ()
        return layers + tuple(_sizes(config)[axis] for axis in self.axes)

    def their_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one of their tensors."""
        sizes = _sizes(config)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.their_axes)

    def to_theirs(self, ours: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Their tensor (a view where possible) of one layer of our leaf."""
        order = [self.axes.index(axis) for axis in "".join(self.their_axes)]
        return ours.transpose(order).reshape(self.their_shape(config))

    def to_ours(self, theirs: np.ndarray, config: ModelConfig) -> np.ndarray:
        """One layer of our leaf (a view) of their tensor."""
        their_order = "".join(self.their_axes)
        split = theirs.reshape([_sizes(config)[axis] for axis in their_order])
        return split.transpose([their_order.index(axis) for axis in self.axes])


_LAYER = "model.layers.{layer}."

TABLE = (
    Row("embedding", "model.embed_tokens.weight", "VD", ("V", "D")),
    Row("layers/attention_norm", _LAYER + "input_layernorm.weight", "D", ("D",)),
    Row("layers/attention/query", _LAYER + "self_attn.q_proj.weight", "DNH", ("NH", "D")),
    Row("layers/attention/key", _LAYER + "self_attn.k_proj.weight", "DKH", ("KH", "D")),
    Row("layers/attention/value", _LAYER + "self_attn.v_proj.weight", "DKH", ("KH", "D")),
    Row("layers/attention/output", _LAYER + "self_attn.o_proj.weight", "NHD", ("D", "NH")),
    Row("layers/mlp_norm", _LAYER + "post_attention_layernorm.weight", "D", ("D",)),
    Row("layers/mlp/gate", _LAYER + "mlp.gate_proj.weight", "DF", ("F", "D")),
    Row("layers/mlp/up", _LAYER + "mlp.up_proj.weight", "DF", ("F", "D")),
    Row("layers/mlp/down", _LAYER + "mlp.down_proj.weight", "FD", ("D", "F")),
    Row("final_norm", "model.norm.weight", "D", ("D",)),
    Row("unembedding", "lm_head.weight", "DV", ("V", "D")),
)

OUTPUT_MATRIX = "lm_head.weight"
INPUT_MATRIX = "model.embed_tokens.weight"

# Buffers that older exports saved beside the weights; they follow from rope_theta.
_HARMLESS = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of their tensors: its name, its row of the table, and its layer (None: not per layer)."""

    name: str
    row: Row
    layer: int | None

    def take(self, leaf: np.ndarray | jax.Array, config: ModelConfig) -> np.ndarray:
        """Their tensor of our leaf."""
        one = leaf if self.layer is None else leaf[self.layer]
        return self.row.to_theirs(np.asarray(one), config)

    def put(self, leaf: np.ndarray, tensor: np.ndarray, config: ModelConfig) -> None:
        """Writes their tensor into our leaf, in the leaf's dtype."""
        leaf[... if self.layer is None else self.layer] = self.row.to_ours(tensor, config)


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model: all but the output matrix where the embedding is tied."""
    return tuple(r for r in TABLE if not (config.tie_embeddings and r.path == "unembedding"))


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a Hugging Face checkpoint of this model, layer by layer."""
    table = rows(config)
    first_layer_row = next(i for i, row in enumerate(table) if row.stacked)
    for row in table[:first_layer_row]:
        yield Entry(row.name, row, None)
    for layer in range(config.num_layers):
        for row in table:
            if row.stacked:
                yield Entry(row.name.format(layer=layer), row, layer)
    for row in table[first_layer_row:]:
        if not row.stacked:
            yield Entry(row.name, row, None)


def check_names(names: Iterable[str], config: ModelConfig) -> None:
    """Checks that a checkpoint's tensor names are exactly those of the model.

    Rotary buffers are passed over, and so is the output matrix of a tied model (its values are
    compared with the embedding when they are read).

    Raises:
      ValueError: names that occur twice, are missing, or are not known, all at once.
    """
    expected = {entry.name for entry in entries(config)}
    tolerated = {OUTPUT_MATRIX} if config.tie_embeddings else set()
    seen: set[str] = set()
    duplicate, unknown = [], []
    for name in names:
        if name in seen:
            duplicate.append(name)
        elif name not in expected | tolerated and not _HARMLESS.fullmatch(name):
            unknown.append(name)
        seen.add(name)
    missing = sorted(expected - seen)
    problems = []
    if duplicate:
        problems.append(f"stored more than once: {_some(sorted(duplicate))}")
    if missing:
        hint = ""
        if missing == [OUTPUT_MATRIX]:
            hint = ' (if the embedding is tied, config.json must say "tie_word_embeddings": true)'
        problems.append(f"missing: {_some(missing)}{hint}")
    if unknown:
        problems.append(
            f"not known: {_some(sorted(unknown))}; a Llama that has them computes something that "
            f"this package does not"
        )
    if problems:
        raise ValueError(
            f"the checkpoint's tensors are not those of a Llama with {config.num_layers} layers:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def check_shape(entry: Entry, shape: tuple[int, ...], config: ModelConfig) -> None:
    """Raises ValueError where a tensor's shape is not the one that the config implies."""
    expected = entry.row.their_shape(config)
    if tuple(shape) != expected:
        axes = " x ".join("*".join(group) for group in entry.row.their_axes)
        raise ValueError(
            f"{entry.name} has shape {tuple(shape)}, but config.json implies {expected} ({axes}); "
            f"weights and config.json are not of the same model"
        )


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "D": config.d_model,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.d_ff,
        "V": config.vocab_size,
    }


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
