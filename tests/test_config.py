"""The settings: every shipped config, every rule, and what a mistake is answered with."""

import ast
import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from tinyllama_jax.config import (
    Config,
    OptimizerConfig,
    SourceConfig,
    StageConfig,
    default_config,
    freeze,
    load_config_file,
    source,
    stage,
    to_dict,
)
from tinyllama_jax.config_rules import validate
from tinyllama_jax.kernels.attention.api import IMPLEMENTATIONS
from tinyllama_jax.model.llama import parameter_count
from tinyllama_jax.runs.directory import differences

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
# Devices that a config is written for, where that is not one.
DEVICES = {"tinyllama_1b": 16, "tinyllama_1b_v1_1": 16}

TINY = load_config_file(str(ROOT / "configs/tiny_debug.py"))
BOOKS = SourceConfig(name="books", path="books/*.txt")


def changed(config=TINY, **settings):
    """The config with `section__field=value` set."""
    for name, value in settings.items():
        section, field = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request):
    return request.param


def test_shipped_configs_are_valid(file):
    config = load_config_file(str(file))
    validate(config, device_count=DEVICES.get(file.stem, 1))
    assert config.data.sources
    assert config.accumulation_steps(DEVICES.get(file.stem, 1)) >= 1


def test_shipped_configs_survive_json(file):
    config = load_config_file(str(file))
    assert freeze(json.loads(json.dumps(to_dict(config)))) == config
    assert hash(config) == hash(load_config_file(str(file)))


def test_headers_give_command_and_hardware(file):
    header = ast.get_docstring(ast.parse(file.read_text()))
    assert f"Command:   python -m tinyllama_jax.train --config=configs/{file.name}" in header
    assert "\nHardware:  " in header


def test_tinyllama_1b_is_the_papers_run():
    """The reference model and run (arXiv 2401.02385), value by value."""
    config = load_config_file(str(ROOT / "configs/tinyllama_1b.py"))
    expected = {
        "model": {
            "num_layers": 22, "d_model": 2048, "num_heads": 32, "num_kv_heads": 4, "head_dim": 64,
            "d_ff": 5632, "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_embeddings": False,
            "vocab_size": 32000, "max_seq_len": 2048,
        },
        "data": {"seq_len": 2048, "document_mask": False},
        "optimizer": {
            "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1,
            "weight_decay_rule": "all", "grad_clip_norm": 1.0, "learning_rate": 4e-4,
            "min_learning_rate": 4e-5, "warmup_steps": 2000, "schedule": "cosine", "decay_steps": 0,
        },
        "training": {
            "train_tokens": 3 * 10**12, "global_batch_tokens": 2_097_152, "micro_batch_size": 8,
            "z_loss": 0.0,
        },
    }  # fmt: skip
    tree = to_dict(config)
    for section, values in expected.items():
        assert {name: tree[section][name] for name in values} == values
    weights = {entry.name: entry.weight for entry in config.data.sources}
    assert weights == {"slimpajama": 0.693584, "starcoder": 0.306416}
    assert parameter_count(config.model) == 1_100_048_384
    assert config.total_steps == 1_430_512
    assert config.batch_rows == 1024
    # 16 GPUs with micro-batches of 8: each GPU runs 8 a step.
    assert config.accumulation_steps(device_count=16) == 8


def test_tinyllama_1b_v1_1_has_its_cards_stages():
    config = load_config_file(str(ROOT / "configs/tinyllama_1b_v1_1.py"))
    basic, domain, cooldown = config.timeline
    assert basic.batch_tokens == domain.batch_tokens == 1_835_008  # about 1.8M
    assert cooldown.batch_tokens == 4 * 1_835_008  # about 7.2M
    assert (basic.end_step, domain.end_step, cooldown.end_step) == (817_436, 1_008_171, 1_028_607)
    assert config.tokens_at(basic.end_step) == pytest.approx(1.5e12, rel=1e-5)
    assert config.tokens_at(config.total_steps) == pytest.approx(2e12, rel=1e-5)
    assert basic.settings.weights == "slimpajama:1" and basic.settings.ramp_tokens == 0
    assert domain.settings.ramp_tokens == 6 * 10**9
    assert {s.name: s.weight for s in config.data.sources} == {
        "slimpajama": 75, "starcoder": 15, "proof_pile": 10,
    }  # fmt: skip
    assert not any(stage.settings.schedule for stage in config.timeline)
    assert parameter_count(config.model) == 1_100_048_384


