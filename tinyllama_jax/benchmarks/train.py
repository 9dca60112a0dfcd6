"""The train step against Hugging Face's Llama under torch, eager and compiled.

All contenders start from the same weights, read the same batch, and do the same work: forward,
backward, clipping by global norm, AdamW, and the loss brought to the host after every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tinyllama_jax.benchmarks.rounds import Timing, interleave, ratio
from tinyllama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tinyllama_jax.conversion.names import entries
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.data.workers import available_cores
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import TrainState, init_state, make_train_step

OURS = "ours"
# Steps before timing; their losses must agree.
_WARM_UP_STEPS = 4
_LOSS_TOLERANCE = 1e-3

SMALL = ModelConfig(
    vocab_size=4096, num_layers=4, d_model=256, num_heads=8, num_kv_heads=2, head_dim=32, d_ff=704,
    max_seq_len=256, scan_unroll=0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """Timings by contender, the losses of the warm-up steps, and tokens per step."""

    timings: dict[str, Timing]
    losses: dict[str, list[float]]
    tokens_per_step: int

    def rows(self) -> list[dict[str, Any]]:
        """One row per contender: tokens/s (median, least, most) and ours relative to it."""
        return [
            {
                "contender": name,
                "tokens_per_second": self.tokens_per_step / timing.median,
                "least": self.tokens_per_step / max(timing.seconds),
                "most": self.tokens_per_step / min(timing.seconds),
                "ours_is_faster_by": ratio(self.timings[OURS], timing),
                "first_loss": self.losses[name][0],
                "last_warm_up_loss": self.losses[name][-1],
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
    tokens = rows * seq_len
    config = Config(
        model=model,
        data=DataConfig(seq_len=seq_len),
        optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-3, min_learning_rate=1e-3),
        training=TrainingConfig(
            train_tokens=1000 * tokens, global_batch_tokens=tokens, micro_batch_size=rows
        ),
    )
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (rows, seq_len + 1), np.int32)
    optimizer = make_optimizer(config.optimizer)
    state = init_state(Llama(model), optimizer, seed=0)
    contenders: dict[str, Callable[[], float]] = {}
    if against_torch:
        weights = jax.device_get(state.params)
        contenders["torch eager"] = _torch_step(config, weights, ids, compiled=False)
        if compiled:
            contenders["torch.compile"] = _torch_step(config, weights, ids, compiled=True)
    contenders = {OURS: _our_step(config, state, ids), **contenders}
    losses = {name: [step() for _ in range(_WARM_UP_STEPS)] for name, step in contenders.items()}
    for name, values in losses.items():
        difference = np.abs(np.subtract(values, losses[OURS])).max()
        if not difference < _LOSS_TOLERANCE:
            raise ValueError(
                f"{name} and {OURS} do not compute the same thing: losses {values} and "
                f"{losses[OURS]} differ by up to {difference:.1e}; a speed would mean nothing"
            )
    return Result(interleave(contenders, rounds=rounds, calls=2), losses, tokens)


def _our_step(config: Config, state: TrainState, ids: np.ndarray) -> Callable[[], float]:
    batch = Batch(ids[:, :-1], ids[:, 1:], np.ones(ids[:, 1:].shape, np.float32))
    step_fn = make_train_step(
        Llama(config.model), NextToken(config), make_optimizer(config.optimizer), config
    )

    def step() -> float:
        nonlocal state
        state, metrics = step_fn(state, batch)
        return float(metrics["loss"])

    return step


def _torch_step(
    config: Config, weights: dict[str, Any], ids: np.ndarray, *, compiled: bool
) -> Callable[[], float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(available_cores())
    model, optimizer_config = config.model, config.optimizer
    hf_config = LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.d_model, intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim,
        max_position_embeddings=model.max_seq_len, rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    llama = LlamaForCausalLM(hf_config)
    tensors = {}
    for entry in entries(model):
        leaf: Any = weights
        for key in entry.row.path.split("/"):
            leaf = leaf[key]
        tensors[entry.name] = torch.from_numpy(entry.take(leaf, model).copy())
    llama.load_state_dict(tensors, strict=not model.tie_embeddings)
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=optimizer_config.learning_rate, eps=optimizer_config.eps,
        betas=(optimizer_config.beta1, optimizer_config.beta2),
        weight_decay=optimizer_config.weight_decay, fused=True,
    )  # fmt: skip
    forward = torch.compile(llama) if compiled else llama
    tokens = torch.from_numpy(ids[:, :-1].astype(np.int64))
    targets = torch.from_numpy(ids[:, 1:].astype(np.int64)).reshape(-1)

    def step() -> float:
        logits = forward(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, model.vocab_size), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), optimizer_config.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
