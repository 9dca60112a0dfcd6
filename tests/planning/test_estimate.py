"""The roofline: figures worked out by hand, and what moves it where."""

import dataclasses

import pytest

from tinyllama_jax.config import load_config_file
from tinyllama_jax.parallel.devices import parse_gpus
from tinyllama_jax.planning import estimate as module
from tinyllama_jax.planning.collectives import Collective
from tinyllama_jax.planning.estimate import estimate

CONFIG = load_config_file("configs/tinyllama_1b.py")
PAPER = parse_gpus("a100-40g:2x8")


def test_the_papers_run():
    """16 A100-40G took 90 days at 24,000 tokens/s each: at best it is a little less."""
    found = estimate(CONFIG, PAPER, (1, 16, 1), [])
    tokens = 2_097_152 / 16
    products = tokens * 6 * 1_034_420_224 / (module.MATMUL_EFFICIENCY * 312e12)
    assert found.matmul_seconds == pytest.approx(products)
    assert 24_000 < found.tokens_per_second < 32_000
    assert found.tokens_per_second == pytest.approx(tokens / found.step_seconds)
    assert 60 < found.days < 90
    assert found.gpu_hours == pytest.approx(found.days * 24 * 16)
    assert found.mfu_palm / found.mfu_causal == pytest.approx(7.708 / 6.760, rel=1e-3)


def sent(gib, group=range(16), kind="all-gather"):
    return [Collective(kind, 0, int(gib * 2**30), False, 1, tuple(group))]


def test_what_is_sent_hides_until_it_is_too_much():
    alone = estimate(CONFIG, PAPER, (1, 16, 1), [])
    little = estimate(CONFIG, PAPER, (1, 16, 1), sent(20))
    assert little.step_seconds == alone.step_seconds
    # 8 ports of 25 GB/s in each machine carry it.
    assert little.communication_seconds == pytest.approx(20 * 2**30 * 15 / 16 / 200e9)
    much = estimate(CONFIG, PAPER, (1, 16, 1), sent(2000))
    assert much.exposed_seconds == much.communication_seconds - much.matmul_seconds > 0
    within = estimate(CONFIG, PAPER, (2, 8, 1), sent(20, range(8)))
    assert within.communication_seconds == pytest.approx(20 * 2**30 * 7 / 8 / 300e9)
    across = estimate(CONFIG, PAPER, (2, 8, 1), sent(20, (0, 8)))  # one in each machine
    assert across.communication_seconds == pytest.approx(20 * 2**30 / 2 / 25e9)
    both_ways = estimate(CONFIG, PAPER, (1, 16, 1), sent(20, kind="all-reduce"))
    assert both_ways.communication_seconds == pytest.approx(2 * little.communication_seconds)


def test_sums_over_tensor_do_not_hide():
    found = estimate(CONFIG, PAPER, (1, 4, 4), sent(1, range(4), "all-reduce"))
    assert found.exposed_seconds == found.communication_seconds > 0
    # Of the same size over fsdp (0, 4, 8, 12) they do.
    assert estimate(CONFIG, PAPER, (1, 4, 4), sent(1, range(0, 16, 4))).exposed_seconds == 0


def test_recomputing_costs_less_than_a_third_of_the_layers():
    def seconds(remat):
        model = dataclasses.replace(CONFIG.model, remat=remat)
        return estimate(dataclasses.replace(CONFIG, model=model), PAPER, (1, 16, 1), [])

    none, attention, full = map(seconds, ("none", "attention", "full"))
    in_layers = (1_034_420_224 - 2048 * 32000) / 1_034_420_224
    last = 22 * 2048 * 5632 / 1_034_420_224  # the last product of a layer is not needed again
    share = (in_layers - last) / 3
    assert attention.matmul_seconds == pytest.approx(none.matmul_seconds * (1 + share))
    assert attention.attention_seconds == none.attention_seconds < full.attention_seconds
    dots = seconds("dots")
    assert dots.matmul_seconds == none.matmul_seconds
    assert none.memory_seconds < dots.memory_seconds < 4 / 3 * none.memory_seconds
