"""The verdict that a capture device signs: whether it captured a living person.

Owns the signed content and the check of its signature (Ed25519, RFC 8032). Never judges a picture, and never holds a private key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING

from biodedup.common.arguments import check_fields
from biodedup.common.described import Described
from biodedup.common.signatures import check_public_text, is_signed, require_cryptography
from biodedup.errors import InvalidInput
from biodedup.texts import id_problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_TITLE = b"biodedup device verdict 1\0"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class DeviceVerdict(Described):
    """A capture device's verdict on one picture, signed by the device.

    live: whether a living person was captured. capture_sha256: SHA-256 of the file's bytes, in hexadecimal; it binds the verdict to this
    picture. judged_at: the device's time in seconds. score: the device's score, or None. signature: 64 bytes over `content`. valid_until:
    the time in seconds, by the engine's clock, at which the verdict expires; None: never.
    """

    device_id: str
    live: bool
    capture_sha256: str
    judged_at: float
    score: float | None = None
    signature: bytes = field(default=b"", repr=False)
    valid_until: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if problem := id_problem(self.device_id):
            raise InvalidInput(f"device_id {problem}")
        if not _SHA256.fullmatch(self.capture_sha256):
            raise InvalidInput("capture_sha256 is no SHA-256; write 64 hexadecimal digits in lower case")
        try:
            sound = all(isfinite(number) for number in (self.judged_at, self.score or 0.0, self.valid_until or 0.0))
        except OverflowError:  # an int that is too large for a float
            sound = False
        if not sound:
            raise InvalidInput("judged_at, score and valid_until are finite numbers")

    @property
    def content(self) -> bytes:
        """The signed bytes: a title, a zero byte, and the fields as JSON (sorted keys, no spaces, UTF-8), without the signature, and without
        valid_until if it is None."""
        fields: dict[str, str | float | None] = {
            "device_id": self.device_id,
            "live": self.live,
            "capture_sha256": self.capture_sha256,
            "judged_at": float(self.judged_at),
            "score": None if self.score is None else float(self.score),
        }
        if self.valid_until is not None:
            fields["valid_until"] = float(self.valid_until)
        return _TITLE + json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def signed(self, key: Ed25519PrivateKey) -> DeviceVerdict:
        """A copy with the signature of a device's private key. The device's program and tests use it."""
        return replace(self, signature=key.sign(self.content))

    def problem(self, capture: bytes, devices: Mapping[str, str]) -> str:
        """The reason why the verdict does not count for these bytes, or "" if it counts. devices: device_id -> public key
        (`CaptureConfig.devices`)."""
        if self.device_id not in devices:
            return "the device is not known"
        if hashlib.sha256(capture).hexdigest() != self.capture_sha256:
            return "the verdict is about another picture"
        return (
            ""
            if is_signed(devices[self.device_id], self.signature, self.content)
            else "the signature is not the device's"
        )


def check_devices(devices: Mapping[str, str]) -> None:
    """Raises InvalidInput for an invalid device_id or public key, and if the package `cryptography` is not installed."""
    for device_id, key in devices.items():
        if problem := id_problem(device_id):
            raise InvalidInput(f"a device_id {problem}")
        check_public_text(key, f"the key of device {device_id!r}")
    require_cryptography()
