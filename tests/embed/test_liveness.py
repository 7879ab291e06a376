"""Presentation attacks: a card of kind `pad`, signed verdicts of capture devices, and the policy that wants a proof of life."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper

import biodedup as bd
from biodedup.embed.cards import load_card
from biodedup.embed.pad import PadNetwork

DEVICE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KNOWN = {"booth-1": DEVICE.public_key().public_bytes_raw().hex()}


def pad_card(folder: Path, limit: float, *, classes: bool = False, kind: str = "pad", batch: str | int = "n") -> str:
    """A network whose score is the mean grey level of the aligned face, 0 to 1; with classes, logits of (attack, living)."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 80, 80])
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0)]
    if classes:
        nodes += [
            helper.make_node("Neg", ["mean"], ["neg"]),
            helper.make_node("Unsqueeze", ["neg", "axis"], ["a"]),
            helper.make_node("Unsqueeze", ["mean", "axis"], ["b"]),
            helper.make_node("Concat", ["a", "b"], ["y"], axis=1),
        ]
    else:
        nodes += [helper.make_node("Identity", ["mean"], ["y"])]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "pad", [given], [output], [axis] if classes else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content = model.SerializeToString()
    (folder / "pad.onnx").write_bytes(content)
    card = folder / "pad.toml"
    card.write_text(
        f'name = "grey"\nmodel_id = "grey-1"\nkind = "{kind}"\nlicence = "CC0"\nsource = "a test"\n'
        f'[weights]\nfile = "pad.onnx"\nsha256 = "{hashlib.sha256(content).hexdigest()}"\n[input]\nscale = 0.00392156862\n'
        f"[pad]\nlimit = {limit}\n" + ("live = 1\n" if classes else "")
    )
    return str(card)


@pytest.fixture(scope="module")
def picture(portrait) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(portrait, cv2.COLOR_RGB2BGR))[1].tobytes()


def verdict(
    content: bytes, *, live: bool = True, device: str = "booth-1", key=DEVICE, **more: object
) -> bd.DeviceVerdict:
    return bd.DeviceVerdict(device, live, hashlib.sha256(content).hexdigest(), 1e9, **more).signed(key)


def extracted(config: bd.Config, *captures: bd.Face) -> list[bd.Template | bd.Refusal]:
    return bd.Extractor(config).extract(captures)


@pytest.mark.parametrize(("classes", "batch"), [(False, "n"), (True, "n"), (False, 2)])
def test_scores_are_those_of_the_network(tmp_path, classes, batch):
    network = PadNetwork(load_card(pad_card(tmp_path, 0.5, classes=classes, batch=batch)), 1)
    images = np.stack([np.full((112, 112, 3), level, np.uint8) for level in (0, 51, 255)])
    means = np.array([0, 0.2, 1])
    wanted = 1 / (1 + np.exp(-2 * means)) if classes else means
    assert np.allclose(network.scores(images), wanted, atol=1e-5)


@pytest.mark.slow
def test_a_face_below_the_limit_is_a_presentation_attack_and_one_above_says_what_proved_it(tmp_path, picture):
    (tmp_path / "high").mkdir()
    high = bd.Config(face=bd.FaceConfig(pad=pad_card(tmp_path / "high", 0.99)))
    low = bd.Config(face=bd.FaceConfig(pad=pad_card(tmp_path, 0.01)))
    (template,) = extracted(low, bd.Face(picture))
    assert template.provenance == ("living, by grey-1",)
    (refusal,) = extracted(high, bd.Face(picture))
    assert (refusal.column, refusal.reason, refusal.limit) == ("face", "presentation_attack", 0.99)
    assert 0.01 < refusal.measured < 0.99
    (plain,) = extracted(bd.Config(), bd.Face(picture))
    assert np.array_equal(plain.embedding, template.embedding)


def test_cards_that_are_none_of_kind_pad_or_lack_a_limit_are_named(tmp_path):
    with pytest.raises(bd.ModelCardError, match="kind 'minutiae', wanted `pad`"):
        bd.Extractor(bd.Config(face=bd.FaceConfig(pad=pad_card(tmp_path, 0.5, kind="minutiae"))))
    (tmp_path / "b").mkdir()
    with pytest.raises(bd.ModelCardError, match="a number as limit"):
        load_card(pad_card(tmp_path / "b", float("nan")))


@pytest.mark.slow
def test_a_verdict_counts_for_its_own_picture_by_a_known_device_alone(picture):
    config = bd.Config(capture=bd.CaptureConfig(devices=KNOWN))
    sound = verdict(picture, score=0.9)
    other = Ed25519PrivateKey.generate()
    cases = {
        sound: "living",
        verdict(picture, live=False, score=0.2): "presentation_attack",
        replace(sound, live=False): "the signature is not the device's",
        replace(sound, score=0.95): "the signature is not the device's",
        replace(sound, signature=b""): "the signature is not the device's",
        verdict(picture, key=other): "the signature is not the device's",
        verdict(picture, device="booth-2"): "the device is not known",
        verdict(picture + b" "): "the verdict is about another picture",
    }
    results = extracted(config, *(bd.Face(picture, device=given) for given in cases))
    for result, wanted in zip(results, cases.values(), strict=True):
        if wanted == "living":
            assert result.provenance == ("living, by device booth-1",)
        else:
            assert wanted in (result.reason, result.detail)
    (refusal,) = extracted(bd.Config(), bd.Face(picture, device=sound))
    assert refusal.reason == "untrusted_device", "no device is known"
    array = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    (refusal,) = extracted(config, bd.Face(array, device=verdict(picture, live=False)))
    assert refusal.reason == "untrusted_device", "a verdict is never passed over"


