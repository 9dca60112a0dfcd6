"""The table of parameter names, against shapes and values worked out by hand."""

import jax
import numpy as np
import pytest

from tinyllama_jax.config import ModelConfig
from tinyllama_jax.conversion import names
from tinyllama_jax.model.llama import Llama

CONFIG = ModelConfig(
    vocab_size=11, num_layers=2, d_model=6, num_heads=4, num_kv_heads=2, head_dim=2, d_ff=5
)


def hf_names(config):
    return [entry.name for entry in names.entries(config)]


def leaf_of(path, config=CONFIG):
    row = next(row for row in names.TABLE if row.path == path)
    shape = row.shape(config)
    return row, np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("tied", [False, True])
def test_table_covers_every_parameter_with_its_shape(tied):
    config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": tied})
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0))
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    ours = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
    assert ours == {row.path: row.shape(config) for row in names.rows(config)}


def test_query_rows_are_heads_in_order():
    row, leaf = leaf_of("layers/attention/query")
    theirs = row.to_theirs(leaf[1], CONFIG)
    assert theirs.shape == (8, 6)
    for head in range(4):
        for channel in range(2):
            np.testing.assert_array_equal(theirs[head * 2 + channel], leaf[1, :, head, channel])


def test_output_columns_are_heads_in_order():
    row, leaf = leaf_of("layers/attention/output")
    theirs = row.to_theirs(leaf[0], CONFIG)
    assert theirs.shape == (6, 8)
    np.testing.assert_array_equal(theirs[:, 5], leaf[0, 2, 1])


def test_matrices_are_transposed_and_the_embedding_is_not():
    for path in ("layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"):
        row, leaf = leaf_of(path)
        np.testing.assert_array_equal(row.to_theirs(leaf[1], CONFIG), leaf[1].T)
    row, leaf = leaf_of("unembedding")
    np.testing.assert_array_equal(row.to_theirs(leaf, CONFIG), leaf.T)
    row, leaf = leaf_of("embedding")
    np.testing.assert_array_equal(row.to_theirs(leaf, CONFIG), leaf)


def test_there_and_back_is_the_identity():
    for entry in names.entries(CONFIG):
        _, leaf = leaf_of(entry.row.path)
        back = np.array(leaf)
        part = ... if entry.layer is None else entry.layer
        back[part] = 0
        entry.put(back, entry.take(leaf, CONFIG), CONFIG)
        np.testing.assert_array_equal(back, leaf, err_msg=entry.name)


def test_names_are_those_of_hugging_face():
    found = hf_names(CONFIG)
    assert found[:2] == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    assert found[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert len(found) == len(set(found)) == 3 + 2 * 9


def test_missing_unknown_and_duplicate_names_are_all_told():
    found = hf_names(CONFIG)
    found.remove("model.layers.1.mlp.up_proj.weight")
    found += ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias"]
    with pytest.raises(ValueError) as error:
        names.check_names(found, CONFIG)
    assert "more than once: model.norm.weight" in str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "not known: model.layers.0.self_attn.q_proj.bias" in str(error.value)


def test_a_layer_too_many_is_unknown():
    with pytest.raises(ValueError, match=r"not known: model\.layers\.2\.input_layernorm\.weight"):
        names.check_names([*hf_names(CONFIG), "model.layers.2.input_layernorm.weight"], CONFIG)


def test_rotary_buffers_are_harmless():
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    names.check_names(hf_names(CONFIG) + buffers, CONFIG)


def test_untied_model_without_output_matrix_hints_at_tying():
    found = [name for name in hf_names(CONFIG) if name != "lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight.*tie_word_embeddings"):
        names.check_names(found, CONFIG)


def test_wrong_shape_names_the_tensor_and_both_shapes():
    entry = next(e for e in names.entries(CONFIG) if "k_proj" in e.name)
    with pytest.raises(
        ValueError, match=r"k_proj.weight has shape \(8, 6\).*\(4, 6\) \(K\*H x D\)"
    ):
        names.check_shape(entry, (8, 6), CONFIG)
