"""The signed verdict of a capture device: whether a living person was in front of it.

Owns what a device signs, and the check of its signature (Ed25519, RFC 8032). Never judges a picture, and never holds a device's private key.
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
    """What a capture device says of one picture, signed by the device.

    live: whether a living person was captured; capture_sha256: of the file's bytes, in hexadecimal, which binds the verdict to this picture;
    judged_at: the device's time in seconds; score: the device's own, where it has one; signature: 64 bytes over `content`; valid_until: the
    time in seconds from which the verdict proves nothing any more, by the clock of the engine; None: it does not end.
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
        except OverflowError:  # a whole number that no float holds
            sound = False
        if not sound:
            raise InvalidInput("judged_at, score and valid_until are finite numbers")

    @property
    def content(self) -> bytes:
        """What is signed: a title, a zero byte, and the fields without the signature as JSON (sorted keys, no spaces, UTF-8); without
        valid_until where it is None."""
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
        """With the signature of a device's private key: for the device's own program, and for tests."""
        return replace(self, signature=key.sign(self.content))

    def problem(self, capture: bytes, devices: Mapping[str, str]) -> str:
        """Why the verdict proves nothing of these bytes, "" where it does. devices: device_id -> public key (`CaptureConfig.devices`)."""
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
    """Raises InvalidInput for what is no device_id or no public key, and where the package `cryptography` is not installed."""
    for device_id, key in devices.items():
        if problem := id_problem(device_id):
            raise InvalidInput(f"a device_id {problem}")
        check_public_text(key, f"the key of device {device_id!r}")
    require_cryptography()