def test_odd_verdicts_devices_and_policies_are_refused():
    with pytest.raises(bd.InvalidInput, match="SHA-256"):
        bd.DeviceVerdict("booth-1", True, "x", 1.0)
    for number in (float("nan"), 10**400):
        with pytest.raises(bd.InvalidInput, match="finite"):
            bd.DeviceVerdict("booth-1", True, "0" * 64, number)
        with pytest.raises(bd.InvalidInput, match="finite"):
            bd.DeviceVerdict("booth-1", True, "0" * 64, 1.0, score=number)
        with pytest.raises(bd.InvalidInput, match="finite"):
            bd.DeviceVerdict("booth-1", True, "0" * 64, 1.0, valid_until=number)
    with pytest.raises(bd.InvalidInput, match="Ed25519 public key"):
        bd.CaptureConfig(devices={"booth-1": "12"})
    with pytest.raises(bd.InvalidInput, match="require_liveness"):
        bd.Policy(require_liveness="always")
    with pytest.raises(bd.InvalidInput, match="DeviceVerdict"):
        bd.Face(b"", device="booth-1")


def test_the_policy_wants_a_proof_of_life_and_a_proof_sent_later_is_heard(tmp_path, picture):
    config = bd.Config(
        capture=bd.CaptureConfig(devices=KNOWN), policy=bd.Policy(require_liveness="device", required=("face",))
    )
    with bd.Engine.open(tmp_path / "g", config) as engine:
        bare = engine.enroll(bd.Encounter("anna", [bd.Face(picture)], encounter_id="visit"))
        assert (bare.outcome, bare.refusals[0].reason) == ("refused", "liveness_unproved")
        proved = bd.Encounter("anna", [bd.Face(picture, device=verdict(picture))], encounter_id="visit")
        assert engine.enroll(proved).outcome == "unique"
        template = engine.templates("anna")["face"]
        ready = engine.enroll(bd.Encounter("berta", templates={"face": template}))
        assert ready.refusals[0].reason == "liveness_unproved", "a ready-made one proves nothing"
        forged = replace(template, provenance=("living, by device booth-1",))
        assert engine.enroll(bd.Encounter("carl", templates={"face": forged})).outcome == "refused"
        assert (
            engine.identify(bd.Encounter(captures=[bd.Face(picture, device=verdict(picture))])).outcome == "duplicate"
        )
        assert engine.identify(bd.Encounter(captures=[bd.Face(picture)])).outcome == "refused"


def test_a_verdict_that_has_ended_proves_nothing(tmp_path, picture):
    config = bd.Config(
        capture=bd.CaptureConfig(devices=KNOWN), policy=bd.Policy(require_liveness="device", required=("face",))
    )
    ending, now = verdict(picture, valid_until=1_000_060.0), [1_000_000.0]
    with bd.Engine.open(tmp_path / "g", config, clock=lambda: now[0]) as engine:
        assert engine.identify(bd.Encounter(captures=[bd.Face(picture, device=ending)])).outcome == "unique"
        longer = replace(ending, valid_until=2e6)
        (refusal,) = engine.identify(bd.Encounter(captures=[bd.Face(picture, device=longer)])).refusals
        assert refusal.detail == "the signature is not the device's"
        now[0] = 1_000_060.0
        (refusal,) = engine.identify(bd.Encounter(captures=[bd.Face(picture, device=ending)])).refusals
        assert (refusal.reason, refusal.detail) == ("untrusted_device", "the verdict has ended")
        assert engine.identify(bd.Encounter(captures=[bd.Face(picture, device=verdict(picture))])).outcome == "unique"


def test_a_device_signs_what_it_signed_before_verdicts_could_end():
    given = bd.DeviceVerdict("booth-1", True, "0" * 64, 1.0)
    assert given.content.endswith(b'"device_id":"booth-1","judged_at":1.0,"live":true,"score":null}')
    assert b'"valid_until":2.0' in replace(given, valid_until=2.0).content


@pytest.mark.slow
def test_worker_processes_look_for_attacks_too(tmp_path, picture):
    config = bd.Config(
        capture=bd.CaptureConfig(devices=KNOWN),
        face=bd.FaceConfig(pad=pad_card(tmp_path, 0.99)),
        isolation=bd.IsolationConfig(),
        threads=1,
    )
    with bd.Extractor(config) as extractor:
        found = extractor.extract([bd.Face(picture), bd.Face(picture, device=verdict(picture, live=False))])
    assert [refusal.reason for refusal in found] == ["presentation_attack", "presentation_attack"]