def test_the_defaults_are_a_config_themselves():
    assert freeze(default_config()) == Config()
    assert freeze({}) == Config()


def test_sources_are_sorted_by_name_and_come_back():
    config = default_config()
    config.data.sources.news = source(path="news/*.jsonl", weight=2, text_key="body")
    config.data.sources.books = source(path="books/*.txt")
    frozen = freeze(config)
    assert frozen.data.sources == (
        BOOKS,
        SourceConfig(name="news", path="news/*.jsonl", weight=2.0, text_key="body"),
    )
    assert freeze(to_dict(frozen)) == frozen


def test_a_frozen_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.model.d_model = 1


# One broken setting per rule, and words of the line that it is answered with.
RULES = [
    ({"model__num_layers": 0}, "model.num_layers = 0 must be greater than 0"),
    ({"model__rope_theta": -1.0}, "model.rope_theta = -1.0 must be greater than 0"),
    ({"model__scan_unroll": -1}, "model.scan_unroll = -1 must not be negative"),
    ({"model__num_heads": 5}, "model.num_heads = 5 is not a multiple of model.num_kv_heads = 2"),
    ({"model__head_dim": 15}, "model.head_dim = 15 is odd"),
    ({"model__scan_unroll": 3}, "scan_unroll = 3 does not divide model.num_layers = 2; set a"),
    ({"model__max_seq_len": 32}, "data.seq_len = 64 is longer than model.max_seq_len = 32"),
    ({"model__compute_dtype": "fp16"}, 'compute_dtype = "fp16" is not one of auto, float32, bf'),
    (
        {"model__attention": "fast"},
        f'model.attention = "fast" is not one of {", ".join(IMPLEMENTATIONS)}',
    ),
    ({"model__remat": "some"}, 'model.remat = "some" is not one of none, dots, attention, full'),
    ({"data__boundary": "nl"}, 'data.boundary = "nl" is not one of bos+eos, bos, eos'),
    ({"data__seq_len": 0}, "data.seq_len = 0 must be greater than 0"),
    (
        {"optimizer__learning_rate": 0.0, "optimizer__min_learning_rate": 0.0},
        "optimizer.learning_rate = 0.0 must be greater than 0",
    ),
    ({"optimizer__eps": 0.0}, "optimizer.eps = 0.0 must be greater than 0"),
    ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay = -0.1 must not be negative"),
    ({"optimizer__grad_clip_norm": -1.0}, "optimizer.grad_clip_norm = -1.0 must not be negative"),
    ({"optimizer__beta1": 1.0}, "optimizer.beta1 = 1.0 must be in [0, 1)"),
    ({"optimizer__beta2": -0.1}, "optimizer.beta2 = -0.1 must be in [0, 1)"),
    (
        {"optimizer__min_learning_rate": 0.1},
        "min_learning_rate = 0.1 is above optimizer.learning_r",
    ),
    ({"optimizer__schedule": "step"}, 'optimizer.schedule = "step" is not one of cosine, linear'),
    ({"optimizer__weight_decay_rule": "no"}, 'weight_decay_rule = "no" is not one of all, matri'),
    ({"optimizer__warmup_steps": 50}, "warmup_steps = 50 does not end within the 50 steps"),
    ({"optimizer__decay_steps": 46}, "warmup_steps + decay_steps = 51 is more than the 50 steps"),
    ({"training__train_tokens": 0}, "training.train_tokens = 0 must be greater than 0"),
    ({"training__micro_batch_size": 3}, "512 is not a multiple of the 192 tokens of one pass (mic"),
    ({"training__micro_batch_size": 3}, "1 devices); the nearest that fits is 576"),
    ({"training__z_loss": -1.0}, "training.z_loss = -1.0 must not be negative"),
    ({"training__seed": -1}, "training.seed = -1 must not be negative"),
    ({"evaluation__tokens": -1}, "evaluation.tokens = -1 must not be negative"),
    ({"checkpoint__keep_last": 0}, "checkpoint.keep_last = 0 must be greater than 0"),
    ({"checkpoint__milestone_tokens": -1}, "checkpoint.milestone_tokens = -1 must not be negati"),
    ({"logging__every_steps": 0}, "logging.every_steps = 0 must be greater than 0"),
    ({"sampling__top_p": 0.0}, "sampling.top_p = 0.0 must be in (0, 1] (1: off)"),
    ({"sampling__top_p": 2.0}, "sampling.top_p = 2.0 must be in (0, 1] (1: off)"),
    ({"sampling__max_new_tokens": 0}, "sampling.max_new_tokens = 0 must be at least 1"),
    ({"sampling__temperature": -1.0}, "sampling.temperature = -1.0 must not be negative"),
]


