"""Files written whole or not at all, and the hashes that identify their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convexheads.errors import DataError, describe

_CHUNK = 1 << 20


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the content of ``value`` only (keys sorted, no spaces)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path, length: int | None = None) -> str:
    """SHA-256 (hexadecimal) of a file, or of its first ``length`` bytes."""
    sha = hashlib.sha256()
    left = path.stat().st_size if length is None else length
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(_CHUNK, left))):
            sha.update(block)
            left -= len(block)
    return sha.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the system lets a folder be synchronised."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(name: str) -> str:
    """Name under which a file is written before it replaces ``name``.

    It is always the same, so that what a killed process leaves behind is overwritten by the next one.
    """
    return f".{name}.tmp"


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old content or the new, never a mixture.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written; the old content is still there then.
    """
    temporary = path.parent / temporary_name(path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; equal values give equal bytes."""
    write_atomic(path, (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    DataError
        If the file cannot be read, is cut off, or is not a JSON object; ``what`` names it and ``fix``
        says what to do.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: cannot read the {what} ({error}). {fix}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: {describe(type(value).__name__, f'a JSON object, the {what}', fix)}")
    return value


@contextlib.contextmanager
def full_disk_as_data_error(path: Path, fix: str) -> Iterator[None]:
    """Turn an out-of-space error met inside the block into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DataError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"{path}: the disk is full ({error.strerror}). {fix}") from error
