"""JSON lines under a seal: the last line holds the SHA-256 of all lines before it, so that every damage is noticed."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def seal(lines: Iterable[object]) -> bytes:
    """The content of a sealed file; equal lines give equal bytes."""
    body = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines).encode()
    return body + _closing(body)


def unseal(content: bytes) -> list[Any]:
    """The lines of a sealed file. Raises ValueError if the digest differs; nothing is parsed before it is checked."""
    cut = content.rfind(b"\n", 0, -1) + 1
    if content[cut:] != _closing(content[:cut]):
        raise ValueError("its digest differs")
    return [json.loads(line) for line in content[:cut].splitlines()]


def _closing(body: bytes) -> bytes:
    return f'{{"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