@pytest.mark.parametrize("settings, message", RULES, ids=lambda value: next(iter(value), None))
def test_every_rule_has_its_line(settings, message):
    validate(TINY)
    with pytest.raises(ValueError) as caught:
        validate(changed(**settings))
    assert message in str(caught.value)
    assert "the config has a problem:\n  - " in str(caught.value)  # and no second one


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"format": "csv"}, 'data.sources.books.format = "csv" is not one of auto, text'),
        ({"path": ""}, "data.sources.books.path is empty: name the files to read"),
        ({"weight": 0.0}, "data.sources.books.weight = 0.0 must be greater than 0; to leave a"),
        ({"validation_fraction": 1.0}, "books.validation_fraction = 1.0 must be in [0, 1)"),
        ({"name": "a/b"}, "data.sources.a/b: a source's name becomes a directory"),
    ],
)
def test_every_rule_of_a_source_has_its_line(settings, message):
    validate(changed(data__sources=(BOOKS,)))
    with pytest.raises(ValueError) as caught:
        validate(changed(data__sources=(dataclasses.replace(BOOKS, **settings),)))
    assert message in str(caught.value)


def test_a_batch_must_divide_over_the_devices():
    validate(TINY, device_count=2)
    with pytest.raises(ValueError, match=r"the 768 tokens of one pass .* 3 devices.* fits is 768"):
        validate(TINY, device_count=3)


def test_a_tokenizer_must_fit_the_vocabulary():
    validate(TINY, tokenizer_vocab_size=4096)
    with pytest.raises(ValueError, match=r"the tokenizer has 4097 pieces .* = 4097"):
        validate(TINY, tokenizer_vocab_size=4097)


def test_all_problems_are_raised_at_once():
    broken = changed(model__head_dim=15, optimizer__beta1=2.0, data__boundary="?")
    with pytest.raises(ValueError) as caught:
        validate(broken, tokenizer_vocab_size=5000)
    text = str(caught.value)
    assert text.startswith("the config has 4 problems:\n")
    for word in ("head_dim", "beta1", "boundary", "tokenizer"):
        assert sum(word in line for line in text.splitlines()) == 1


def test_unknown_keys_and_wrong_types_are_raised_at_once():
    tree = {
        "optimizer": {"learning_rat": 1.0, "beta1": "0.9"},
        "modle": {},
        "data": {"sources": {"books": {"path": "x", "wieght": 2.0}}, "seq_len": 1.5},
        "training": {"seed": True},
        "logging": {"tensorboard": 1},
    }
    with pytest.raises(ValueError) as caught:
        freeze(tree)
    assert str(caught.value).splitlines() == [
        "the config has 7 problems:",
        '  - config.optimizer.learning_rat is not a setting; did you mean "learning_rate"?',
        "  - config.optimizer.beta1 = '0.9' is a str, not float",
        '  - config.modle is not a setting; did you mean "model"?',
        '  - config.data.sources.books.wieght is not a setting; did you mean "weight"?',
        "  - config.data.seq_len = 1.5 is a float, not int",
        "  - config.training.seed = True is a bool, not int",
        "  - config.logging.tensorboard = 1 is a int, not bool",
    ]


