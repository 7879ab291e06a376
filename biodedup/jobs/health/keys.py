"""Makes a register's key, and turns galleries into encrypted ones and back.

Owns the file of a new key. `gallery/care/encrypting.py` does the rest.
"""

from __future__ import annotations

from pathlib import Path

from biodedup.common.arguments import checked
from biodedup.errors import InvalidInput
from biodedup.gallery.care.encrypting import KeyStatus, decrypt, encrypt, key_status, rotate
from biodedup.gallery.files.encryption.keyring import Key
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import make_private_folder, open_private
from biodedup.keys import new_key

__all__ = ["KeyStatus", "decrypt", "encrypt", "key_status", "make_register_key", "rotate_key"]

rotate_key = rotate


@checked
def make_register_key(file: Path) -> str:
    """Writes a new key, 32 random bytes in hexadecimal, and returns its id. Raises InvalidInput where the file exists,
    StorageUnavailable."""
    key = new_key()
    if file.exists():
        raise InvalidInput(f"{file} exists, and a key is never replaced; name a new file")
    with translated(f"writing {file}"):
        make_private_folder(file.parent)
        with open_private(file, exclusive=True) as opened:
            opened.write(key.hex().encode() + b"\n")
    return Key(key).key_id
