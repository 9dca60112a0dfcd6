"""config.json, environment.json, and what a door is told about a wrong path."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tinyllama_jax.config import Config, ModelConfig, SourceConfig
from tinyllama_jax.runs.checkpoint import save_params
from tinyllama_jax.runs.directory import (
    CONFIG,
    ENVIRONMENT,
    check_same_run,
    keep_tokenizer,
    read_config,
    record_environment,
    resolve_run,
    write_config,
)


def with_settings(config: Config, section: str, **changes) -> Config:
    changed = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: changed})


CONFIGURED = with_settings(
    Config(),
    "data",
    sources=(SourceConfig("books", "books/*.txt"), SourceConfig("code", "code", weight=0.3)),
)


def test_a_config_is_read_back_as_it_was(tmp_path):
    write_config(tmp_path / "new" / "run", CONFIGURED)
    assert read_config(tmp_path / "new" / "run") == CONFIGURED


def test_a_config_of_unknown_settings_is_named(tmp_path):
    (tmp_path / CONFIG).write_text('{"model": {"widht": 3}}')
    with pytest.raises(ValueError, match=r"config\.json cannot be used: .*\n.*model\.widht"):
        read_config(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        read_config(tmp_path)


def test_the_same_config_goes_on(tmp_path, capsys):
    check_same_run(tmp_path, CONFIGURED)
    check_same_run(tmp_path, CONFIGURED)
    assert read_config(tmp_path) == CONFIGURED
    assert capsys.readouterr().out == ""


def log_a_step(run_dir):
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')


def test_a_start_that_made_nothing_binds_nobody(tmp_path):
    """Where the first start failed, on a misspelt path say, the mended config is the run's."""
    check_same_run(tmp_path, CONFIGURED)
    mended = with_settings(CONFIGURED, "data", sources=(SourceConfig("books", "book/*.txt"),))
    check_same_run(tmp_path, mended)
    assert read_config(tmp_path) == mended
    log_a_step(tmp_path)
    with pytest.raises(ValueError, match="was started with other settings"):
        check_same_run(tmp_path, CONFIGURED)


def test_a_run_keeps_its_tokenizer(tmp_path):
    keep_tokenizer(tmp_path, b"first")
    keep_tokenizer(tmp_path, b"second")  # nothing was made with the first
    log_a_step(tmp_path)
    keep_tokenizer(tmp_path, b"second")
    with pytest.raises(ValueError, match="is not the tokenizer that data"):
        keep_tokenizer(tmp_path, b"third")
    assert (tmp_path / "tokenizer.model").read_bytes() == b"second"


def test_what_matters_refuses_with_every_difference(tmp_path):
    check_same_run(tmp_path, CONFIGURED)
    log_a_step(tmp_path)
    before = (tmp_path / CONFIG).read_bytes()
    changed = with_settings(CONFIGURED, "optimizer", learning_rate=1.0)
    changed = with_settings(changed, "model", d_model=64)
    with pytest.raises(ValueError, match="was started with other settings") as error:
        check_same_run(tmp_path, changed)
    assert "optimizer.learning_rate: 0.0004 -> 1.0" in str(error.value)
    assert "model.d_model: 2048 -> 64" in str(error.value)
    assert "--workdir" in str(error.value)
    assert (tmp_path / CONFIG).read_bytes() == before


def test_what_may_change_is_printed_and_kept(tmp_path, capsys):
    check_same_run(tmp_path, CONFIGURED)
    log_a_step(tmp_path)
    changed = with_settings(CONFIGURED, "logging", every_steps=3)
    check_same_run(tmp_path, changed)
    assert "logging.every_steps: 10 -> 3" in capsys.readouterr().out
    assert read_config(tmp_path) == changed


def test_imported_params_bind_the_model_alone(tmp_path):
    model = ModelConfig(num_layers=2)
    write_config(tmp_path, Config(model=model))
    save_params(tmp_path, {"w": np.zeros(3, np.float32)}, {})
    with pytest.raises(ValueError, match=r"model\.num_layers: 2 -> 22"):
        check_same_run(tmp_path, CONFIGURED)
    config = with_settings(
        dataclasses.replace(CONFIGURED, model=model), "optimizer", learning_rate=1e-5
    )
    check_same_run(tmp_path, config)
    assert read_config(tmp_path) == config


def test_checkpoints_without_a_config_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has checkpoints but no config\.json"):
        check_same_run(tmp_path, CONFIGURED)


def test_a_path_that_is_no_run_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="there is no run directory at"):
        resolve_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config\.json"):
        resolve_run(tmp_path)
    run = tmp_path / "quickstart"
    write_config(run, CONFIGURED)
    assert resolve_run(str(run)) == run
    with pytest.raises(ValueError, match="it contains the runs quickstart"):
        resolve_run(tmp_path)
    (run / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"give the run directory itself, {run}, .*--step"):
        resolve_run(run / "checkpoints" / "10")


def test_each_start_adds_an_entry_of_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("SECRET_OF_SOMEBODY", "hidden")
    record_environment(tmp_path)
    (tmp_path / ENVIRONMENT).write_text((tmp_path / ENVIRONMENT).read_text())
    record_environment(tmp_path)
    first, second = json.loads((tmp_path / ENVIRONMENT).read_text())
    assert first["versions"]["jax"] == jax.__version__
    assert all(first["versions"].values())
    assert sum(first["devices"].values()) == jax.device_count()
    assert first["variables"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert "hidden" not in json.dumps(first)
    assert second["command"] == first["command"] != ""


def test_a_damaged_environment_does_not_stop_a_start(tmp_path):
    (tmp_path / ENVIRONMENT).write_text('[{"started":')
    record_environment(tmp_path)
    assert len(json.loads((tmp_path / ENVIRONMENT).read_text())) == 1