def test_sources_that_are_no_sources_are_named():
    with pytest.raises(ValueError, match=r"sources\.books = 'b/\*\.txt': set it to source\(path="):
        freeze({"data": {"sources": {"books": "b/*.txt"}}})
    with pytest.raises(ValueError, match=r"config\.data\.sources = \['x'\]: set .*\.NAME = source"):
        freeze({"data": {"sources": ["x"]}})


STAGED = changed(
    training__train_tokens=100 * 512,
    data__sources=tuple(
        dataclasses.replace(BOOKS, name=name, weight=weight)
        for name, weight in (("code", 1.0), ("text", 3.0))
    ),
)
STAGES = (
    StageConfig("stage1", 51_000, weights="text:1"),
    StageConfig("stage2", 200, weights="text:3,code:1", ramp_tokens=100, global_batch_tokens=1024),
)


def with_stages(*stages):
    return dataclasses.replace(STAGED, stages=stages)


def test_stages_are_laid_out_in_whole_steps():
    config = with_stages(*STAGES)
    validate(config)
    first, second = config.timeline
    assert (first.first_step, first.end_step, first.first_token) == (0, 100, 0)  # 99.6 steps
    assert (first.batch_tokens, first.batch_rows) == (512, 8)
    assert (second.first_step, second.end_step, second.first_token) == (100, 101, 51_200)
    assert (second.batch_tokens, second.batch_rows) == (1024, 16)
    assert config.total_steps == 101
    assert [config.tokens_at(step) for step in (0, 1, 100, 101)] == [0, 512, 51_200, 52_224]
    assert config.stage_at(0) == config.stage_at(99) == first
    assert config.stage_at(100) == config.stage_at(10**9) == second


def test_batches_that_are_left_out_make_their_stage_shorter_and_the_last_one_longer():
    """So that a batch is of the same stage, whatever is left out before it."""
    config = dataclasses.replace(
        with_stages(*STAGES), data=dataclasses.replace(STAGED.data, skip="10:12,98:101")
    )
    first, second = config.timeline
    assert (first.end_batch, first.end_step) == (100, 96)  # without 10, 11, 98 and 99
    # 100 * 512 + 1024 tokens in all, of which 96 * 512 are seen by then.
    assert (second.first_batch, second.first_step, second.end_step) == (100, 96, 99)
    assert second.first_token == 96 * 512
    assert config.total_steps == 99
    assert config.tokens_at(99) == with_stages(*STAGES).tokens_at(101) == 52_224
    # In a run without stages it is made up for batch by batch.
    single = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, skip="3:7"))
    assert single.total_steps == TINY.total_steps


def test_the_order_of_stages_is_that_of_their_numbers():
    names = [f"stage{number}_x" for number in range(1, 12)]
    tree = {"stages": {name: {"train_tokens": 5} for name in reversed(names)}}
    assert [entry.name for entry in freeze(tree).stages] == names


def test_where_each_stage_has_its_schedule_the_runs_is_not_judged():
    own = {"schedule": "cosine", "learning_rate": 1.0}
    stages = [dataclasses.replace(entry, **own) for entry in STAGES]
    config = with_stages(*stages)
    validate(dataclasses.replace(config, optimizer=OptimizerConfig(warmup_steps=10**6)))


def test_a_run_without_stages_is_one():
    (stage,) = TINY.timeline
    assert (stage.first_step, stage.end_step) == (0, TINY.total_steps) == (0, 50)
    assert stage.batch_rows == TINY.batch_rows and stage.settings.name == ""
    assert TINY.tokens_at(50) == 50 * 512


def test_stages_are_sorted_by_name_and_come_back():
    config = default_config()
    config.stages.stage2 = stage(train_tokens=2e6, weights="books:1")
    config.stages.stage1 = stage(train_tokens=1_000_000)
    frozen = freeze(config)
    assert [entry.name for entry in frozen.stages] == ["stage1", "stage2"]
    assert frozen.stages[1].train_tokens == 2_000_000
    assert freeze(json.loads(json.dumps(to_dict(frozen)))) == frozen
    with pytest.raises(ValueError, match=r"stages\.stage1 = 5: set it to stage\(train_tokens=TOKE"):
        freeze({"stages": {"stage1": 5}})
    with pytest.raises(ValueError, match=r'stages\.stage1\.wieghts .* did you mean "weights"'):
        freeze({"stages": {"stage1": {"wieghts": "a:1"}}})


