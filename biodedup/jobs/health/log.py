"""Verifies the hash chain of a gallery's commits, and signs checkpoints of the chain, which an auditor keeps on another system.

Owns the format of a checkpoint. `gallery.care.log` verifies the chain, and `jobs.shared.signing` signs.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from biodedup.common.arguments import checked
from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.errors import GalleryDamaged, InvalidInput, StorageUnavailable
from biodedup.gallery.care.log import LogReport, Mark, verify_chain
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.private import replace_private
from biodedup.jobs.shared.signing import make_signing_key, read_signed, sign_document

__all__ = ["Checkpoint", "LogReport", "log_checkpoint", "make_signing_key", "verify_log"]

_TITLE, _POST_S_MAX = "log checkpoint", 30.0
_FIELDS = {"format": int, "gallery_id": str, "number": int, "commit": int, "chain": str, "time": float}


@dataclass(frozen=True)
class Checkpoint(Described):
    """A signed value of the hash chain. chain: the value, hexadecimal; commit: the number of commits that it covers; number: of the chain's link;
    time: seconds since 1970; signed_by: the public key, hexadecimal."""

    gallery_id: str
    number: int
    commit: int
    chain: str
    time: float
    signed_by: str


@checked
def verify_log(
    gallery: str | Path, config: Config | None = None, *, checkpoint: Path | None = None, public_key: Path | None = None
) -> LogReport:
    """Verifies the chain of a gallery, the rows of its database, and the headers of its files; of a register, the whole files.

    gallery: a folder, or the URL of a register, with `Config(cluster=...)`. checkpoint: an earlier checkpoint, which must be in this chain;
    public_key: PEM file of its signer, without which the signature only proves that the file is complete. Raises InvalidInput, NotAGallery,
    KeyMismatch, StorageUnavailable.
    """
    public_keys = {} if config is None else config.public_keys
    if checkpoint is None:
        return _verified(gallery, config, None, public_keys)
    document, wrong = _read(checkpoint, public_key)
    mark = Mark(document["gallery_id"], document["number"], document["commit"], document["chain"])
    report = _verified(gallery, config, None if wrong else mark, public_keys)
    notes = report.notes
    if public_key is None and not wrong:
        signer = document["signed_by"]
        notes = (
            *notes,
            f"no public key was given; the checkpoint is signed by {signer}: compare this with the auditor's public key",
        )
    return replace(report, problems=(*([wrong] if wrong else []), *report.problems), notes=notes)


@checked
def log_checkpoint(
    gallery: str | Path,
    key: Path,
    out: Path,
    config: Config | None = None,
    *,
    url: str | None = None,
    clock: Callable[[], float] = time.time,
) -> Checkpoint:
    """Verifies the chain, and signs its newest value in the new file `out`.

    key: an Ed25519 private key, PEM; url: an address to which the document is also sent by POST. Raises InvalidInput if `out` exists,
    GalleryDamaged if the log is not valid (then nothing is written), StorageUnavailable. If the address does not accept the document, this is
    also StorageUnavailable, and the document is in `out`.
    """
    if out.exists():
        raise InvalidInput(f"{out} exists, and a checkpoint is never overwritten; name a new file")
    if url is not None and not url.startswith(("https://", "http://")):
        raise InvalidInput(f"the address {url!r} is not an HTTP address; begin it with https://")
    report = _verified(gallery, config)
    mark = report.mark
    if report.problems or mark is None:
        name = "the register" if _is_register(gallery) else gallery  # a URL may hold a password
        raise GalleryDamaged(f"the log of {name} is not valid: {report.problems[0]}; nothing was signed")
    values = (1, mark.gallery_id, mark.number, mark.commits, mark.value, round(float(clock()), 3))
    document = sign_document(_TITLE, dict(zip(_FIELDS, values, strict=True)), key)
    content = json.dumps(document, indent=2).encode() + b"\n"
    replace_private(out, content)
    if url is not None:
        _post(url, content, out)
    return Checkpoint(*values[1:], document["signed_by"])


def _verified(
    gallery: str | Path,
    config: Config | None,
    mark: Mark | None = None,
    public_keys: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> LogReport:
    config = config or Config()
    storage = LocalStorage(config.keys)
    if not _is_register(gallery):
        return verify_chain(storage, Path(gallery), mark, public_keys)
    if config.cluster is None:
        raise InvalidInput(
            "a register in PostgreSQL needs Config(cluster=ClusterConfig(segments=...)): where its segments are"
        )
    try:
        from biodedup.cluster.log import verify_register  # other galleries need no psycopg
    except ImportError as error:
        raise InvalidInput(f"a register in PostgreSQL needs {error.name}; pip install 'biodedup[cluster]'") from error
    return verify_register(storage, str(gallery), config.cluster, mark, public_keys)


def _is_register(gallery: str | Path) -> bool:
    return isinstance(gallery, str) and gallery.startswith(("postgresql://", "postgres://"))


def _read(path: Path, public_key: Path | None) -> tuple[dict[str, Any], str]:
    """(the fields of the checkpoint, the problem of its signature or ''). Raises InvalidInput."""
    document, wrong = read_signed(_TITLE, path, public_key)
    if document.get("format") != 1 or any(type(document.get(name)) is not kind for name, kind in _FIELDS.items()):
        raise InvalidInput(f"{path} is not a checkpoint of this format; name a file of `biodedup log checkpoint`")
    return document, wrong


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would be sent on as a GET, without the document."""

    def redirect_request(self, *given: Any) -> None:
        return None


def _post(url: str, content: bytes, out: Path) -> None:
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_POST_S_MAX):
            return
    except (OSError, ValueError) as error:
        reason = error.code if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        raise StorageUnavailable(
            f"{url} did not accept the checkpoint ({reason}); it is in {out}: send it again"
        ) from None
