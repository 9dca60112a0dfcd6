"""The rules that settings must keep, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinyllama_jax.config import Config, SamplingConfig, StageConfig, raise_all
from tinyllama_jax.config_text import chosen_subsets, named_weights, skipped_ranges

# Over which a mixture may change. They are laid out, which takes 0.5 GB for so many.
RAMP_ROWS = 1 << 24
SCHEDULES = ("cosine", "linear", "wsd")
_FORMATS = ("auto", "text", "jsonl", "parquet", "arrow", "litpkds", "tfds", "embedded")


def validate(config: Config, *, device_count: int = 1, tokenizer_vocab_size: int = 0) -> None:
    """Checks every rule that joins settings, and raises once with all that fail.

    Args:
      config: the settings.
      device_count: accelerators (or CPU devices) that share a batch.
      tokenizer_vocab_size: pieces of the tokenizer in use; 0: not known, not checked.

    Raises:
      ValueError: one line per problem: the setting, its value, why it matters, what to set.
    """
    problems: list[str] = []

    def require(ok: bool, problem: str) -> None:
        if not ok:
            problems.append(problem)

    def positive(section: str, values: Any, *names: str) -> None:
        for name in names:
            value = getattr(values, name)
            require(value > 0, f"{section}.{name} = {value} must be greater than 0")

    def not_negative(section: str, values: Any, *names: str) -> None:
        for name in names:
            value = getattr(values, name)
            require(value >= 0, f"{section}.{name} = {value} must not be negative")

    def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
        require(value in allowed, f'{name} = "{value}" is not one of {", ".join(allowed)}')

    m, d, o, t = config.model, config.data, config.optimizer, config.training
    positive(
        "model", m, "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim",
        "d_ff", "max_seq_len", "rope_theta", "norm_eps",
    )  # fmt: skip
    not_negative("model", m, "scan_unroll")
    positive("data", d, "seq_len")
    positive("optimizer", o, "learning_rate", "eps")
    not_negative(
        "optimizer", o, "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay",
        "grad_clip_norm",
    )  # fmt: skip
    positive("training", t, "train_tokens", "global_batch_tokens", "micro_batch_size")
    not_negative("training", t, "z_loss", "loss_chunk_tokens", "seed")
    not_negative("evaluation", config.evaluation, "every_steps", "tokens")
    not_negative("checkpoint", config.checkpoint, "every_steps", "milestone_tokens")
    positive("checkpoint", config.checkpoint, "keep_last")
    positive("guard", config.guard, "max_consecutive")
    not_negative("guard", config.guard, "sigmas", "verify_every_steps")
    not_negative("watchdog", config.watchdog, "seconds")
    positive("watchdog", config.watchdog, "peer_seconds")
    positive("logging", config.logging, "every_steps")
    try:
        skipped_ranges(d.skip)
    except ValueError as error:
        problems.append(f"data.skip: {error}")
    problems += [f"sampling.{problem}" for problem in sampling_problems(config.sampling)]
    one_of("model.compute_dtype", m.compute_dtype, ("auto", "float32", "bfloat16"))
    one_of("model.attention", m.attention, ("auto", "reference", "folded", "flash", "cudnn"))
    one_of("model.remat", m.remat, ("none", "dots", "attention", "full"))
    one_of("data.boundary", d.boundary, ("bos+eos", "bos", "eos"))
    one_of("optimizer.schedule", o.schedule, SCHEDULES)
    one_of("optimizer.weight_decay_rule", o.weight_decay_rule, ("all", "matrices"))

    if m.num_kv_heads > 0:
        require(
            m.num_heads % m.num_kv_heads == 0,
            f"model.num_heads = {m.num_heads} is not a multiple of model.num_kv_heads = "
            f"{m.num_kv_heads}: each key/value head serves a whole group of query heads",
        )
    require(
        m.head_dim % 2 == 0,
        f"model.head_dim = {m.head_dim} is odd: rotary embedding turns pairs of channels",
    )
    require(
        not m.scan_unroll or m.num_layers % m.scan_unroll == 0,
        f"model.scan_unroll = {m.scan_unroll} does not divide model.num_layers = {m.num_layers}; "
        f"set a divisor, or 0 to unroll all layers",
    )
    require(
        d.seq_len <= m.max_seq_len,
        f"data.seq_len = {d.seq_len} is longer than model.max_seq_len = {m.max_seq_len}: "
        f"exported models would claim a shorter context than they were trained on",
    )
    require(
        not tokenizer_vocab_size or tokenizer_vocab_size <= m.vocab_size,
        f"the tokenizer has {tokenizer_vocab_size} pieces but model.vocab_size = {m.vocab_size}: "
        f"ids past it have no embedding; set model.vocab_size = {tokenizer_vocab_size}",
    )
    for beta in ("beta1", "beta2"):
        value = getattr(o, beta)
        require(0 <= value < 1, f"optimizer.{beta} = {value} must be in [0, 1)")
    require(
        o.min_learning_rate <= o.learning_rate,
        f"optimizer.min_learning_rate = {o.min_learning_rate} is above optimizer.learning_rate = "
        f"{o.learning_rate}: the schedule would rise where it should decay",
    )

    if min(t.global_batch_tokens, t.micro_batch_size, t.train_tokens, d.seq_len, device_count) > 0:
        per_pass = t.micro_batch_size * d.seq_len * device_count
        batches = {"training": t.global_batch_tokens}
        batches |= {f"stages.{s.name}": s.global_batch_tokens for s in config.stages}
        for name, batch in batches.items():
            require(
                batch % per_pass == 0,
                f"{name}.global_batch_tokens = {batch} is not a multiple of the {per_pass} tokens "
                f"of one pass (micro_batch_size {t.micro_batch_size} x seq_len {d.seq_len} x "
                f"{device_count} devices); the nearest that fits is "
                f"{max(1, round(batch / per_pass)) * per_pass}",
            )
        steps = -(-t.train_tokens // t.global_batch_tokens)
        used = not config.stages or not all(stage.schedule for stage in config.stages)
        require(
            not used or o.warmup_steps < steps,
            f"optimizer.warmup_steps = {o.warmup_steps} does not end within the {steps} steps of "
            f"the run (train_tokens / global_batch_tokens): the learning rate would never peak",
        )
        require(
            not used or o.warmup_steps + o.decay_steps <= steps,
            f"optimizer.warmup_steps + decay_steps = {o.warmup_steps + o.decay_steps} is more "
            f"than the {steps} steps of the run: the schedule would be cut off",
        )

    if config.stages:
        problems.extend(_stage_problems(config))

    for entry in d.sources:
        name = f"data.sources.{entry.name}"
        one_of(f"{name}.format", entry.format, _FORMATS)
        require(entry.path != "", f"{name}.path is empty: name the files to read")
        require(entry.weight > 0, f"{name}.weight = {entry.weight} must be greater than 0; "
                "to leave a source out, remove it")  # fmt: skip
        require(
            0 <= entry.validation_fraction < 1,
            f"{name}.validation_fraction = {entry.validation_fraction} must be in [0, 1)",
        )
        require(
            entry.name.replace("_", "").replace("-", "").isalnum(),
            f"{name}: a source's name becomes a directory and a metric; use letters, "
            "digits, _ and -",
        )
        parsers: dict[str, Callable[[str], object]] = {
            "subsets": chosen_subsets,
            "subset_weights": named_weights,
        }
        for setting, parse in parsers.items():
            value = getattr(entry, setting)
            require(
                not value or entry.subset_key != "",
                f'{name}.{setting} = "{value}", but {name}.subset_key is empty: nothing tells the '
                f"subsets apart; set it to directory or to a key of the records",
            )
            try:
                parse(value)
            except ValueError as error:
                problems.append(f"{name}.{setting}: {error}")
    raise_all(problems)


def _stage_problems(config: Config) -> list[str]:
    """What speaks against the stages of a run, a line each."""
    problems: list[str] = []
    training, sources = config.training, {source.name for source in config.data.sources}
    read: set[str] = set()
    for number, entry in enumerate(config.stages):
        name = f"stages.{entry.name}"
        if not (entry.name.isidentifier() and entry.name.isascii()):
            problems.append(
                f"{name}: a stage's name is part of its settings' names; use letters, digits and "
                f"_, and begin with a letter, as stage1"
            )
        problems += [
            f"{name}.{setting} = {getattr(entry, setting)} must not be negative"
            for setting in ("ramp_tokens", "global_batch_tokens", "warmup_steps")
            if getattr(entry, setting) < 0
        ]  # fmt: skip
        if entry.train_tokens <= 0:
            problems.append(f"{name}.train_tokens = {entry.train_tokens} must be greater than 0")
        try:
            weights = named_weights(entry.weights)
            named = set(weights) or sources
            least = min(weights, key=weights.__getitem__, default="")
            if least and weights[least] < 1e-6 * sum(weights.values()):
                problems.append(
                    f"{name}.weights gives {least} less than a millionth, which no row would be; "
                    f"raise it, or leave {least} out of this stage"
                )
        except ValueError as error:
            problems.append(f"{name}.weights: {error}")
            named = set(sources)
        read |= named
        if named - sources:
            problems.append(
                f"{name}.weights names {', '.join(sorted(named - sources))}, but data.sources has "
                f"{', '.join(sorted(sources)) or 'none'}"
            )
        if entry.ramp_tokens and number == 0:
            problems.append(
                f"{name}.ramp_tokens = {entry.ramp_tokens}, but it is the first stage: there are "
                f"no shares before it to go on from; set 0"
            )
        elif entry.ramp_tokens > entry.train_tokens:
            problems.append(
                f"{name}.ramp_tokens = {entry.ramp_tokens} is more than its train_tokens = "
                f"{entry.train_tokens}: its shares would never be reached"
            )
        if entry.ramp_tokens > RAMP_ROWS * config.data.seq_len:
            problems.append(
                f"{name}.ramp_tokens = {entry.ramp_tokens} is more than {RAMP_ROWS:,} rows of "
                f"data.seq_len, which are laid out before; set less, or make several stages of it"
            )
        problems += _stage_schedule_problems(name, entry, training.global_batch_tokens)
    total = sum(entry.train_tokens for entry in config.stages)
    if total != training.train_tokens:
        problems.append(
            f"training.train_tokens = {training.train_tokens}, but the stages have {total} "
            f"together; set it to that, or change a stage's train_tokens"
        )
    if sources - read:
        problems.append(
            f"no stage reads {', '.join(sorted(sources - read))}; give it a share in some stage's "
            f"weights, or remove it from data.sources"
        )
    return problems


def _stage_schedule_problems(name: str, entry: StageConfig, batch_tokens: int) -> list[str]:
    if not entry.schedule:
        return [
            f"{name}.{setting} = {getattr(entry, setting)}, but {name}.schedule is empty: the run's"
            f" own learning rate goes on; set the stage's schedule, or leave this 0"
            for setting in ("learning_rate", "min_learning_rate", "warmup_steps")
            if getattr(entry, setting)
        ]
    problems = []
    if entry.schedule not in SCHEDULES:
        problems.append(
            f'{name}.schedule = "{entry.schedule}" is not one of {", ".join(SCHEDULES)}, or "" for '
            f"the run's"
        )
    least, most = entry.min_learning_rate, entry.learning_rate
    if not (0 <= least <= most and 0 < most < float("inf")):
        problems.append(
            f"{name}.learning_rate = {entry.learning_rate:g} with min_learning_rate = "
            f"{entry.min_learning_rate:g}: a schedule of the stage's own needs the rate that it "
            f"begins with, above 0, and one not above it to end with"
        )
    batch_tokens = entry.global_batch_tokens or batch_tokens
    steps = -(-entry.train_tokens // batch_tokens) if batch_tokens > 0 else 0
    if entry.warmup_steps >= max(steps, 1):
        problems.append(
            f"{name}.warmup_steps = {entry.warmup_steps} does not end within its {steps} steps"
        )
    return problems


def sampling_problems(settings: SamplingConfig) -> list[str]:
    """One line per setting that is out of range."""
    return [
        f"{name} = {getattr(settings, name)} must {rule}"
        for name, ok, rule in (
            ("max_new_tokens", settings.max_new_tokens >= 1, "be at least 1"),
            ("temperature", settings.temperature >= 0, "not be negative (0: greedy)"),
            ("top_k", settings.top_k >= 0, "not be negative (0: off)"),
            ("top_p", 0 < settings.top_p <= 1, "be in (0, 1] (1: off)"),
            ("min_p", 0 <= settings.min_p <= 1, "be in [0, 1] (0: off)"),
            ("repetition_penalty", settings.repetition_penalty > 0, "be greater than 0 (1: off)"),
        )
        if not ok
    ]
