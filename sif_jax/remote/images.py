"""Image files as parts of a chat message (io)."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

SENT_AS_THEY_ARE = frozenset({"PNG", "JPEG", "WEBP", "GIF"})  # what OpenAI's endpoint reads


def image_part(path: Path) -> dict[str, Any]:
    """The file's own bytes as a data URL; a format that endpoints do not read is sent as PNG.

    Raises:
      OSError: no such file, or not an image.
    """
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format
        if kind not in SENT_AS_THEY_ARE:
            kind, file = "PNG", io.BytesIO()
            image.convert("RGB").save(file, kind)
            data = file.getvalue()
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
