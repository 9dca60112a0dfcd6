"""Whole training against an independent one: transformers' Llama and torch's AdamW."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tinyllama_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainingConfig,
)
from tinyllama_jax.conversion.hf_config import SpecialIds, from_model_config
from tinyllama_jax.conversion.names import entries
from tinyllama_jax.data import embedded
from tinyllama_jax.data.batch import Batch
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.model.presets import PRESETS
from tinyllama_jax.text.tokenizer import Tokenizer
from tinyllama_jax.training.losses import NextToken
from tinyllama_jax.training.optimizer import make_optimizer
from tinyllama_jax.training.step import init_state, make_train_step

torch = pytest.importorskip("torch", reason="needs the [parity] extra")
transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")

STEPS = 200
BOUND = 1e-3  # nats, at every step

# At twice this learning rate training is unstable: a change of the initial params by 1e-7 moves the
# losses of one and the same program by 2e-3.
CONFIG = Config(
    model=dataclasses.replace(PRESETS["tiny_debug"], compute_dtype="float32"),
    data=DataConfig(seq_len=64),
    optimizer=OptimizerConfig(
        learning_rate=5e-3, min_learning_rate=5e-4, schedule="cosine", warmup_steps=20,
        weight_decay=0.1, grad_clip_norm=1.0,
    ),
    training=TrainingConfig(train_tokens=512 * STEPS, global_batch_tokens=512, micro_batch_size=4),
    evaluation=EvaluationConfig(every_steps=0),
)  # fmt: skip
MICRO_BATCHES = 2


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Torch's spinning threads and XLA's would take the cores from each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def batches():
    """The standard library's code and docstrings, tokenised; no step sees a text twice.

    A quarter of the targets do not count, most of them in one half of the rows, so that the
    micro-batches of a step weigh differently.
    """
    S, rows = CONFIG.data.seq_len, CONFIG.batch_rows
    tokenizer = Tokenizer("")
    files = np.random.default_rng(0).permutation(embedded.library_files())
    ids: list[int] = []
    for file, kind in itertools.product(files, embedded.KINDS):
        for document in embedded.documents(kind, str(file)):
            ids += [tokenizer.bos_id, *tokenizer.encode(document.text[:4000]), tokenizer.eos_id]
        if len(ids) > STEPS * rows * S:
            break
    tokens = np.array(ids[: STEPS * rows * S + 1], np.int32)
    inputs, targets = (part.reshape(STEPS, rows, S) for part in (tokens[:-1], tokens[1:]))
    uncounted = np.linspace(0, 0.5, rows)[:, None]
    weights = (np.random.default_rng(1).random(inputs.shape) >= uncounted).astype(np.float32)
    return [Batch(*arrays) for arrays in zip(inputs, targets, weights, strict=True)]


@pytest.fixture(scope="module")
def initial_params():
    """As TinyLlama's, but drawn by NumPy."""
    rng = np.random.default_rng(2)
    std = math.sqrt(2 / (5 * CONFIG.model.d_model))

    def draw(path, leaf):
        is_norm = path[-1].key.endswith("norm")
        return np.float32(np.ones(leaf.shape) if is_norm else rng.normal(0, std, leaf.shape))

    shapes = jax.eval_shape(Llama(CONFIG.model).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def our_losses(batches, initial_params):
    model, optimizer = Llama(CONFIG.model), make_optimizer(CONFIG.optimizer)
    step = make_train_step(model, NextToken(CONFIG), optimizer, CONFIG)
    state = init_state(model, optimizer, seed=0, params=initial_params)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def learning_rate(step):
    """Warm-up and cosine, written from the paper's words."""
    o = CONFIG.optimizer
    if step < o.warmup_steps:
        return o.learning_rate * step / o.warmup_steps
    turned = math.cos(math.pi * (step - o.warmup_steps) / (STEPS - o.warmup_steps))
    return o.min_learning_rate + (o.learning_rate - o.min_learning_rate) * (1 + turned) / 2


def their_losses(batches, params, *, weight_decay=0.1, max_norm=1.0, rate=learning_rate):
    """The same training as anybody would write it in torch."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **from_model_config(CONFIG.model, "float32", SpecialIds(bos=1, eos=(2,)))
        )
    )
    leaves = flatten_dict(params, sep="/")
    model.load_state_dict(
        {
            entry.name: torch.tensor(entry.take(leaves[entry.row.path], CONFIG.model))
            for entry in entries(CONFIG.model)
        }
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
    )
    losses = []
    for step, batch in enumerate(batches):
        total, weight = 0.0, float(batch.loss_weights.sum())
        for rows in np.split(np.arange(len(batch.tokens)), MICRO_BATCHES):
            logits = model(torch.tensor(batch.tokens[rows]).long()).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.tensor(batch.targets[rows]).long().flatten(),
                reduction="none",
            )  # fmt: skip
            loss = (each * torch.tensor(batch.loss_weights[rows]).flatten()).sum() / weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return np.array(losses)


def test_losses_are_torchs_at_every_step(batches, initial_params, our_losses):
    theirs = their_losses(batches, initial_params)
    differences = np.abs(our_losses - theirs)
    print(
        f"losses {our_losses[0]:.4f} -> {our_losses[-1]:.4f}; difference from torch: largest "
        f"{differences.max():.2e} (step {differences.argmax()}), mean {differences.mean():.2e}"
    )
    assert len(our_losses) == STEPS and our_losses[-10:].mean() < our_losses[0] - 1.5
    assert differences.max() < BOUND


@pytest.mark.parametrize(
    "slip",
    [
        {"weight_decay": 0.0},
        {"max_norm": math.inf},
        {"rate": lambda step: learning_rate(step + 1)},
    ],
    ids=["no decay", "no clipping", "schedule a step ahead"],
)
def test_the_bound_notices_a_slip(batches, initial_params, our_losses, slip):
    """The bound above is tight enough to tell such trainings apart, within its first steps."""
    few = batches[:40]
    theirs = their_losses(few, initial_params, **slip)
    largest = np.abs(our_losses[: len(few)] - theirs).max()
    print(f"largest difference {largest:.2e}")
    assert largest > BOUND
