"""GPUs as data: what MFU needs to know of a card, and a plan of one that is not there.

From NVIDIA's data sheets and architecture white papers; memory is what a driver reports, a little
less than is printed on the card. Floating-point peaks are dense bfloat16 with float32 accumulation.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of card.

    Attributes:
      title: as NVIDIA names it.
      compute_capability: as in (8, 0).
      flops: dense bfloat16 FLOP/s.
      memory_bytes: usable.
      bandwidth: of its memory, bytes/s.
      link_bandwidth: to others in the machine, bytes/s in one direction.
      cores: streaming multiprocessors.
      core_fpus: float32 lanes in each.
      core_shared_bytes: shared memory of each.
      block_shared_bytes: that one block may ask for.
      core_threads: resident threads of each.
      l2_bytes: second-level cache.
      clock_ghz: boost clock.
    """

    title: str
    compute_capability: tuple[int, int]
    flops: float
    memory_bytes: int
    bandwidth: float
    link_bandwidth: float
    cores: int
    core_fpus: int
    core_shared_bytes: int
    block_shared_bytes: int
    core_threads: int
    l2_bytes: int
    clock_ghz: float

    def target_config(self) -> str:
        """The text proto by which XLA compiles for the card without having it."""
        major, minor = self.compute_capability
        # Instructions that only this generation has, such as Hopper's wgmma.
        feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.core_shared_bytes}
              shared_memory_per_block_optin: {self.block_shared_bytes}
              threads_per_core_limit: {self.core_threads}
              core_count: {self.cores}  fpus_per_core: {self.core_fpus}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535  block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.l2_bytes}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
            device_description_str: "{self.title}"
        """


_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

GPUS = {
    "a100-40g": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 312e12, 42_331_013_120, 1.555e12, 300e9,
        108, 64, 164 * _KIB, 163 * _KIB, 2048, 40 * _MIB, 1.41,
    ),
    "a100-80g": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 312e12, 79 * _GIB, 2.039e12, 300e9,
        108, 64, 164 * _KIB, 163 * _KIB, 2048, 40 * _MIB, 1.41,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 989.5e12, 79 * _GIB, 3.35e12, 450e9,
        132, 128, 228 * _KIB, 227 * _KIB, 2048, 50 * _MIB, 1.98,
    ),
    "h200": Gpu(
        "NVIDIA H200", (9, 0), 989.5e12, 151_397_597_184, 4.8e12, 450e9,
        132, 128, 228 * _KIB, 227 * _KIB, 2048, 50 * _MIB, 1.98,
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 2250e12, 178 * _GIB, 7.7e12, 900e9,
        148, 128, 228 * _KIB, 227 * _KIB, 2048, 126 * _MIB, 1.965,
    ),
    "rtx3090": Gpu(
        "NVIDIA GeForce RTX 3090", (8, 6), 71e12, 23 * _GIB + 512 * _MIB, 936e9, 25e9,
        82, 128, 100 * _KIB, 99 * _KIB, 1536, 6 * _MIB, 1.695,
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 165e12, 23 * _GIB + 512 * _MIB, 1008e9, 25e9,
        128, 128, 100 * _KIB, 99 * _KIB, 1536, 72 * _MIB, 2.52,
    ),
}  # fmt: skip


# Other forms of these cards, which a step may run on though no plan is made for them.
_OTHER_PEAKS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
}


def find_gpu(device_kind: str) -> Gpu | None:
    """The card that jax names so; None where it is not in the table."""
    return next((gpu for gpu in GPUS.values() if gpu.title == device_kind), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by jax's name for it; None where it is not known."""
    gpu = find_gpu(device_kind)
    return gpu.flops if gpu else _OTHER_PEAKS.get(device_kind)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs."""

    gpu: Gpu
    hosts: int
    gpus_per_host: int

    @property
    def size(self) -> int:
        return self.hosts * self.gpus_per_host


def parse_gpus(text: str) -> Cluster:
    """The machines that "a100-40g:2x8" (2 machines of 8), "h200:8" or "h200" names.

    Raises:
      ValueError: an unknown GPU, or counts that are none.
    """
    name, _, counts = text.partition(":")
    if name not in GPUS:
        raise ValueError(f'--gpus "{text}": "{name}" is not one of {", ".join(GPUS)}')
    parts = (counts or "1").split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f'--gpus "{text}": "{counts}" is not a number of GPUs, or machines x GPUs in each; '
            f"write {name}:8 or {name}:2x8"
        )
    hosts, each = (1, *map(int, parts))[-2:]
    return Cluster(GPUS[name], hosts, each)
