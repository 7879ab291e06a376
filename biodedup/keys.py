"""Fetches a register's encryption key: from a file, an environment variable, a command, or a function.

Owns the fetching and decoding of a key. Never stores a key, and never encrypts. No error text, log message or settings file holds a key, and
no process that decodes captures inherits it.

A key is 32 random bytes: raw, as 64 hexadecimal digits, or as 44 characters of base64.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import shlex
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from biodedup.common.arguments import check_fields
from biodedup.errors import InvalidInput, StorageUnavailable

KEY_BYTES = 32
_COMMAND_S_MAX = 60.0
_READ_BYTES_MAX = 4096
_HEX = re.compile(rb"[0-9a-fA-F]{64}")
_environment = threading.Lock()
"""Held while a key is read from the environment, or is absent from it."""


@dataclass(frozen=True)
class KeyProvider:
    """The source of a register's key. State exactly one of the three fields."""

    file: Path | None = None
    """A file that holds the key: mode 0600 or 0400. A group may read it (0640, 0440), as with mounted secrets; others may not."""
    environment: str | None = None
    """The name of an environment variable that holds the key, in hexadecimal or base64."""
    command: tuple[str, ...] = ()
    """A program and its arguments. The program prints the key to its standard output; it may ask a KMS, an HSM or Vault. It runs once,
    without a shell, when a gallery is opened, and may take 60 seconds."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.command, str) or not all(isinstance(word, str) and word for word in self.command):
            raise InvalidInput("command is a program and its arguments; write them as a list of texts")
        object.__setattr__(self, "command", tuple(self.command))
        stated = [name for name in ("file", "environment", "command") if getattr(self, name)]
        if len(stated) != 1:
            raise InvalidInput(f"file is one of three places, got {', '.join(stated) or 'none'}; state exactly one")

    def __call__(self) -> bytes:
        """The key, 32 bytes. Raises InvalidInput if it is absent or invalid, StorageUnavailable if the command fails."""
        if self.file is not None:
            return decoded(_read(self.file), f"key file {self.file}")
        if self.environment:
            with _environment:
                value = os.environ.get(self.environment)
            if not value:
                raise InvalidInput(f"environment variable {self.environment} holds no key; set it")
            return decoded(value.encode(errors="surrogateescape"), f"environment variable {self.environment}")
        return decoded(_run(self.command), f"the output of {self.command[0]}")


KeySource = Callable[[], bytes]
"""A KeyProvider, or the caller's function that returns the key."""


@contextmanager
def hidden_from_children(source: KeySource | None) -> Iterator[None]:
    """Processes that are started in this block do not inherit the environment variable of a key. For code of others in this process the
    variable is absent meanwhile, too."""
    if not isinstance(source, KeyProvider) or not source.environment:
        yield
        return
    with _environment:
        value = os.environ.pop(source.environment, None)
        try:
            yield
        finally:
            if value is not None:
                os.environ[source.environment] = value


def fetched(source: KeySource) -> bytes:
    """The checked key from a provider or from the caller's function. Raises InvalidInput, StorageUnavailable."""
    key = source()
    if not isinstance(key, bytes | bytearray):
        raise InvalidInput(f"keys returned {type(key).__name__}, wanted 32 bytes")
    return decoded(bytes(key), "what keys returned")


def decoded(text: bytes, where: str) -> bytes:
    """A key from its raw, hexadecimal or base64 form. Raises InvalidInput, which never shows the text."""
    if len(text) == KEY_BYTES:
        return text
    stripped = text.strip()
    if _HEX.fullmatch(stripped):
        return bytes.fromhex(stripped.decode())
    with suppress(binascii.Error, ValueError):
        key = base64.b64decode(stripped, validate=True)
        if len(key) == KEY_BYTES:
            return key
    raise InvalidInput(
        f"{where} holds {len(text)} bytes that are no key; wanted 32 bytes, raw, in hexadecimal or in base64; "
        "`biodedup key new FILE` makes one"
    )


def new_key() -> bytes:
    """32 random bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def _read(path: Path) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInput(
            f"key file {path} cannot be read ({type(error).__name__}); name the file of the key"
        ) from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"key file {path} is no regular file; name the file of the key")
        if status.st_mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
            raise InvalidInput(f"key file {path} is open to other users; run `chmod 600 {shlex.quote(str(path))}`")
        return os.read(file, _READ_BYTES_MAX)
    finally:
        os.close(file)


def _run(command: tuple[str, ...]) -> bytes:
    name = command[0]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_COMMAND_S_MAX
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageUnavailable(
            f"the key's command {name} failed ({type(error).__name__}); nothing changed; try again when it works"
        ) from None
    if done.returncode:
        raise StorageUnavailable(
            f"the key's command {name} ended with status {done.returncode}; nothing changed; try again when it works"
        )
    return done.stdout[:_READ_BYTES_MAX]
