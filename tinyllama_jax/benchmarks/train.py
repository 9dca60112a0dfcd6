"""The train step against Hugging Face's Llama under torch, eager and compiled.

All contenders start from the same weights, read the same batch, and do the same work: forward,
backward, clipping by global norm, AdamW, and the loss brought to the host after every step. On a
GPU all compute in bfloat16 over float32 weights (torch: autocast).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tinyllama_jax.benchmarks.memory import with_torch_peak_bytes
from tinyllama_jax.benchmarks.rounds import Timing, attempt, interleave, ratio
from tinyllama_jax.benchmarks.torch_llama import torch_llama
from tinyllama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.parallel.devices import peak_flops
from tinyllama_jax.planning.compile import peak_bytes_of
from tinyllama_jax.training import flops
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import TrainState, init_state, make_train_step

OURS = "ours"
# Steps before timing; their losses must agree, by the dtype that is computed in.
_WARM_UP_STEPS = 4
_LOSS_TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}

SMALL = ModelConfig(
    vocab_size=4096, num_layers=4, d_model=256, num_heads=8, num_kv_heads=2, head_dim=32, d_ff=704,
    max_seq_len=256, scan_unroll=0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """Timings by contender, the losses of the warm-up steps, and what else is known of ours.

    Attributes:
      timings, losses: by contender.
      tokens_per_step: of each.
      compile_seconds: of our step.
      temporary_bytes: that our step needs beside its state, as the compiler says.
      absent: why a contender is, by name.
      peak_bytes: of device memory, by contender: ours as the compiler says, torch's as it counts on
        a GPU; None where nothing tells.
      flops_per_token: by convention, over the device's peak; empty where that is not known.
    """

    timings: dict[str, Timing]
    losses: dict[str, list[float]]
    tokens_per_step: int
    compile_seconds: float
    temporary_bytes: int
    flops_per_token: dict[str, float]
    absent: dict[str, str]
    peak_bytes: dict[str, int | None]

    def rows(self) -> list[dict[str, Any]]:
        """One row per contender: tokens/s (median, least, most) and ours relative to it."""
        return [
            {
                "contender": name,
                "tokens_per_second": self.tokens_per_step / timing.median,
                "least": self.tokens_per_step / max(timing.seconds),
                "most": self.tokens_per_step / min(timing.seconds),
                "ours_is_faster_by": ratio(self.timings[OURS], timing),
                "peak_bytes": self.peak_bytes[name],
                "first_loss": self.losses[name][0],
                "last_warm_up_loss": self.losses[name][-1],
            }
            | {
                convention: share * self.tokens_per_step / timing.median
                for convention, share in self.flops_per_token.items()
            }
            for name, timing in self.timings.items()
        ]


def compare(
    model: ModelConfig,
    *,
    rows: int,
    seq_len: int,
    rounds: int,
    against_torch: bool,
    compiled: bool = True,
) -> Result:
    """Times one optimizer step of rows x seq_len random tokens.

    Args:
      model: the shape.
      rows, seq_len: of the batch.
      rounds: how often all contenders take their turn.
      against_torch: Hugging Face's Llama under torch takes part.
      compiled: and under torch.compile too.

    Raises:
      ValueError: the contenders do not compute the same losses.
    """
    # So small that the warm-up's losses differ by rounding alone.
    config = _config(model, rows, seq_len, learning_rate=1e-4)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (rows, seq_len + 1), np.int32)
    optimizer = make_optimizer(config.optimizer)
    state = init_state(Llama(model), optimizer, seed=0)
    weights = jax.device_get(state.params) if against_torch else {}
    ours = _Ours(config, state, ids)
    contenders: dict[str, Callable[[], float]] = {OURS: ours.step}
    losses = {OURS: _warm_up(ours.step)}
    absent: dict[str, str] = {}
    peak_bytes: dict[str, int | None] = {OURS: ours.peak_bytes}
    if against_torch:
        make = functools.partial(_torch_steps, config, weights, ids, compiled=compiled)
        for name, step in (attempt("torch", make, absent) or {}).items():
            warm_up = functools.partial(_warm_up, step)
            found = attempt(name, functools.partial(with_torch_peak_bytes, warm_up), absent)
            if found is not None:
                contenders[name] = step
                losses[name], peak_bytes[name] = found
    for name, values in losses.items():
        difference = np.abs(np.subtract(values, losses[OURS])).max()
        if not difference < _LOSS_TOLERANCES[str(Llama(model).compute_dtype)]:
            raise ValueError(
                f"{name} and {OURS} do not compute the same thing: losses {values} and "
                f"{losses[OURS]} differ by up to {difference:.1e}; a speed would mean nothing"
            )
    peak = peak_flops(jax.local_devices()[0].device_kind)
    counts = {
        "mfu_causal": flops.causal_flops_per_token(model, seq_len),
        "mfu_palm": flops.palm_flops_per_token(model, seq_len),
    }
    return Result(
        interleave(contenders, rounds=rounds, calls=2),
        losses,
        rows * seq_len,
        ours.compile_seconds,
        ours.temporary_bytes,
        {name: count / peak for name, count in counts.items()} if peak else {},
        absent,
        peak_bytes,
    )


def _warm_up(step: Callable[[], float]) -> list[float]:
    return [step() for _ in range(_WARM_UP_STEPS)]


def losses_on(
    tokens: np.ndarray,
    model: ModelConfig,
    *,
    rows: int,
    seq_len: int,
    steps: int,
    learning_rate: float,
) -> list[float]:
    """The loss of each step of a run over given tokens, from the same start on any device.

    Args:
      tokens: `(count,)` ids, read in order and from the front again where they end.
      model, rows, seq_len: of the run.
      steps: how many.
      learning_rate: constant, after a tenth of the steps.

    Raises:
      ValueError: ids that the model has no embedding for, or too few.
    """
    needed = rows * seq_len + 1
    if tokens.ndim != 1 or tokens.size < needed:
        raise ValueError(
            f"tokens of shape {tokens.shape}: one axis of {needed} ids at least is needed for a "
            f"step of {rows} x {seq_len}"
        )
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(
            f"tokens hold ids from {tokens.min()} to {tokens.max()}, but the model has "
            f"{model.vocab_size}; choose the preset of the tokenizer that made them"
        )
    config = _config(model, rows, seq_len, learning_rate, warmup_steps=steps // 10)
    state = init_state(Llama(model), make_optimizer(config.optimizer), seed=0)
    ours = _Ours(config, state, _window(tokens, 0, rows, seq_len))
    losses = []
    for number in range(steps):
        ours.batch = _batch(_window(tokens, number, rows, seq_len))
        losses.append(ours.step())
    return losses


def _window(tokens: np.ndarray, number: int, rows: int, seq_len: int) -> np.ndarray:
    """The ids of a step: rows that follow one another, each with the first id of the next."""
    starts = (number * rows + np.arange(rows)) * seq_len
    at = starts[:, None] + np.arange(seq_len + 1)
    return tokens[at % tokens.size].astype(np.int32)


def _config(
    model: ModelConfig, rows: int, seq_len: int, learning_rate: float, warmup_steps: int = 0
) -> Config:
    tokens = rows * seq_len
    return Config(
        model=model,
        data=DataConfig(seq_len=seq_len),
        optimizer=OptimizerConfig(
            warmup_steps=warmup_steps, learning_rate=learning_rate, min_learning_rate=learning_rate
        ),
        training=TrainingConfig(
            train_tokens=1_000_000 * tokens, global_batch_tokens=tokens, micro_batch_size=rows
        ),
    )


def _batch(ids: np.ndarray) -> Batch:
    return Batch(ids[:, :-1], ids[:, 1:], np.ones(ids[:, 1:].shape, np.float32))


class _Ours:
    """Our step, compiled, with its state and the batch that it reads."""

    def __init__(self, config: Config, state: TrainState, ids: np.ndarray):
        self.batch = _batch(ids)
        self._state = state
        step_fn = make_train_step(
            Llama(config.model), NextToken(config), make_optimizer(config.optimizer), config
        )
        began = time.perf_counter()
        self._compiled = step_fn.lower(state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - began
        memory = self._compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes if memory is not None else 0
        self.peak_bytes = peak_bytes_of(self._compiled)

    def step(self) -> float:
        self._state, metrics = self._compiled(self._state, self.batch)
        return float(metrics["loss"])


def _torch_steps(
    config: Config, weights: dict[str, Any], ids: np.ndarray, *, compiled: bool
) -> dict[str, Callable[[], float]]:
    """The same model and optimizer, eager and compiled; each begins from `weights`."""
    import torch

    optimizer_config = config.optimizer
    llama = torch_llama(config.model, weights)
    start = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llama.to(device)
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=optimizer_config.learning_rate, eps=optimizer_config.eps,
        betas=(optimizer_config.beta1, optimizer_config.beta2),
        weight_decay=optimizer_config.weight_decay, fused=True,
    )  # fmt: skip
    tokens = torch.from_numpy(ids[:, :-1].astype(np.int64)).to(device)
    targets = torch.from_numpy(ids[:, 1:].astype(np.int64)).reshape(-1).to(device)

    def loss_of(tokens, targets):
        logits = llama(input_ids=tokens, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)

    def step_with(loss_of) -> Callable[[], float]:
        begun = False

        def step() -> float:
            nonlocal begun
            if not begun:
                begun = True
                llama.load_state_dict(start)
                llama.zero_grad()
                optimizer.state.clear()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = loss_of(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(llama.parameters(), optimizer_config.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    steps = {"torch.compile": step_with(torch.compile(loss_of))} if compiled else {}
    return {**steps, "torch eager": step_with(loss_of)}
