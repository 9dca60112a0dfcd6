"""The training loop in process: what it logs, and how it resumes, refuses and ends."""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import time

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tinyllama_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
)
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.runs.checkpoint import Checkpointer, save_params
from tinyllama_jax.runs.metrics import read_metrics
from tinyllama_jax.runs.restore import restore_params
from tinyllama_jax.training.loop import train
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer, make_schedule
from tinyllama_jax.training.step import make_train_step

ROWS, S, V, STEPS = 4, 8, 31, 12
CONFIG = Config(
    model=ModelConfig(
        vocab_size=V, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
        max_seq_len=S, compute_dtype="float32",
    ),
    data=DataConfig(
        seq_len=S,
        sources=(SourceConfig(name="code", weight=1.0), SourceConfig(name="text", weight=3.0)),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2),
    training=TrainingConfig(
        train_tokens=STEPS * ROWS * S, global_batch_tokens=ROWS * S, micro_batch_size=ROWS
    ),
    evaluation=EvaluationConfig(every_steps=5),
    checkpoint=CheckpointConfig(every_steps=4, keep_last=3),
    logging=LoggingConfig(every_steps=1, tensorboard=False),
)  # fmt: skip
STALL = "checkpoint_stall_seconds"  # in the line after a save
TIMING = {"tokens_per_second", "step_seconds", "data_wait_seconds", "time"}
TRAINING_FIELDS = {
    "step",
    "tokens_seen",
    "loss",
    "grad_norm",
    "learning_rate",
    "skipped_steps",
} | TIMING


@pytest.fixture(autouse=True, scope="module")
def compile_once(tmp_path_factory):
    """Every call of `train` compiles anew; here the same programs come from a cache."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class MadeUpData:
    """Counts upwards from a random id in every row; `cut_at` is where the power goes."""

    def __init__(self, *, cut_at=None, seed=0, read_seconds=0.0, config=CONFIG):
        self.cut_at, self.seed, self.read_seconds = cut_at, seed, read_seconds
        self.config = config

    def batch_at(self, step):
        rows = self.config.stage_at(step).batch_rows
        start = np.random.default_rng([self.seed, step]).integers(0, V, (rows, 1))
        ids = ((start + np.arange(S + 1)) % V).astype(np.int32)
        return Batch(ids[:, :-1], ids[:, 1:], np.ones((rows, S), np.float32))

    @contextlib.contextmanager
    def prefetch(self, start, stop):
        def batches():
            for step in range(start, stop):
                if step == self.cut_at:
                    raise RuntimeError("the power is cut")
                time.sleep(self.read_seconds)
                yield self.batch_at(step)

        yield batches()

    def fingerprint(self, step, *, skip):
        return f"{self.seed} from {step}"

    def require_same_past(self, step, skip):
        assert skip == ""

    def batch_number(self, step):
        return step

    def epochs_at(self, step):
        return {"code": step / 10, "text": step / 40}

    def documents_at(self, step):
        return [[f"a document of batch {step}"]] * ROWS


class MadeUpValidation:
    """Two batches, the second of which counts only in part."""

    def __init__(self, seed, weight):
        self.seed, self.weight = seed, weight

    def batches(self, rows):
        batch = MadeUpData(seed=self.seed).batch_at(0)
        assert rows == ROWS
        yield batch
        yield batch.replace(loss_weights=np.float32(np.arange(S) < 2) * batch.loss_weights)


VALIDATION = {"code": MadeUpValidation(7, 1.0), "text": MadeUpValidation(8, 3.0)}


def run(run_dir, data=None, config=CONFIG, validation=VALIDATION, **options):
    return train(config, run_dir, data or MadeUpData(), validation, NextToken(config), **options)


def with_settings(section, **settings):
    changed = dataclasses.replace(getattr(CONFIG, section), **settings)
    return dataclasses.replace(CONFIG, **{section: changed})


def bits(state):
    leaves = jax.tree.leaves(jax.device_get(state))
    return [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]


def untimed(run_dir):
    """The lines of metrics.jsonl without the fields that no two runs share."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMING | {STALL}} for line in lines
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 12 steps, its last state, and what it printed."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    return run_dir, run(run_dir)


