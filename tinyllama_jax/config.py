"""Every setting of a run, as frozen dataclasses.

A config file (`configs/*.py`) fills the `ml_collections.ConfigDict` that `default_config` returns,
the command line overrides it, and `freeze` turns it into a `Config`. From there on nothing can
change a setting, and nothing but this module knows of ml_collections.

An unset field is `""` or `0`, with the meaning given beside it: `None` could not be overridden from
the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from tinyllama_jax.config_text import skipped_ranges

# Fields that a resumed run may change: they move rounding, cost, what is printed or what a run is
# protected from, never the mathematics of its steps or the order of its data.
_MAY_CHANGE = types.MappingProxyType({"may_change": True})


def _free(default: Any) -> Any:
    return dataclasses.field(default=default, metadata=_MAY_CHANGE)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-2 architecture; the defaults are TinyLlama-1.1B (arXiv 2401.02385, table 1)."""

    vocab_size: int = 32000
    num_layers: int = 22
    d_model: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 64
    d_ff: int = 5632
    max_seq_len: int = 2048  # the longest context; exported as max_position_embeddings
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    compute_dtype: str = _free("auto")  # auto: bfloat16 on accelerators, float32 on CPU
    attention: str = _free("auto")  # an implementation of kernels.attention
    remat: str = _free("none")  # what the backward pass recomputes: none, dots, attention, full
    scan_unroll: int = _free(1)  # layers per scan iteration; 0: all of them


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text, with its share of the training tokens."""

    name: str = ""
    # A file, a directory or a glob; tfds:NAME; for format "embedded": code or text. It may change:
    # what counts is the content, which every checkpoint holds a fingerprint of.
    path: str = _free("")
    # auto (by file ending), text, jsonl, parquet, arrow, tfds, embedded; litpkds: ids, as lit-gpt's
    # packer wrote them
    format: str = "auto"
    text_key: str = "text"  # the column or key that holds the document; JSONL: or a chat's turns
    separator: str = ""  # plain text: stands between documents, \n a line end; "": one per file
    # What parts the source into subsets, each a stream of its own in the mixture: "directory" (the
    # first below path), or a key of each record, as meta.redpajama_set_name; "": nothing does.
    subset_key: str = ""
    subsets: str = ""  # which are taken, as "C4,Book"; "-Github": all but that; "": all
    subset_weights: str = ""  # shares of the source's tokens, as "C4:2,Book:1"; "": by their tokens
    weight: float = 1.0  # share of the training tokens, relative to the other sources
    validation_fraction: float = 0.005  # of the documents, chosen by hash; embedded: by module


@dataclasses.dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = ()
    # A SentencePiece .model; "": the 4096-piece one shipped in the package. The path may change: a
    # run keeps the file itself and refuses another.
    tokenizer: str = _free("")
    prepared: str = _free("prepared")  # the directory that holds prepared corpora
    boundary: str = "bos+eos"  # what marks a document in the stream: bos+eos, bos, eos
    seq_len: int = 2048
    # Batches left out, numbered from 0, as "1200:1250" or "10:20,1200:1250"; --skip_steps adds to
    # a run's own list.
    skip: str = ""
    document_mask: bool = False  # attention stays inside a document (TinyLlama's did not)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), with TinyLlama's values."""

    learning_rate: float = 4e-4
    min_learning_rate: float = 4e-5
    schedule: str = "cosine"  # cosine, linear, wsd
    warmup_steps: int = 2000
    decay_steps: int = 0  # length of the decay; 0: to the end of the run (wsd: its last 20%)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    weight_decay_rule: str = "all"  # all: every parameter, as TinyLlama did; matrices: no norms
    grad_clip_norm: float = 1.0  # 0: no clipping


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    train_tokens: int = 3_000_000_000_000
    global_batch_tokens: int = 2_097_152  # tokens per optimizer step
    micro_batch_size: int = _free(8)  # sequences per device per forward pass
    z_loss: float = 0.0  # weight of logsumexp^2 in the loss
    loss_chunk_tokens: int = _free(0)  # tokens whose logits exist at once; 0: by backend
    seed: int = 0  # of the initial params


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run, with a mixture, a batch and a learning rate of its own."""

    name: str = ""  # stages follow each other in the order of their names, 2 before 10
    train_tokens: int = 0  # all stages together: training.train_tokens
    # Shares of the tokens, as "web:0.7,code:0.3", of the sources that are read; "": of all, by the
    # weights in data.sources, which evaluation always goes by.
    weights: str = ""
    ramp_tokens: int = 0  # in which the shares go from the last stage's to these, a straight line
    global_batch_tokens: int = 0  # 0: training.global_batch_tokens
    # Of the learning rate, within the stage: cosine, linear, wsd; "": the run's goes on, by tokens.
    schedule: str = ""
    learning_rate: float = 0.0  # these three belong to a schedule of the stage's own
    min_learning_rate: float = 0.0
    warmup_steps: int = 0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work; -1 for one axis: all that are left."""

    data: int = _free(1)  # copies of the model
    fsdp: int = _free(-1)  # parts of each matrix; each device holds one and sees its own rows
    tensor: int = _free(1)  # parts of heads, feed-forward width and vocabulary


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int = _free(1000)  # 0: only at the end
    tokens: int = _free(1_048_576)  # validation tokens per source; 0: all


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = _free(1000)  # 0: only at the end
    keep_last: int = _free(3)
    milestone_tokens: int = _free(0)  # keep one step per this many tokens for ever; 0: none


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped because they would hurt, and when that is too many."""

    # Standard deviations of the last steps' losses and gradient norms; 0: only what is not finite.
    sigmas: float = _free(6.0)
    max_consecutive: int = _free(10)  # steps skipped in a row that end the run
    # Steps between checks that copies of the params are the same bits, and that the gradient is,
    # computed twice; 0: never. On GPUs only a repeatable program can pass: model.attention=flash,
    # and DETERMINISTIC=1 for the launchers.
    verify_every_steps: int = _free(0)


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    seconds: int = _free(1800)  # in which nothing moves until the process ends; 0: never
    peer_seconds: int = _free(60)  # without a sign of another process until it counts as lost


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    every_steps: int = _free(10)
    tensorboard: bool = _free(True)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How text is drawn: at the end of training, and where `generate` is not told otherwise."""

    prompt: str = _free("")
    max_new_tokens: int = _free(128)
    temperature: float = _free(0.8)  # 0: greedy
    top_k: int = _free(50)  # 0: off
    top_p: float = _free(1.0)  # 1: off
    min_p: float = _free(0.0)  # 0: off
    repetition_penalty: float = _free(1.0)  # 1: off
    seed: int = _free(0)


