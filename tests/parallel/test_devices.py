"""GPUs as data, and how a cluster is named."""

import pytest

from tinyllama_jax.parallel.devices import GPUS, parse_gpus, peak_flops


@pytest.mark.parametrize(
    ("text", "name", "hosts", "each"),
    [("a100-40g:2x8", "a100-40g", 2, 8), ("h200:8", "h200", 1, 8), ("rtx4090", "rtx4090", 1, 1)],
)
def test_a_cluster_is_named(text, name, hosts, each):
    cluster = parse_gpus(text)
    assert (cluster.gpu, cluster.hosts, cluster.gpus_per_host) == (GPUS[name], hosts, each)
    assert cluster.size == hosts * each


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100:8", r'"a100" is not one of a100-40g, a100-80g'),
        ("h200:0", "is not a number of GPUs"),
        ("h200:2x", "write h200:8 or h200:2x8"),
        ("h200:2x8x1", "write h200:8 or h200:2x8"),
    ],
)
def test_what_is_no_cluster_is_answered(text, message):
    with pytest.raises(ValueError, match=message):
        parse_gpus(text)


def test_each_card_describes_itself_to_the_compiler():
    for gpu in GPUS.values():
        text = gpu.target_config()
        assert f"device_memory_size: {gpu.memory_bytes}" in text and gpu.title in text
        assert text.count("{") == text.count("}")
        # What one block may ask for is a little less than what a multiprocessor has.
        assert 0 < gpu.core_shared_bytes - gpu.block_shared_bytes <= 2048


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, expected):
    assert peak_flops(kind) == expected