@pytest.fixture(scope="module")
def cut_off_once(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("cut_off")
    with pytest.raises(RuntimeError, match="the power is cut"):
        run(run_dir, MadeUpData(cut_at=10))
    return run_dir


@pytest.fixture
def cut_off(cut_off_once, tmp_path):
    """The same run, cut off in step 11: it has saved step 8 and logged beyond it."""
    shutil.copytree(cut_off_once, tmp_path, dirs_exist_ok=True)
    with Checkpointer(tmp_path, CONFIG.checkpoint) as checkpoints:
        assert checkpoints.steps() == [4, 8]
    assert untimed(tmp_path)[-1]["step"] > 8
    return tmp_path


def test_every_line_has_its_fields(uninterrupted):
    records = read_metrics(uninterrupted[0])
    training = [r for r in records if "loss" in r]
    evaluation = [r for r in records if "eval/loss" in r]
    assert len(training) + len(evaluation) == len(records)
    assert [r["step"] for r in training] == list(range(1, STEPS + 1))
    assert [r["step"] for r in evaluation] == [0, 5, 10, STEPS]
    # A step's evaluation follows its own line.
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)
    for record in training:
        assert record.keys() - {STALL} == TRAINING_FIELDS
        assert (STALL in record) == (record["step"] in (5, 9))  # saved after 4 and 8
        assert record["tokens_seen"] == record["step"] * ROWS * S
        assert all(math.isfinite(value) for value in record.values())
        assert record["step_seconds"] > 0 and record["data_wait_seconds"] >= 0
        assert record["tokens_per_second"] == pytest.approx(ROWS * S / record["step_seconds"])
    assert [r["learning_rate"] for r in training[:3]] == pytest.approx([0.0, 0.005, 0.01])
    assert training[0]["loss"] == pytest.approx(math.log(V), abs=0.6)
    for record in evaluation:
        losses = {"eval/code/loss", "eval/text/loss", "eval/loss"}
        epochs = {"epochs/code", "epochs/text"}
        assert record.keys() == {"step", "tokens_seen"} | losses | epochs
        assert record["tokens_seen"] == record["step"] * ROWS * S
        mean = (record["eval/code/loss"] + 3 * record["eval/text/loss"]) / 4
        assert record["eval/loss"] == pytest.approx(mean)
    assert evaluation[-1]["eval/loss"] < evaluation[0]["eval/loss"] - 0.3


def test_the_state_returned_is_the_state_saved(uninterrupted):
    run_dir, state = uninterrupted
    step, params = restore_params(run_dir)
    assert step == int(state.step) == STEPS
    assert bits(params) == bits(state.params)


def test_lines_are_logged_every_k_steps_the_first_and_the_last(tmp_path, uninterrupted):
    config = with_settings("logging", every_steps=5)
    config = dataclasses.replace(config, evaluation=EvaluationConfig(every_steps=0))
    state = run(tmp_path, config=config)
    lines = untimed(tmp_path)
    assert [r["step"] for r in lines if "loss" in r] == [1, 5, 10, 12]
    assert [r["step"] for r in lines if "eval/loss" in r] == [0, 12]
    # How often a run looks at itself does not change what it computes.
    assert bits(state) == bits(uninterrupted[1])
    assert all(line in untimed(uninterrupted[0]) for line in lines)


def test_waiting_for_data_is_measured(tmp_path):
    run(tmp_path, MadeUpData(read_seconds=0.03), with_settings("evaluation", every_steps=0), {})
    records = read_metrics(tmp_path)
    assert all("loss" in record for record in records)  # nothing was held out to evaluate on
    # The wait for a step's batch may fall into the line before it, while that step still runs.
    assert (STEPS - 1) * 0.03 < sum(record["data_wait_seconds"] for record in records) < STEPS * 1
    assert all(record["step_seconds"] >= record["data_wait_seconds"] for record in records)


