"""Cards and networks: another model is another card."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import biodedup as bd
from biodedup.capture.reading import open_file
from biodedup.embed import cards
from biodedup.embed.cards import load_card, shipped_cards
from biodedup.embed.network import EmbeddingNetwork
from tests.support.vectors import again, people


def test_what_was_checked_is_what_runs_also_if_the_file_is_replaced_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    card = load_card(str(write_model(tmp_path / "a", dimension=64)))
    other = load_card(str(write_model(tmp_path / "b", dimension=32)))

    @contextmanager
    def replaced_after(path):
        with open_file(path) as file:
            yield file
        path.write_bytes(other.weights.read_bytes())

    monkeypatch.setattr(cards, "open_file", replaced_after)
    network = EmbeddingNetwork(card, 1)
    assert network._session.get_outputs()[0].shape[-1] == 64


def write_model(folder, *, dimension=512, batch="n", sha256=None, extra=""):
    """An ArcFace-style network: pixels averaged over 7 x 7 patches, mixed into `dimension` numbers."""
    weights = np.random.default_rng(0).standard_normal((3 * 16 * 16, dimension)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["image"], ["small"], kernel_shape=[7, 7], strides=[7, 7]),
            helper.make_node("Flatten", ["small"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["embedding"]),
        ],
        "toy",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, [batch, dimension])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content = model.SerializeToString()
    (folder / "toy.onnx").write_bytes(content)
    card = folder / "toy.toml"
    card.write_text(
        f"""
name = "toy"
model_id = "toy-1"
kind = "face-embedding"
licence = "Apache-2.0"
source = "made by a test"
dimension = {dimension}
[weights]
file = "toy.onnx"
sha256 = "{sha256 or hashlib.sha256(content).hexdigest()}"
[input]
channels = "bgr"
scale = 0.0078125
offset = -127.5
{extra}
"""
    )
    return card


def test_shipped_weights_are_those_of_their_cards():
    cards = {card.name: card for card in shipped_cards()}
    assert {"sface", "yunet", "skeleton_cylinders", "mindtct_cylinders"} <= set(cards)
    for card in cards.values():
        card.verify()
        assert card.licence
        assert card.source
    assert cards["sface"].mean.shape == (128,)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_another_model_is_used_by_writing_a_card(tmp_path, portrait, batch):
    config = bd.Config(face=bd.FaceConfig(model=str(write_model(tmp_path, batch=batch))))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        assert engine.enroll(bd.Encounter("a", [bd.Face(portrait)])).outcome == "unique"
        assert engine.info()["columns"]["face"] == {
            "model_id": "toy-1",
            "dimension": 512,
            "subjects": 1,
            "index": "native",
        }
        engine.add_templates(["b"], {"face": people(1, dimension=512)})
    with bd.Engine.open(tmp_path / "g") as engine:  # another model's captures do not meet them
        for call in (engine.enroll, engine.identify):
            with pytest.raises(bd.ModelMismatch, match="toy-1"):
                call(bd.Encounter("c", [bd.Face(portrait)]))


def test_the_card_prescribes_channels_scale_mirror_and_mean(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)
    plain = EmbeddingNetwork(load_card(str(write_model(tmp_path))), 1).embed(images)
    weights = np.random.default_rng(0).standard_normal((768, 512)).astype(np.float32)

    def by_hand(block):
        pixels = (block[..., ::-1].transpose(0, 3, 1, 2).astype(np.float64) - 127.5) / 128
        flat = pixels.reshape(-1, 3, 16, 7, 16, 7).mean(axis=(3, 5)).reshape(len(block), -1) @ weights
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    np.testing.assert_allclose(plain, by_hand(images), atol=1e-5)
    (tmp_path / "m").mkdir()
    mean = np.full(512, 0.01)
    extra = f"mirror = true\n[measured]\nmean = {mean.tolist()}"
    mirrored = EmbeddingNetwork(load_card(str(write_model(tmp_path / "m", extra=extra))), 1).embed(images)
    expected = by_hand(images) + by_hand(images[:, :, ::-1])
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True) - mean
    np.testing.assert_allclose(mirrored, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_a_wrong_card_says_what_is_wrong(tmp_path):
    with pytest.raises(bd.ModelCardError, match="cannot be read"):
        load_card("nothing")
    with pytest.raises(bd.ModelCardError, match="sha256"):
        EmbeddingNetwork(load_card(str(write_model(tmp_path, sha256="0" * 64))), 1)
    (tmp_path / "d").mkdir()
    card = write_model(tmp_path / "d", dimension=64)
    card.write_text(card.read_text().replace("dimension = 64", "dimension = 65"))
    with pytest.raises(bd.ModelCardError, match="64 numbers, the card states 65"):
        EmbeddingNetwork(load_card(str(card)), 1)
    broken = tmp_path / "broken.toml"
    broken.write_text("name = 'x'")
    with pytest.raises(bd.ModelCardError, match="model_id"):
        load_card(str(broken))
    broken.write_text("not toml [")
    with pytest.raises(bd.ModelCardError, match="not TOML"):
        load_card(str(broken))


def test_templates_of_two_models_do_not_compare():
    a, b = people(2)
    with pytest.raises(bd.ModelMismatch):
        bd.compare(bd.Template("face", "one", a), bd.Template("face", "two", b))
    with pytest.raises(bd.InvalidInput, match="one modality"):
        bd.compare(bd.Template("face", "one", a), bd.Template("left_thumb", "one", b))
    assert bd.compare(
        bd.Template("face", "one", a), bd.Template("face", "one", again(a, 0.9))
    ).score_db == pytest.approx(96, abs=1)
