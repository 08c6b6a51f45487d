"""Replies kept on disk by the content of their requests: each file appears whole or not at all (io)."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from sif_jax.errors import InputError


class ReplyCache:
    """Without a directory nothing is kept."""

    def __init__(self, directory: str | None, base_url: str) -> None:
        self._directory = None if directory is None else Path(directory)
        self._base_url = base_url
        if self._directory is None:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                pass
        except OSError as error:
            raise InputError(
                f"cannot write ({error.strerror})", file=directory, fix="choose another cache directory, or null"
            ) from None

    def find(self, body: bytes) -> str | None:
        """The kept reply to this request; a damaged file is as none."""
        if self._directory is None:
            return None
        try:
            text = json.loads(self._file(self._directory, body).read_bytes())["text"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return text if isinstance(text, str) else None

    def keep(self, body: bytes, text: str) -> None:
        if self._directory is None:
            return
        file = self._file(self._directory, body)
        partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
        with suppress(OSError):  # a full disk: the reply is asked for again, nothing else is lost
            try:
                file.parent.mkdir(exist_ok=True)
                partial.write_text(json.dumps({"text": text}))
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)

    def _file(self, directory: Path, body: bytes) -> Path:
        key = hashlib.sha256(self._base_url.encode() + b"\n" + body).hexdigest()
        return directory / key[:2] / f"{key}.json"
