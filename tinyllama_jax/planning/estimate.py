"""How long a step would take: a roofline over what the step computes, moves and sends.

It is an estimate from above of speed: kernels are assumed to run as fast as good ones were measured
to, and everything that can overlap to overlap.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from tinyllama_jax.config import Config, ModelConfig
from tinyllama_jax.model.llama import parameter_count
from tinyllama_jax.parallel.devices import Cluster
from tinyllama_jax.planning.collectives import Collective
from tinyllama_jax.training import flops

# Shares of the bfloat16 peak. Large matrix products: 790 of 989.5 TFLOP/s, measured on an H200.
# Attention with heads of 64: what tuned Triton kernels are published with on H100, 249 TFLOP/s
# forward and 221 backward, where backward is 2.5 times the work of forward but counted as 2.
MATMUL_EFFICIENCY = 0.80
ATTENTION_EFFICIENCY = 3 / (1 / 249 + 2.5 / 221) / 989.5
NETWORK_BANDWIDTH = 25e9  # bytes/s per GPU and direction: a 200 Gbit/s port each


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one optimizer step on each GPU, and what follows for the run.

    Attributes:
      matmul_seconds, attention_seconds: of the FLOPs, recomputed ones included.
      memory_seconds: of what is bound by memory: norms, activations, optimizer.
      communication_seconds: of all that is sent, if nothing overlapped.
      exposed_seconds: of it, what cannot hide behind matrix products.
      tokens_per_second: per GPU.
      mfu_causal, mfu_palm: by the two conventions of `training.flops`.
      days: of the whole token budget.
      gpu_hours: of all GPUs together.
    """

    matmul_seconds: float
    attention_seconds: float
    memory_seconds: float
    communication_seconds: float
    exposed_seconds: float
    tokens_per_second: float
    mfu_causal: float
    mfu_palm: float
    days: float
    gpu_hours: float

    @property
    def step_seconds(self) -> float:
        return (
            self.matmul_seconds
            + self.attention_seconds
            + self.memory_seconds
            + self.exposed_seconds
        )


def estimate(
    config: Config,
    cluster: Cluster,
    shape: tuple[int, int, int],
    sent: Iterable[Collective],
    network_bandwidth: float = NETWORK_BANDWIDTH,
) -> Estimate:
    """Estimates a step.

    Args:
      config: the run.
      cluster: the machines.
      shape: data x fsdp x tensor.
      sent: the compiled step's collectives.
      network_bandwidth: between machines, bytes/s per GPU in one direction.
    """
    gpu, seq_len, model = cluster.gpu, config.data.seq_len, config.model
    data, fsdp, tensor = shape
    tokens = config.training.global_batch_tokens / (data * fsdp)  # that a GPU sees in a step
    causal = flops.causal_flops_per_token(model, seq_len)
    attention = 6 * model.num_layers * model.num_heads * model.head_dim * seq_len
    matmul = causal - attention
    in_layers = matmul - 6 * model.d_model * model.vocab_size
    # A third of a training pass's FLOPs are its forward pass, of which the last product of a layer
    # is not needed again.
    last = 2 * model.num_layers * model.d_model * model.d_ff
    again = {"none": 0.0, "dots": 0.0}.get(model.remat, in_layers / 3 - last)
    matmul_seconds = tokens * (matmul + again) / tensor / (MATMUL_EFFICIENCY * gpu.flops)
    more_attention = 4 / 3 if model.remat == "full" else 1
    attention_seconds = (
        tokens * attention * more_attention / tensor / (ATTENTION_EFFICIENCY * gpu.flops)
    )
    params = parameter_count(model) / (fsdp * tensor)
    passes = config.accumulation_steps(data * fsdp)
    elementwise = _activation_bytes_per_token(model, tensor)
    if model.remat != "none":  # its forward third again
        elementwise *= 4 / 3
    moved = (
        tokens * elementwise
        + passes * 8 * params  # the float32 sum of gradients, read and written
        + 28 * params  # params and two moments read and written, the gradient read
    )
    seconds_of = [(one, _seconds(one, cluster, network_bandwidth)) for one in sent]
    communication = sum(seconds for _, seconds in seconds_of)
    # Sums over `tensor` stand between products that need each other; the rest runs beside them.
    in_between = sum(seconds for one, seconds in seconds_of if _over_tensor(one, tensor))
    exposed = in_between + max(0.0, communication - in_between - matmul_seconds)
    seconds = matmul_seconds + attention_seconds + moved / gpu.bandwidth + exposed
    per_second = config.training.global_batch_tokens / seconds / cluster.size
    run_seconds = config.training.train_tokens / (per_second * cluster.size)
    return Estimate(
        matmul_seconds=matmul_seconds,
        attention_seconds=attention_seconds,
        memory_seconds=moved / gpu.bandwidth,
        communication_seconds=communication,
        exposed_seconds=exposed,
        tokens_per_second=per_second,
        mfu_causal=per_second * causal / gpu.flops,
        mfu_palm=per_second * flops.palm_flops_per_token(model, seq_len) / gpu.flops,
        days=run_seconds / 86400,
        gpu_hours=run_seconds * cluster.size / 3600,
    )


def _over_tensor(one: Collective, tensor: int) -> bool:
    """Whether a collective joins parts of matrices; devices are numbered along `tensor` first."""
    return 1 < len(one.group) <= tensor and one.group[-1] - one.group[0] < tensor


def _activation_bytes_per_token(model: ModelConfig, tensor: int) -> float:
    """bfloat16 bytes that elementwise work reads and writes, forward and backward.

    Forward per layer: two norms (read, write), two residual sums (read two, write one), rotating q
    (read, write), and SwiGLU (read two, write one). Backward reads and writes twice that. Heads and
    feed-forward width are cut along `tensor`, the rest is done by each of its devices.
    """
    q = model.num_heads * model.head_dim
    forward = 10 * model.d_model + (2 * q + 3 * model.d_ff) / tensor
    return 2 * 3 * forward * model.num_layers


def _seconds(one: Collective, cluster: Cluster, network_bandwidth: float) -> float:
    group = one.group or tuple(range(cluster.size))
    hosts = collections.Counter(device // cluster.gpus_per_host for device in group)
    bandwidth = cluster.gpu.link_bandwidth
    if len(hosts) > 1:  # the members in a machine send through a port each
        bandwidth = min(bandwidth, min(hosts.values()) * network_bandwidth)
    rounds = 2 if one.kind == "all-reduce" else 1  # it scatters sums and gathers them
    return one.times * rounds * one.bytes * (len(group) - 1) / len(group) / bandwidth
