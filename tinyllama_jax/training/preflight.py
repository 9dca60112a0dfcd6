"""What can be known of a run before anything compiles."""

from __future__ import annotations

import os
import pathlib
import platform
import shutil
from importlib import metadata

import jax

from tinyllama_jax.config import Config, OptimizerConfig, SourceConfig, StageConfig
from tinyllama_jax.config_rules import validate
from tinyllama_jax.data.prepare import examine_source
from tinyllama_jax.data.workers import available_cores
from tinyllama_jax.findings import Finding
from tinyllama_jax.model.llama import Llama, parameter_count
from tinyllama_jax.parallel import mesh, rules
from tinyllama_jax.text.tokenizer import Tokenizer

# As setup.cfg; installed versions outside are not known to work.
_SUPPORTED_JAX = ((0, 10), (0, 13))
_PACKAGES = ("jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece")


def examine_machine() -> list[Finding]:
    """Versions and devices."""
    jax_version = metadata.version("jax")
    numbers = tuple(int(part) for part in jax_version.split(".")[:2])
    versions = [f"Python {platform.python_version()}", f"jax {jax_version}"]
    versions += [f"{name} {_version(name)}" for name in _PACKAGES]
    findings = [Finding("versions", ", ".join(versions))]
    if not _SUPPORTED_JAX[0] <= numbers < _SUPPORTED_JAX[1]:
        findings.append(
            Finding("jax", f"version {jax_version} is not one of 0.10 to 0.12, with which this "
                    'package is tested; run pip install "jax>=0.10,<0.13"', "warning")
        )  # fmt: skip
    return findings + _devices()


def _devices() -> list[Finding]:
    devices = jax.devices()
    text = f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"
    memory = _device_memory()
    findings = [Finding("devices", f"{text}, {_bytes(memory)} each" if memory else text)]
    if jax.default_backend() == "cpu":
        findings[0] = Finding("devices", f"{text}, {available_cores()} cores")
        if pathlib.Path("/proc/driver/nvidia/version").exists():
            findings.append(
                Finding("devices", "this machine has an NVIDIA driver but jax found no GPU: run "
                        "pip install -e '.[cuda13]' (or cuda12, for a driver before 580)",
                        "warning")
            )  # fmt: skip
    return findings


def examine(config: Config, run_dir: pathlib.Path) -> list[Finding]:
    """Settings, tokenizer, text, batch arithmetic, learning rate, memory and disk of a run."""
    try:
        tokenizer = Tokenizer(config.data.tokenizer)
    except ValueError as error:
        return [Finding("tokenizer", str(error), "problem")]
    findings = [
        Finding("tokenizer", f"{tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:12]}")
    ]
    try:
        shape = mesh.shape_of(config.mesh, jax.device_count())
        rows_over = shape[0] * shape[1]
        validate(config, device_count=rows_over, tokenizer_vocab_size=tokenizer.vocab_size)
        if rows_over * shape[2] > 1:
            shapes = jax.eval_shape(Llama(config.model).init, jax.random.key(0))
            rules.shardings(shapes, mesh.make_mesh(shape))
    except ValueError as error:
        # The arithmetic below assumes settings that fit together.
        return [*findings, Finding("config", str(error), "problem")]
    unused = config.model.vocab_size - tokenizer.vocab_size
    if unused >= 256:
        findings.append(
            Finding("tokenizer", f"model.vocab_size = {config.model.vocab_size} leaves {unused} "
                    "embedding rows that no piece uses", "warning")
        )  # fmt: skip
    findings += [_source(source, config, tokenizer) for source in config.data.sources]
    parameters = parameter_count(config.model)
    findings += [_batch(config, parameters, rows_over), *_stages(config, rows_over)]
    findings += [
        *_precision(config),
        *_remat(config),
        _memory(parameters, shape[1] * shape[2]),
        _disk(config, parameters, run_dir),
    ]
    return findings


def _source(source: SourceConfig, config: Config, tokenizer: Tokenizer) -> Finding:
    subject = f"source {source.name}"
    try:
        directory, prepared, text = examine_source(source, config.data, tokenizer)
    except (ValueError, OSError, ImportError) as error:
        return Finding(subject, str(error), "problem")
    return Finding(
        subject, f"{text}, {'prepared' if prepared else 'to be prepared'} in {directory}"
    )


def _batch(config: Config, parameters: int, rows_over: int) -> Finding:
    training = config.training
    unless = ", unless a stage says otherwise" if config.stages else ""
    each = f" on each of {rows_over} devices" if rows_over > 1 else ""
    return Finding(
        "batch",
        f"{training.global_batch_tokens:,} tokens a step = {config.batch_rows} sequences of "
        f"{config.data.seq_len} = {config.accumulation_steps(rows_over)} passes of "
        f"{training.micro_batch_size}{each}{unless}; {config.total_steps:,} steps, "
        f"{training.train_tokens:,} tokens, {training.train_tokens / parameters:.3g} per parameter "
        f"({parameters:,})",
    )


