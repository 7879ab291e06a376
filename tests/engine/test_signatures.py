"""Ed25519 public keys that are accepted, and those under which anybody can sign."""

from __future__ import annotations

import pytest

import biodedup as bd
from biodedup.common import signatures

ANYBODYS = sorted(signatures.SMALL_ORDER)


@pytest.mark.parametrize("sign_bit", [0, 0x80])
@pytest.mark.parametrize("key", ANYBODYS, ids=lambda key: key.hex()[:8])
def test_a_key_under_which_anybody_can_sign_is_no_key_of_a_principal_or_a_device(key, sign_bit):
    public = bytes([*key[:31], key[31] | sign_bit]).hex()
    with pytest.raises(bd.InvalidInput, match="anybody can make signatures"):
        bd.Principal("budi", ["review"], [public])
    with pytest.raises(bd.InvalidInput, match="the key of device 'cam-1' is an insecure Ed25519 key"):
        bd.CaptureConfig(devices={"cam-1": public})
    with pytest.raises(bd.InvalidInput, match="anybody can make signatures"):
        signatures.is_signed(public, bytes(64), b"message")


@pytest.mark.parametrize("key", ANYBODYS[:2], ids=lambda key: key.hex()[:8])
def test_without_that_check_a_signature_that_nobody_made_passes(key):
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    identity, passed = b"\x01" + bytes(63), 0  # the point R = identity and s = 0
    for number in range(64):
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(identity, b"message %d" % number)
            passed += 1
        except InvalidSignature:
            pass
    assert passed > 0


@pytest.mark.parametrize("key", ["", "ab" * 31, "zz" * 32])
def test_what_is_no_key_is_refused_with_what_to_write(key):
    with pytest.raises(bd.InvalidInput, match="not an Ed25519 public key; write its 32 bytes as 64 hexadecimal digits"):
        bd.CaptureConfig(devices={"cam-1": key})
