"""The cards that the project plans for, by what JAX calls them (host)."""

from __future__ import annotations

from sif_jax.parallel.chips import CARDS, Card

__all__ = ["CARDS", "Card", "card_of"]


def card_of(device_kind: str) -> Card | None:
    """None for a card that is not in the table; a variant, such as H100 PCIe, has another data sheet."""
    return next((card for card in CARDS.values() if card.name == device_kind), None)