@pytest.mark.parametrize("resume", ["auto", "8", "4"])
def test_a_resumed_run_is_the_uninterrupted_one(cut_off, uninterrupted, resume, capsys):
    beyond = [line for line in untimed(cut_off) if line["step"] > int(resume.replace("auto", "8"))]
    state = run(cut_off, resume=resume)
    assert bits(state) == bits(uninterrupted[1])
    assert untimed(cut_off) == untimed(uninterrupted[0])
    assert f"resumed from step {resume.replace('auto', '8')}\n" in capsys.readouterr().out
    discarded = (cut_off / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [line["step"] for line in beyond]


# Five steps of 4 rows, three of 12, three of 4 with a schedule of their own.
STAGED = dataclasses.replace(
    CONFIG,
    training=dataclasses.replace(CONFIG.training, train_tokens=68 * S),
    stages=(
        StageConfig("a", 5 * ROWS * S),
        StageConfig("b", 36 * S, global_batch_tokens=12 * S),
        StageConfig("c", 12 * S, schedule="linear", learning_rate=2e-3, min_learning_rate=1e-3),
    ),
    checkpoint=CheckpointConfig(every_steps=1, keep_last=2, milestone_tokens=10 * S),
)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("staged")
    return run_dir, run(run_dir, MadeUpData(config=STAGED), STAGED)


def test_stages_have_their_batches_and_learning_rates(staged):
    records = [record for record in read_metrics(staged[0]) if "loss" in record]
    tokens = [4, 8, 12, 16, 20, 32, 44, 56, 60, 64, 68]
    assert [record["tokens_seen"] for record in records] == [count * S for count in tokens]
    whole = make_schedule(CONFIG.optimizer, 17)  # 68 rows in batches of 4
    expected = [float(whole(step)) for step in (0, 1, 2, 3, 4, 5, 8, 11)]
    assert [r["learning_rate"] for r in records[:8]] == pytest.approx(expected, rel=1e-6)
    assert [r["learning_rate"] for r in records[8:]] == pytest.approx([2e-3, 5e-3 / 3, 4e-3 / 3])
    assert int(staged[1].guard.taken) == 3  # what was usual before the last stage is forgotten
    for before, after in itertools.pairwise(records):
        batch = after["tokens_seen"] - before["tokens_seen"]
        assert after["tokens_per_second"] == pytest.approx(batch / after["step_seconds"])
    with Checkpointer(staged[0], STAGED.checkpoint, STAGED.tokens_at) as checkpoints:
        # The first at or past each multiple of 10 rows, and the last two.
        assert checkpoints.steps() == [3, 5, 6, 7, 8, 9, 10, 11]


def test_a_step_of_a_stage_is_the_step_of_a_run_with_such_a_batch(staged):
    """The sixth step, of 12 rows, is what a run without stages makes of the fifth's state."""
    config = with_settings("training", global_batch_tokens=12 * S, train_tokens=72 * S)
    with Checkpointer(staged[0], STAGED.checkpoint, STAGED.tokens_at) as checkpoints:
        abstract = jax.eval_shape(lambda: staged[1])
        before, after = (checkpoints.restore(abstract, step).state for step in (5, 6))
    model, optimizer = Llama(config.model), make_optimizer(config.optimizer)
    config = dataclasses.replace(
        config,  # at step 5 the run's schedule is where 20 rows in batches of 4 are
        optimizer=dataclasses.replace(config.optimizer, schedule="linear", warmup_steps=0,
                                      learning_rate=1.0, min_learning_rate=1.0),
    )  # fmt: skip
    rate = float(make_schedule(CONFIG.optimizer, 17)(5))
    params = jax.tree.map(np.asarray, before.params)
    step = make_train_step(model, NextToken(config), optimizer, config)
    full, _ = step(before, MadeUpData(config=STAGED).batch_at(5))
    for a, b, p in zip(
        *(jax.tree.leaves(tree) for tree in (full.params, after.params, params)), strict=True
    ):
        np.testing.assert_allclose(p + rate * (a - p), b, atol=2e-6)


@pytest.mark.parametrize("cut_at", [5, 6, 9])
def test_a_run_resumed_within_and_between_stages_is_the_uninterrupted_one(staged, tmp_path, cut_at):
    with pytest.raises(RuntimeError, match="the power is cut"):
        run(tmp_path, MadeUpData(config=STAGED, cut_at=cut_at), STAGED)
    assert bits(run(tmp_path, MadeUpData(config=STAGED), STAGED)) == bits(staged[1])
    assert untimed(tmp_path) == untimed(staged[0])


def test_a_run_cut_off_before_its_first_save_starts_over(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="the power is cut"):
        run(tmp_path, MadeUpData(cut_at=3))
    assert bits(run(tmp_path)) == bits(uninterrupted[1])
    assert untimed(tmp_path) == untimed(uninterrupted[0])


def test_never_refuses_over_a_run(cut_off):
    before = (cut_off / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"never, but the run has checkpoints of \[4, 8\]"):
        run(cut_off, resume="never")
    assert (cut_off / "metrics.jsonl").read_bytes() == before


def test_never_drops_the_lines_of_a_start_that_saved_nothing(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="the power is cut"):
        run(tmp_path, MadeUpData(cut_at=3))
    run(tmp_path, resume="never")
    assert untimed(tmp_path) == untimed(uninterrupted[0])


def test_never_starts_an_empty_run(tmp_path, uninterrupted):
    assert bits(run(tmp_path, resume="never")) == bits(uninterrupted[1])


@pytest.mark.parametrize(
    "resume, message",
    [
        ("7", r"step 7 of .*cannot be restored: there is no such step.*\[4, 8\]"),
        ("newest", '--resume="newest" is not auto, never or the number of a step'),
        ("-4", '--resume="-4" is not auto, never or the number of a step'),
    ],
)
def test_a_step_that_is_not_there_is_refused(cut_off, resume, message):
    before = (cut_off / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(cut_off, resume=resume)
    assert (cut_off / "metrics.jsonl").read_bytes() == before


def test_other_data_than_the_run_would_have_seen_is_refused(cut_off):
    before = (cut_off / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="data after step 8 is not what the run would have seen"):
        run(cut_off, MadeUpData(seed=1))
    assert (cut_off / "metrics.jsonl").read_bytes() == before


def test_a_spent_budget_returns_at_once(uninterrupted, capsys):
    run_dir, state = uninterrupted
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert bits(run(run_dir)) == bits(state)
    assert "step 12 of 12: the token budget is spent" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_training_starts_from_imported_params(tmp_path, uninterrupted):
    _, params = restore_params(uninterrupted[0])
    save_params(tmp_path, params, {"source": "elsewhere"})
    run(tmp_path)
    first = next(line for line in untimed(tmp_path) if "eval/loss" in line)
    trained = [line for line in untimed(uninterrupted[0]) if "eval/loss" in line][-1]
    assert first["step"] == 0 and first["eval/loss"] == trained["eval/loss"]


def test_a_last_step_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    attempts = []

    def save(self, step, *rest):
        attempts.append(step)
        return 0.0

    monkeypatch.setattr(Checkpointer, "save", save)
    monkeypatch.setattr(Checkpointer, "wait", lambda self: False)
    with pytest.raises(OSError, match=r"the last step, 12, could not be saved .* from step 0"):
        run(tmp_path)
    assert attempts == [4, 8, 12, 12]


def test_validation_is_the_mean_over_weighted_tokens(uninterrupted):
    """Sum over all batches of weight times loss, divided once: not the mean of batches' means."""
    _, params = restore_params(uninterrupted[0])
    model = Llama(CONFIG.model)
    for name, validation in VALIDATION.items():
        total, weight = 0.0, 0.0
        for batch in validation.batches(ROWS):
            logits = model.logits(params, model.apply(params, batch.tokens)[0])
            nll = -jax.nn.log_softmax(np.asarray(logits, np.float64))
            nll = np.take_along_axis(np.asarray(nll), batch.targets[..., None], -1)[..., 0]
            total += (batch.loss_weights * nll).sum()
            weight += batch.loss_weights.sum()
        last = [line for line in untimed(uninterrupted[0]) if "eval/loss" in line][-1]
        assert last[f"eval/{name}/loss"] == pytest.approx(total / weight, rel=1e-5)


def test_a_lost_lock_ends_training_before_anything_is_saved(tmp_path):
    class LostLock:
        def require_held(self):
            raise ValueError("was taken over")

    with pytest.raises(ValueError, match="was taken over"):
        run(tmp_path, lock=LostLock())
    with Checkpointer(tmp_path, CONFIG.checkpoint) as checkpoints:
        assert checkpoints.steps() == []


def test_the_log_says_which_attention_runs(tmp_path, capsys):
    run(tmp_path)
    assert "attention: folded\n" in capsys.readouterr().out


def test_imported_params_are_not_resumed_from(tmp_path, uninterrupted):
    _, params = restore_params(uninterrupted[0])
    save_params(tmp_path, params, {"source": "elsewhere"})
    with pytest.raises(ValueError, match=r"step 0 of .* holds params only.*use --resume=auto"):
        run(tmp_path, resume="0")
