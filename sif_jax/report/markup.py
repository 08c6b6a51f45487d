"""HTML and SVG elements whose text and attributes are escaped unless they are already `Markup` (host)."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML by construction. Only `element` and `join` make it, and constants of this package."""


def element(name: str, *children: str, **attributes: str | float | int) -> Markup:
    """`class_` gives `class` and `stroke_width` gives `stroke-width`; numbers are written to two decimals."""
    written = "".join(f' {_attribute(key)}="{escape(_number(value))}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _number(value: str | float | int) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
