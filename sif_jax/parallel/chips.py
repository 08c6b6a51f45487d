"""What the makers' data sheets say about the chips that the project plans for (host).

TPUs: cloud.google.com/tpu/docs/v5e, /v5p, /v6e ("System architecture"). GPUs: NVIDIA's data sheets. Rates are dense, bfloat16
with float32 accumulation, without structured sparsity.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Card(NamedTuple):
    """A GPU. Memory is what the driver shows of it (nvidia-smi)."""

    name: str  # JAX's device_kind
    memory_gib: float
    bandwidth_gbps: float  # memory, GB/s
    bfloat16_tflops: float  # tensor cores, float32 accumulation
    tf32_tflops: float
    link_gbps: float  # to the other cards, each direction, GB/s: NVLink, else PCIe 4.0 x16
    architecture: str
    cores: int  # streaming multiprocessors
    l2_mib: float
    clock_ghz: float  # boost


class Architecture(NamedTuple):
    """Limits of a CUDA compute capability (CUDA C++ Programming Guide, "Technical specifications per compute capability")."""

    capability: tuple[int, int]
    shared_memory: int  # bytes per multiprocessor
    threads: int  # per multiprocessor


ARCHITECTURES = {
    "hopper": Architecture((9, 0), 233472, 2048),
    "ampere": Architecture((8, 0), 167936, 2048),
    "ada": Architecture((8, 9), 102400, 1536),
}

CARDS: dict[str, Card] = {
    "h20": Card("NVIDIA H20", 95.6, 4000, 148, 74, 450, "hopper", 78, 60, 1.98),
    "h100": Card("NVIDIA H100 80GB HBM3", 79.6, 3350, 989, 494, 450, "hopper", 132, 50, 1.98),
    "h200": Card("NVIDIA H200", 140.4, 4800, 989, 494, 450, "hopper", 132, 50, 1.98),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", 80.0, 2039, 312, 156, 300, "ampere", 108, 40, 1.41),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", 40.0, 1555, 312, 156, 300, "ampere", 108, 40, 1.41),
    "l40s": Card("NVIDIA L40S", 45.0, 864, 362, 183, 32, "ada", 142, 96, 2.52),
    "4090": Card("NVIDIA GeForce RTX 4090", 24.0, 1008, 165, 82.6, 32, "ada", 128, 72, 2.52),
}
GPU_MEMORY_FRACTION = 0.92  # given to XLA; the rest is the driver's, cuDNN's and NCCL's, which allocate beside it


class Chip(NamedTuple):
    name: str
    hbm_bytes: float  # what XLA may allocate
    flops: float  # per second
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second that leave a chip, over all its links, in one direction


# The memory is the limit that the compiler names when a program does not fit; the data sheets say 16, 95 and 32 GB.
# Interchip bandwidth: half of "bidirectional, per chip" (400, 1200 and 800 GB/s); v5p's sheet says 4800 Gbit/s.
TPUS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1638e9, 400e9),
}


def chip_of_card(card: Card) -> Chip:
    return Chip(
        card.name,
        GPU_MEMORY_FRACTION * card.memory_gib * GIB,
        card.bfloat16_tflops * 1e12,
        card.bandwidth_gbps * 1e9,
        card.link_gbps * 1e9,
    )