def _stages(config: Config, rows_over: int) -> list[Finding]:
    """What the stages of a run are, and their learning rates or the run's."""
    findings = []
    width = config.model.d_model
    if not all(stage.settings.schedule for stage in config.timeline):
        # Which goes by tokens: in steps of the run's own batch.
        steps = -(-config.training.train_tokens // config.training.global_batch_tokens)
        findings += _learning_rate("learning rate", config.optimizer, steps, width)
    for stage in config.timeline if config.stages else ():
        settings, name = stage.settings, f"stage {stage.settings.name}"
        slowly = f", reached over {settings.ramp_tokens:,} tokens" if settings.ramp_tokens else ""
        passes = stage.batch_rows // (config.training.micro_batch_size * rows_over)
        findings.append(
            Finding(name, f"steps {stage.first_step + 1:,} to {stage.end_step:,} of "
                    f"{stage.batch_tokens:,} tokens in {passes} passes, "
                    f"{settings.weights or 'all sources'}{slowly}")
        )  # fmt: skip
        if settings.schedule:
            steps = stage.end_batch - stage.first_batch
            findings += _learning_rate(name, settings, steps, width)
    return findings


def _learning_rate(
    subject: str, o: OptimizerConfig | StageConfig, steps: int, width: int
) -> list[Finding]:
    # Adam's best learning rate falls about as one over the width (arXiv 2203.03466); TinyLlama's
    # 4e-4 at 2048 sets the scale. A factor of 8 to either side is not a sign of a slip.
    usual = 4e-4 * 2048 / width
    text = f"{o.schedule} from {o.learning_rate:g} to {o.min_learning_rate:g}, {o.warmup_steps} warm-up steps"  # noqa: E501
    findings = [Finding(subject, text)]

    def warn(text: str) -> None:
        findings.append(Finding(subject, text, "warning"))

    if not usual / 8 <= o.learning_rate <= usual * 8:
        warn(
            f"{o.learning_rate:g} is far from what a width of {width} usually "
            f"takes, about {usual:.1g}: expect {'divergence' if o.learning_rate > usual else 'a slow start'}"  # noqa: E501
        )
    if o.min_learning_rate == o.learning_rate:
        warn("it never decays: min_learning_rate equals learning_rate, as in the first weeks of "
             "TinyLlama's run by mistake; set min_learning_rate to a tenth")  # fmt: skip
    if o.warmup_steps > steps / 4:
        warn(f"warm-up takes {o.warmup_steps} of {steps} steps; a few per cent are usual")
    return findings


def _precision(config: Config) -> list[Finding]:
    dtype = Llama(config.model).compute_dtype
    if jax.default_backend() == "cpu" and dtype == "bfloat16":
        return [
            Finding("precision", "bfloat16 is emulated on CPU, 10 to 50 times slower than float32; "
                    "set model.compute_dtype to auto", "warning")
        ]  # fmt: skip
    return [Finding("precision", f"params and optimizer float32, compute {dtype}")]


def _remat(config: Config) -> list[Finding]:
    model = config.model
    unrolled = (model.scan_unroll or model.num_layers) == model.num_layers
    if model.remat != "none" and unrolled and jax.default_backend() == "cpu":
        return [
            Finding("remat", f'model.remat = "{model.remat}" frees nothing on CPU where the layers '
                    "are unrolled: XLA:CPU merges what is computed again with what was computed "
                    "before; set model.scan_unroll = 1", "warning")
        ]  # fmt: skip
    return []


def _memory(parameters: int, parts: int) -> Finding:
    # Params, two moments and the gradient, float32. Activations come on top and depend on what
    # the compiler makes of them.
    state = 16 * parameters // parts
    available = _device_memory() or _host_memory()
    text = f"{_bytes(state)} for params, moments and gradient, of {_bytes(available)}"
    if state > available:
        return Finding("memory", f"{text}: the model does not fit on one device; along mesh.fsdp "
                       "each of several holds a part", "problem")  # fmt: skip
    return Finding("memory", text)


def _disk(config: Config, parameters: int, run_dir: pathlib.Path) -> Finding:
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    # One more than is kept: an old step goes only when a newer one is sealed.
    steps = config.checkpoint.keep_last + 1
    if config.checkpoint.milestone_tokens:
        steps += config.training.train_tokens // config.checkpoint.milestone_tokens
    needed = 12 * parameters * steps
    text = f"up to {_bytes(needed)} for {steps} checkpoints; {_bytes(free)} free at {place}"
    if needed > free:
        return Finding("disk", f"{text}: the run would fill the disk; name a --workdir with room, "
                       "or lower checkpoint.keep_last or raise checkpoint.milestone_tokens",
                       "warning")  # fmt: skip
    return Finding("disk", text)


def _device_memory() -> int:
    """Bytes of one accelerator; 0 where jax does not say (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
