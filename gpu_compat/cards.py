"""What NVIDIA's data sheets say about the cards that the project plans for (host).

Rates are dense, without structured sparsity. Memory is what the driver shows of it (nvidia-smi), in GiB.
"""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    name: str  # JAX's device_kind
    memory_gib: float
    bandwidth_gbps: float  # memory, GB/s
    bfloat16_tflops: float  # tensor cores, float32 accumulation
    tf32_tflops: float
    link_gbps: float  # to the other cards, each direction, GB/s: NVLink, else PCIe 4.0 x16


CARDS: dict[str, Card] = {
    "h20": Card("NVIDIA H20", 95.6, 4000, 148, 74, 450),
    "h100": Card("NVIDIA H100 80GB HBM3", 79.6, 3350, 989, 494, 450),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", 80.0, 2039, 312, 156, 300),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", 40.0, 1555, 312, 156, 300),
    "l40s": Card("NVIDIA L40S", 45.0, 864, 362, 183, 32),
    "4090": Card("NVIDIA GeForce RTX 4090", 24.0, 1008, 165, 82.6, 32),
}


def card_of(device_kind: str) -> Card | None:
    """None for a card that is not in the table; a variant, such as H100 PCIe, has another data sheet."""
    return next((card for card in CARDS.values() if card.name == device_kind), None)
