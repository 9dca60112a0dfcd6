"""Our Llama against transformers' LlamaForCausalLM, weights carried over in both directions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tinyllama_jax import convert
from tinyllama_jax.config import Config, ModelConfig
from tinyllama_jax.conversion import hf
from tinyllama_jax.conversion.hf_config import SpecialIds, from_model_config
from tinyllama_jax.conversion.load import load
from tinyllama_jax.conversion.names import entries
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.runs import checkpoint, directory
from tinyllama_jax.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="needs the [parity] extra")
transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")


def config(groups, head_dim, tied):
    return ModelConfig(
        vocab_size=101, num_layers=2, num_heads=8, num_kv_heads=8 // groups, head_dim=head_dim,
        d_model=64, d_ff=88, max_seq_len=48, rope_theta=5e3, tie_embeddings=tied,
        compute_dtype="float32",
    )  # fmt: skip


# One per group size, head width and tying by default; all combinations under slow.
_QUICK = {(1, 32, False), (4, 64, True), (8, 128, False)}
CONFIGS = [
    pytest.param(
        config(groups, head_dim, tied),
        id=f"G{groups}-H{head_dim}-{'tied' if tied else 'untied'}",
        marks=() if (groups, head_dim, tied) in _QUICK else pytest.mark.slow,
    )
    for groups in (1, 4, 8)
    for head_dim in (32, 64, 128)
    for tied in (False, True)
]
# The graph is compared, not LLVM's optimisation of it, which would be most of the tests' time.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
TOKENS = np.random.default_rng(7).integers(0, 101, (3, 40)).astype(np.int32)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Torch's spinning threads and XLA's would take the cores from each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_params(model):
    """Norms around 1 and matrices a little larger than the init's.

    Much larger ones would only make the logits ill-conditioned: transformers' own float32 logits
    then lie 2e-5 from its float64 ones.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rng.normal("norm" in path[-1].key, 0.1, leaf.shape).astype(np.float32),
        shapes,
    )


def our_logits(model, params, tokens):
    hidden, _ = jax.jit(model.apply, compiler_options=COMPILER_OPTIONS)(params, tokens)
    return model.logits(params, hidden)


def their_logits(theirs, tokens):
    return theirs(torch.from_numpy(tokens).long()).logits


def assert_close_logits(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert np.abs(ours - theirs).max() < 2e-5 * theirs.std()


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_and_gradients_after_to_hf(tmp_path, config):
    model = Llama(config)
    params = random_params(model)
    hf.write(tmp_path, config, flatten_dict(params, sep="/"), None, SpecialIds(1, (2,)))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = their_logits(theirs, TOKENS)
    targets = np.roll(TOKENS, -1, axis=1)
    torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), torch.from_numpy(targets).long().flatten()
    ).backward()

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        hidden, _ = model.apply(params, TOKENS)
        logits = model.logits(params, hidden)
        logps = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logps, jnp.asarray(targets)[..., None], axis=-1).mean(), logits

    (_, logits), gradients = jax.jit(loss, compiler_options=COMPILER_OPTIONS)(params)
    assert_close_logits(logits, expected)
    gradients = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    weights = dict(theirs.named_parameters())
    for entry in entries(config):
        found = entry.take(gradients[entry.row.path], config)
        expected = weights[entry.name].grad.numpy()
        difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert difference < 1e-4, (entry.name, difference)


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_after_from_hf(tmp_path, config):
    settings = from_model_config(config, "float32", SpecialIds(1, (2,)))
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
        expected = their_logits(theirs, TOKENS)
    theirs.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert dataclasses.replace(loaded.config.model, compute_dtype="float32") == config
    assert_close_logits(our_logits(Llama(config), loaded.params, TOKENS), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_of_transformers(tmp_path, dtype):
    small = config(4, 32, False)
    torch.manual_seed(4)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**from_model_config(small, dtype, SpecialIds(1, (2,))))
    ).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    # Not theirs.float(): rounding to 16 bits has also rounded its rotary frequencies.
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = their_logits(theirs, TOKENS)
    assert_close_logits(our_logits(Llama(small), load(tmp_path).params, TOKENS), expected)


def test_verify_catches_a_wrong_export(tmp_path):
    small = config(4, 32, False)
    params = random_params(Llama(small))
    hf.write(
        tmp_path, small, flatten_dict(params, sep="/"), None, SpecialIds(1, (2,)), dtype="bfloat16"
    )
    swapped = params["layers"]["mlp"]
    swapped["gate"], swapped["up"] = swapped["up"], swapped["gate"]
    wrong = hf.verify(tmp_path, small, params, None)
    assert not wrong.ok and wrong.relative_difference > 0.01


def test_door_verifies_weights_and_tokenizer(tmp_path, capsys):
    small = dataclasses.replace(config(4, 32, False), vocab_size=4096)
    directory.write_config(tmp_path / "run", Config(model=small))
    checkpoint.save_params(tmp_path / "run", random_params(Llama(small)), {})
    (tmp_path / "run" / "tokenizer.model").write_bytes(Tokenizer().model_proto)
    convert.main(["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--verify"])
    printed = capsys.readouterr().out
    assert "largest logit difference" in printed and "11 of 11 texts give the same ids" in printed
