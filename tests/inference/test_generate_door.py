"""The generate door: defaults, overrides, and errors without a traceback."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from tinyllama_jax import generate
from tinyllama_jax.config import Config, DataConfig, ModelConfig, SamplingConfig
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.runs import checkpoint, directory
from tinyllama_jax.text.tokenizer import SHIPPED_MODEL

MODEL = ModelConfig(
    vocab_size=4096, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
    max_seq_len=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    shapes = jax.eval_shape(Llama(MODEL).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    sampling = SamplingConfig(prompt="The prompt", max_new_tokens=100, seed=3)
    config = Config(model=MODEL, data=DataConfig(seq_len=40), sampling=sampling)
    directory.write_config(path, config)
    checkpoint.save_params(path, params, {})
    (path / "tokenizer.model").write_bytes(SHIPPED_MODEL.read_bytes())
    return path


def test_defaults_come_from_the_run_and_fit_its_context(run, capsys):
    generate.main([str(run)])
    printed = capsys.readouterr().out
    assert printed.startswith("The prompt")
    assert "ended by max_new_tokens" in printed
    assert f"next: python -m tinyllama_jax.generate {run} --prompt 'The prompt' --seed 4" in printed


def test_same_seed_same_text_other_seed_other_text(run, capsys):
    texts = []
    for seed in ("7", "7", "8"):
        generate.main([str(run), "--prompt", "x", "--seed", seed])
        texts.append(capsys.readouterr().out.rpartition("\n\n")[0])
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings(run, capsys):
    arguments = [str(run), "--prompt", "x"]
    generate.main(arguments)
    text = capsys.readouterr().out.rpartition("\n\n")[0]
    generate.main([*arguments, "--stop", text[9:12].replace("\n", "\\n")])
    printed = capsys.readouterr().out
    assert "ended by a stop string" in printed
    assert printed.rpartition("\n\n")[0] == text[: text.index(text[9:12])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "41"], "do not fit the context of 40 tokens"),
        (["--temperature", "-1"], "temperature = -1.0 must not be negative"),
        (["--step", "9"], "step 9"),
        (["--prompt", "long " * 100], "do not fit the context"),
    ],
)
def test_mistakes_are_answered_before_anything_is_printed(run, capsys, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate.main([str(run), *arguments])
    assert capsys.readouterr().out == ""


def test_a_mistake_is_a_message_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "tinyllama_jax.generate", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nothing is not there" in result.stderr and "Traceback" not in result.stderr
