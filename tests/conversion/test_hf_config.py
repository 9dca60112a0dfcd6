"""config.json in all the forms it comes in."""

import pytest

from tinyllama_jax.config import ModelConfig
from tinyllama_jax.conversion import hf_config
from tinyllama_jax.conversion.hf_config import SpecialIds

TINYLLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def test_tinyllama():
    assert hf_config.to_model_config(TINYLLAMA) == ModelConfig()


def test_there_and_back():
    model = ModelConfig(
        vocab_size=300, d_model=96, num_heads=6, num_kv_heads=3, head_dim=32, rope_theta=5e5,
        norm_eps=1e-6, tie_embeddings=True, max_seq_len=77,
    )  # fmt: skip
    written = hf_config.from_model_config(model, "bfloat16", SpecialIds(1, (2, 5)))
    assert hf_config.to_model_config(written) == model
    assert hf_config.special_ids(written) == SpecialIds(1, (2, 5))


@pytest.mark.parametrize(
    "theta",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_parameters": {"rope_theta": 500000.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_rope_theta_of_every_transformers_version(theta):
    without = {key: value for key, value in TINYLLAMA.items() if not key.startswith("rope")}
    assert hf_config.to_model_config(without | theta).rope_theta == 5e5


def test_what_is_absent_has_transformers_meaning():
    absent = ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "rope_theta",
              "tie_word_embeddings", "rope_scaling", "hidden_act")  # fmt: skip
    short = {key: value for key, value in TINYLLAMA.items() if key not in absent}
    model = hf_config.to_model_config(short | {"head_dim": None})
    assert (model.num_kv_heads, model.head_dim, model.norm_eps) == (32, 64, 1e-6)
    assert (model.max_seq_len, model.rope_theta, model.tie_embeddings) == (2048, 1e4, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, 'model_type is "mistral"'),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling is of type "linear"'),
        ({"rope_parameters": {"rope_type": "llama3"}}, 'rope_parameters is of type "llama3"'),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "but 500000.0 inside rope_parameters"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_is_not_implemented_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        hf_config.to_model_config(TINYLLAMA | change)


def test_all_reasons_are_given_at_once():
    with pytest.raises(ValueError, match=r"(?s)attention_bias.*mlp_bias"):
        hf_config.to_model_config(TINYLLAMA | {"attention_bias": True, "mlp_bias": True})


def test_config_json_that_is_absent_or_broken(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf_config.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="is not JSON"):
        hf_config.read(tmp_path)


def test_shape_that_transformers_refuses_is_refused_here():
    with pytest.raises(ValueError, match="d_model = 100 is not a multiple"):
        hf_config.from_model_config(
            ModelConfig(d_model=100, num_heads=3, num_kv_heads=3), "float32", SpecialIds(1, (2,))
        )