@pytest.mark.parametrize(
    "number, settings, problem",
    [
        (0, {"train_tokens": 0}, r"stages.stage1.train_tokens = 0 must be greater than 0"),
        (0, {"train_tokens": 51_001}, r"train_tokens = 51200, but the stages have 51201 together"),
        (0, {"name": "1st"}, r"stages.1st: a stage's name is part of its settings' names"),
        (0, {"ramp_tokens": 5}, r"stage1.ramp_tokens = 5, but it is the first stage"),
        (1, {"ramp_tokens": 201}, r"stage2.ramp_tokens = 201 is more than its train_tokens = 200"),
        (1, {"ramp_tokens": -1}, r"stages.stage2.ramp_tokens = -1 must not be negative"),
        (1, {"weights": "text:1,math:2"}, r"stage2.weights names math, but data.sources has code"),
        (1, {"weights": "text:0"}, r'stage2.weights: "text:0" is not NAME:WEIGHT'),
        (1, {"weights": "text:1,text:2"}, r'stage2.weights: "text" has two weights; give it one'),
        (1, {"weights": "text:1,code:1e-9"}, r"stage2.weights gives code less than a millionth"),
        (1, {"ramp_tokens": 1 << 40}, r"is more than 16,777,216 rows of data.seq_len, which are"),
        (1, {"schedule": "cosine", "learning_rate": float("inf")}, r"learning_rate = inf with"),
        (1, {"weights": "text:1"}, r"no stage reads code; give it a share in some stage's weights"),
        (1, {"global_batch_tokens": 700}, r"stages.stage2.global_batch_tokens = 700 is not a mult"),
        (1, {"learning_rate": 0.1}, r"stage2.learning_rate = 0.1, but .*schedule is empty: the ru"),
        (1, {"schedule": "cosine"}, r"stage2.learning_rate = 0 with min_learning_rate = 0: a sch"),
        (1, {"schedule": "flat", "learning_rate": 1.0}, r'schedule = "flat" is not one of cosine'),
        (1, {"schedule": "wsd", "learning_rate": 1.0, "warmup_steps": 1},
         r"stage2.warmup_steps = 1 does not end within its 1 steps"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused(number, settings, problem):
    stages = list(STAGES)
    stages[number] = dataclasses.replace(stages[number], **settings)
    with pytest.raises(ValueError, match=problem):
        validate(with_stages(*stages))


def test_a_stage_that_changes_matters_to_a_run():
    now = with_stages(STAGES[0], dataclasses.replace(STAGES[1], weights="text:1,code:1"))
    matters, harmless = differences(with_stages(*STAGES), now)
    assert matters == ["stages.stage2.weights: 'text:3,code:1' -> 'text:1,code:1'"]
    assert differences(with_stages(*STAGES), with_stages(STAGES[0]))[0] == [
        "stages.stage2: there -> none"
    ]
    assert harmless == []


def test_a_key_like_no_other_is_answered_with_all():
    with pytest.raises(ValueError, match=r"config\.zzz is not a setting; known: model, data, opti"):
        freeze({"zzz": 1})


def test_numbers_may_be_written_naturally():
    config = freeze({"training": {"train_tokens": 3e12}, "optimizer": {"weight_decay": 0}})
    assert config.training.train_tokens == 3 * 10**12
    assert isinstance(config.training.train_tokens, int)
    assert isinstance(config.optimizer.weight_decay, float)


def test_differences_tell_what_matters_from_what_does_not():
    text = next(s for s in TINY.data.sources if s.name == "text")
    text = dataclasses.replace(text, validation_fraction=0.2, path="moved")
    books = dataclasses.replace(BOOKS, path="moved/*.txt")
    now = changed(
        optimizer__learning_rate=0.5, model__scan_unroll=1, data__prepared="/elsewhere",
        checkpoint__keep_last=7, data__sources=(BOOKS, text), data__tokenizer="moved.model",
    )  # fmt: skip
    matters, harmless = differences(TINY, now)
    assert matters == [
        "data.sources.books: none -> there",
        "data.sources.code: there -> none",
        "data.sources.text.path: 'text' -> 'moved'",  # another part of the embedded corpus
        "data.sources.text.validation_fraction: 0.005 -> 0.2",
        "optimizer.learning_rate: 0.01 -> 0.5",
    ]
    assert harmless == [
        "model.scan_unroll: 0 -> 1",
        "data.tokenizer: '' -> 'moved.model'",
        "data.prepared: 'prepared' -> '/elsewhere'",
        "checkpoint.keep_last: 2 -> 7",
    ]
    assert differences(TINY, TINY) == ([], [])
    before, after = (changed(data__sources=(source,)) for source in (BOOKS, books))
    assert differences(before, after) == (
        [], ["data.sources.books.path: 'books/*.txt' -> 'moved/*.txt'"],
    )  # fmt: skip


def test_what_a_resumed_run_may_change():
    """Whatever moves the mathematics or the order of the data is not among these."""
    free = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(TINY, section.name) or StageConfig)
        if field.metadata.get("may_change")
    }
    reporting = ("evaluation.", "checkpoint.", "logging.", "sampling.", "guard.", "watchdog.")
    assert {name for name in free if not name.startswith(reporting)} == {
        "model.compute_dtype", "model.attention", "model.remat", "model.scan_unroll",
        "data.prepared", "data.tokenizer", "training.micro_batch_size",
            "training.loss_chunk_tokens", "mesh.data", "mesh.fsdp", "mesh.tensor",
    }  # fmt: skip


def call_train(*flags, cwd=ROOT):
    """What the train door answers; every call here ends before anything is trained."""
    return subprocess.run(
        [sys.executable, "-m", "tinyllama_jax.train", *flags],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip


DEBUG = "--config=configs/tiny_debug.py"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            [DEBUG, "--config.optimizer.learning_rat=1"],
            'error: --config.optimizer.learning_rat=1: "learning_rat" is not a setting of the '
            'config. Did you mean "learning_rate" instead of "learning_rat"?\n',
        ),
        (
            [DEBUG, "--config.optimzer.learning_rate=1"],
            'error: --config.optimzer.learning_rate=1: "optimzer" is not a setting of the config. '
            'Did you mean "optimizer" instead of "optimzer"?\n',
        ),
        (
            [DEBUG, "--config.optimizer.learning_rate=fast"],
            "error: flag --config.optimizer.learning_rate=fast: could not convert string to float: "
            "'fast'; --helpshort lists the flags\n",
        ),
        (
            [DEBUG, "--learning_rate=1"],
            "error: Unknown command line flag 'learning_rate'; settings are given as "
            "--config.SECTION.SETTING=VALUE\n",
        ),
        (
            [],
            "error: no --config: name the file that holds the settings, for example "
            "--config=configs/quickstart.py\n",
        ),
    ],
    ids=["setting", "section", "type", "flag", "no config"],
)
def test_a_mistake_on_the_command_line_is_one_line(flags, message):
    answer = call_train(*flags)
    assert (answer.stderr, answer.stdout, answer.returncode) == (message, "", 1)


def test_the_command_line_overrides_the_file_and_is_validated(tmp_path):
    answer = call_train(
        DEBUG, "--config.optimizer.learning_rate=3e-4", "--config.model.head_dim=15",
        "--config.data.sources.text.weight=0", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert answer.returncode == 1
    assert "the config has 3 problems:" in answer.stderr
    assert "model.head_dim = 15 is odd" in answer.stderr
    assert "min_learning_rate = 0.001 is above optimizer.learning_rate = 0.0003" in answer.stderr
    assert "data.sources.text.weight = 0.0 must be greater than 0" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_a_config_without_sources_is_refused(tmp_path):
    file = tmp_path / "no_sources.py"
    file.write_text("from tinyllama_jax.config import default_config as get_config\n")
    answer = call_train(
        f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.model.num_layers=1"
    )
    assert answer.returncode == 1
    assert "error: data.sources is empty, so there is no text to learn from" in answer.stderr