class Stage(NamedTuple):
    """A stage of a run, laid out.

    Attributes:
      settings: what the config says of it; without a name in a run without stages.
      first_batch, end_batch: its batches `[first_batch, end_batch)`, left-out ones included.
      first_step, end_step: its steps, likewise.
      first_token: the tokens that the stages before have seen.
      batch_tokens, batch_rows: tokens and sequences per optimizer step.
    """

    settings: StageConfig
    first_batch: int
    end_batch: int
    first_step: int
    end_step: int
    first_token: int
    batch_tokens: int
    batch_rows: int


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    stages: tuple[StageConfig, ...] = ()  # none: the run is one
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()
    sampling: SamplingConfig = SamplingConfig()

    @functools.cached_property
    def timeline(self) -> tuple[Stage, ...]:
        """The stages with their steps, in order; a run without any is one.

        A stage is so many batches; one that is left out (`data.skip`) makes its stage shorter, and
        the last one longer by as many tokens. So which stage a batch belongs to never changes.
        """
        training, left_out = self.training, skipped_ranges(self.data.skip)
        entries = self.stages or (StageConfig(train_tokens=training.train_tokens),)
        sizes = [entry.global_batch_tokens or training.global_batch_tokens for entry in entries]
        counts = [-(-e.train_tokens // size) for e, size in zip(entries, sizes, strict=True)]
        timeline: list[Stage] = []
        budget = sum(count * size for count, size in zip(counts, sizes, strict=True))
        batch = step = tokens = 0
        for entry, size, count in zip(entries, sizes, counts, strict=True):
            end_batch = batch + count
            end = end_batch - sum(min(b, end_batch) - a for a, b in left_out if a < end_batch)
            if end_batch == sum(counts):
                end = step - (tokens - budget) // size
            rows = size // self.data.seq_len
            timeline.append(Stage(entry, batch, end_batch, step, end, tokens, size, rows))
            tokens += (end - step) * size
            batch, step = end_batch, end
        return tuple(timeline)

    @property
    def total_steps(self) -> int:
        """Optimizer steps that spend the token budget; the last of a stage may go past it."""
        return self.timeline[-1].end_step

    def stage_at(self, step: int) -> Stage:
        """The stage of the step that follows `step` steps; past the end of the run, the last."""
        return next((s for s in self.timeline if step < s.end_step), self.timeline[-1])

    def tokens_at(self, step: int) -> int:
        """Tokens that the first `step` steps see."""
        stage = self.stage_at(step - 1)
        return stage.first_token + (step - stage.first_step) * stage.batch_tokens

    @property
    def batch_rows(self) -> int:
        """Sequences per optimizer step, where a stage does not say otherwise."""
        return self.training.global_batch_tokens // self.data.seq_len

    def accumulation_steps(self, device_count: int) -> int:
        """Micro-batches that one optimizer step sums over."""
        return self.batch_rows // (self.training.micro_batch_size * device_count)


# Settings that are dicts by name in a config file, and tuples here.
NAMED = types.MappingProxyType({"sources": SourceConfig, "stages": StageConfig})
_EXAMPLES = {SourceConfig: 'path="FILES"', StageConfig: "train_tokens=TOKENS"}


def default_config():
    """Returns a `ConfigDict` of all defaults, for a config file to fill.

    Sources and stages are dicts by name: `config.data.sources.books = source(path="books/*.txt")`,
    `config.stages.stage2 = stage(train_tokens=10_000_000)`.
    """
    import ml_collections

    return ml_collections.ConfigDict(to_dict(Config()))


def source(**settings: Any):
    """Returns a `ConfigDict` of one `SourceConfig` (its name is the key it is stored under)."""
    return _entry(SourceConfig(), settings)


def stage(**settings: Any):
    """Returns a `ConfigDict` of one `StageConfig` (its name is the key it is stored under)."""
    return _entry(StageConfig(), settings)


def _entry(default: SourceConfig | StageConfig, settings: Mapping[str, Any]):
    import ml_collections

    fields = dataclasses.asdict(default)
    del fields["name"]
    return ml_collections.ConfigDict({**fields, **settings})


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config dataclass, sources and stages by name; `freeze` undoes it."""
    result = dataclasses.asdict(config)
    for holder in (result, result.get("data", {})):
        for key in NAMED.keys() & holder.keys():
            holder[key] = {entry.pop("name"): entry for entry in map(dict, holder[key])}
    return result


def freeze(config: Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` or a plain nested dict (config.json) into a `Config`.

    Raises:
      ValueError: unknown keys (with the nearest known one) or values of a wrong type, all at once.
    """
    tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    problems: list[str] = []
    frozen = _build(Config, tree, "config", problems)
    raise_all(problems)
    return frozen


def load_config_file(path: str) -> Config:
    """The `Config` of a config file (`configs/*.py`), without command-line overrides."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("tinyllama_jax_config_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python config file; see configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return freeze(module.get_config())


def _build(cls: Any, tree: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(hints)}"
            problems.append(f"{path}.{key} is not a setting{hint}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{path}.{key}", problems)
        elif key in NAMED:
            values[key] = _build_named(NAMED[key], value, f"{path}.{key}", problems)
        else:
            values[key] = _coerce(value, hints[key], f"{path}.{key}", problems)
    return cls(**values)


def _build_named(cls: Any, tree: Any, path: str, problems: list[str]) -> tuple[Any, ...]:
    example = f"{cls.__name__.removesuffix('Config').lower()}({_EXAMPLES[cls]})"
    entries = tree if isinstance(tree, Mapping) else {}
    if not isinstance(tree, Mapping):
        problems.append(f"{path} = {tree!r}: set {path}.NAME = {example} for each")
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            problems.append(f"{path}.{name} = {entry!r}: set it to {example}")
    # Sorted by name, so that their order does not hang on the file's layout.
    by_name: Any = (lambda name: (_numbers_in_order(name), name)) if cls is StageConfig else str
    return tuple(
        _build(cls, {**entries[name], "name": name}, f"{path}.{name}", problems)
        for name in sorted(entries, key=by_name)
        if isinstance(entries[name], Mapping)
    )


def _numbers_in_order(name: str) -> list[tuple[str, int]]:
    """stage2 comes before stage10; of names that differ by zeros alone, the shorter one."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _coerce(value: Any, kind: type, path: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 2e6 is a natural way to write a count
    if type(value) is not kind:
        problems.append(f"{path} = {value!r} is a {type(value).__name__}, not {kind.__name__}")
    return value


def raise_all(problems: list[str]) -> None:
    """Raises one ValueError with a line per problem, if there are any."""
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise ValueError(f"the config has {count}:\n" + "\n".join(f"  - {p}" for p in problems))
