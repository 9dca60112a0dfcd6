"""What is found before anything compiles: each rule with a config that breaks it."""

import dataclasses

import pytest

from tinyllama_jax.config import load_config_file
from tinyllama_jax.training import preflight

QUICKSTART = load_config_file("configs/quickstart.py")


def changed(**changes):
    config = QUICKSTART
    for name, value in changes.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


def examine(config, run_dir):
    findings = preflight.examine(config, run_dir)
    return [(f.level, f"{f.subject}: {f.text}") for f in findings]


def test_the_quickstart_is_in_order(tmp_path):
    found = examine(changed(data__prepared=str(tmp_path)), tmp_path / "not" / "yet")
    assert {level for level, _ in found} == {"ok"}, found
    lines = dict(text.split(": ", 1) for _, text in found)
    assert "1,024 tokens a step = 4 sequences of 256 = 1 passes of 4; 500 steps" in lines["batch"]
    assert "MB, to be prepared in " in lines["source text"]


@pytest.mark.parametrize(
    "changes, level, line",
    [
        ({"data__tokenizer": "absent.model"}, "problem", "tokenizer: cannot read the tokenizer"),
        ({"model__vocab_size": 4095}, "problem", "config: .*the tokenizer has 4096 pieces"),
        ({"model__vocab_size": 8192}, "warning", "tokenizer: .* leaves 4096 embedding rows"),
        ({"optimizer__learning_rate": 1.0}, "warning", "learning rate: 1 is far .*divergence"),
        ({"optimizer__learning_rate": 1e-5, "optimizer__min_learning_rate": 0.0}, "warning",
         "learning rate: 1e-05 is far .*a slow start"),
        ({"optimizer__min_learning_rate": 8e-3}, "warning", "learning rate: it never decays"),
        ({"optimizer__warmup_steps": 200}, "warning", "learning rate: warm-up takes 200 of 500"),
        ({"model__compute_dtype": "bfloat16"}, "warning", "precision: bfloat16 is emulated on CPU"),
        ({"model__remat": "full", "model__scan_unroll": 0}, "warning", "remat: .*frees nothing"),
        ({"model__d_model": 1 << 20}, "problem", "memory: .*does not fit on one device"),
        ({"checkpoint__keep_last": 10**9}, "warning", "disk: .*would fill the disk"),
    ],
)  # fmt: skip
def test_each_rule_is_told(tmp_path, changes, level, line):
    found = examine(changed(data__prepared=str(tmp_path), **changes), tmp_path)
    matching = [found_level for found_level, text in found if _matches(line, text)]
    assert matching == [level], found


def _matches(pattern, text):
    import re

    return re.match(pattern, text.replace("\n", " ")) is not None


def test_text_that_is_not_there_is_a_problem(tmp_path):
    sources = tuple(
        dataclasses.replace(source, path=str(tmp_path / "absent"), format="auto")
        for source in QUICKSTART.data.sources
    )
    found = examine(changed(data__sources=sources, data__prepared=str(tmp_path)), tmp_path)
    problems = [text for level, text in found if level == "problem"]
    assert len(problems) == 2 and 'absent" does not exist' in problems[0]


def test_the_machine():
    findings = preflight.examine_machine()
    assert findings[0].subject == "versions" and "jaxlib" in findings[0].text
    assert "cores" in next(f.text for f in findings if f.subject == "devices")


def test_another_jax_is_warned_of(monkeypatch):
    version = preflight.metadata.version
    monkeypatch.setattr(
        preflight.metadata, "version", lambda name: "0.9.1" if name == "jax" else version(name)
    )
    (finding,) = [f for f in preflight.examine_machine() if f.level == "warning"]
    assert "version 0.9.1 is not one of 0.10 to 0.12" in finding.text
