"""Bare vectors do not say what made them: their model is named, and never told by how many numbers they have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.embed.cards import load_card
from tests.support.vectors import SFACE, again, people, unit

pytestmark = pytest.mark.models
VECTORS = people(4)


def encounter(vector: np.ndarray, **more: object) -> bd.Encounter:
    return bd.Encounter("new", templates={"face": vector}, **more)


def table(vectors: np.ndarray, path: Path) -> Path:
    ids = [f"s{i}" for i in range(len(vectors))]
    pq.write_table(pa.table({"subject_id": ids, "face": pa.array(list(vectors), pa.list_(pa.float32()))}), path)
    return path


def test_vectors_without_a_model_are_declined_wherever_they_come_in(engine, tmp_path):
    calls = [
        lambda: engine.add_templates(["a"], {"face": VECTORS[:1]}),
        lambda: engine.load_templates(["a"], {"face": VECTORS[:1]}),
        lambda: engine.add_templates(["a"], {"face": VECTORS[:1]}, model_id={"right_index": "mine-1"}),
        lambda: engine.enroll(encounter(VECTORS[0])),
        lambda: engine.identify(encounter(VECTORS[0])),
        lambda: engine.import_captures([encounter(VECTORS[0])])[0],
        lambda: jobs.load(engine, table(VECTORS, tmp_path / "t.parquet")),
        lambda: jobs.evaluate(table(VECTORS, tmp_path / "t.parquet"), tmp_path / "e.json"),
    ]
    for call in calls[:5] + calls[6:]:
        with pytest.raises(bd.InvalidInput, match=r"have no model_id|model of the face vectors is not stated"):
            call()
    assert calls[5]().outcome == "refused"
    with pytest.raises(bd.InvalidInput, match=f"model_id='{SFACE}'"):  # it says which one these may be
        calls[0]()
    assert len(engine) == 0 and engine.info()["columns"] == {}


def test_a_column_takes_vectors_of_its_model_alone(engine):
    engine.add_templates(["a"], {"face": people(1, 0, 512)}, model_id="mine-1")
    engine.add_templates(["b"], {"face": people(1, 1, 512)})  # the column's
    engine.add_templates(["c"], {"face": people(1, 2, 512)}, model_id="mine-1")
    other = people(1, 3, 512)
    for call in (
        lambda: engine.add_templates(["d"], {"face": other}, model_id="theirs-1"),
        lambda: engine.load_templates(["d"], {"face": other}, model_id={"face": "theirs-1"}),
        lambda: engine.enroll(encounter(other[0], model_id="theirs-1")),
        lambda: engine.identify(encounter(other[0], model_id="theirs-1")),
        lambda: engine.search({"face": other}, model_id="theirs-1"),
    ):
        with pytest.raises(bd.ModelMismatch, match=r"mine-1.*theirs-1"):
            call()
    assert len(engine) == 3 and engine.search({"face": other}).ids.shape == (1, 20)


def test_a_hundred_and_twenty_eight_numbers_of_another_model_are_not_sfaces(engine):
    engine.add_templates(["a", "b"], {"face": VECTORS[:2]}, model_id="mobilefacenet-1")
    assert engine.info()["columns"]["face"]["model_id"] == "mobilefacenet-1"
    decision = engine.identify(encounter(VECTORS[0]))
    assert (decision.outcome, decision.reasons) == ("review", ("uncalibrated",))


def test_a_model_is_named_for_what_it_makes(engine):
    for column, vectors, model_id in (
        ("face", people(1, 0, 64), SFACE),
        ("right_index", people(1), "finger256-3"),
        ("right_index", people(1), "finger256-3+mindtct-1"),
        ("right_index", people(1), "mindtct-1"),
    ):
        with pytest.raises(bd.ModelMismatch, match="makes"):
            engine.add_templates(["a"], {column: vectors}, model_id=model_id)
        with pytest.raises(bd.ModelMismatch, match="makes"):
            engine.identify(bd.Encounter(templates={column: bd.Template(column, model_id, vectors[0])}))
    for wrong in ("", "a\nb", {"nose": "mine-1"}, {"face": ""}):
        with pytest.raises(bd.InvalidInput):
            bd.Encounter("a", templates={"face": VECTORS[0]}, model_id=wrong)
        with pytest.raises(bd.InvalidInput):
            engine.add_templates(["a"], {"face": VECTORS[:1]}, model_id=wrong)


def test_galleries_of_vectors_that_came_without_a_model_open_as_before(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:  # as releases up to 0.3 named them
        engine.add_templates(["a"], {"face": people(1, 0, 512)}, model_id="external-512")
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates(["b"], {"face": people(1, 1, 512)})
        assert engine.enroll(bd.Encounter("c", templates={"face": people(1, 2, 512)[0]})).outcome == "unique"


@pytest.mark.slow
def test_the_command_load_takes_the_models_of_its_columns(tmp_path):
    path, gallery = table(people(3, 0, 512), tmp_path / "t.parquet"), str(tmp_path / "g")
    told = CliRunner().invoke(app, ["load", str(path), "-g", gallery])
    assert told.exit_code != 0 and "model_id" in str(told.exception)
    for wanted in ("mine-1", "face=mine-1"):
        done = CliRunner().invoke(app, ["load", str(path), "-g", gallery, "--model-id", wanted])
        assert done.exit_code == 0, done.output
    with bd.Engine.open(tmp_path / "g") as engine:
        assert len(engine) == 3 and engine.info()["columns"]["face"]["model_id"] == "mine-1"
    assert CliRunner().invoke(app, ["info", "-g", gallery]).exit_code == 0


# cards without weights ------------------------------------------------------------------------------------------


def pairs(path: Path, mated: int = 400) -> Path:
    """Of a model whose people are at 0.2, and mates at 0.75."""
    once = unit(people(300, 1, 64) + 0.5 * people(1, 2, 64))
    twice = again(once, 0.75)
    a, b = np.triu_indices(300, 1)
    similarity = np.concatenate([(once @ once.T)[a, b], np.sum(once * twice, axis=1)])
    names = np.arange(300).astype(str)
    rows = {
        "similarity": similarity + np.random.default_rng(0).normal(0, 0.04, len(similarity)),
        "mated": [False] * len(a) + [True] * 300,
        "subject_a": np.concatenate([names[a], names]),
        "subject_b": np.concatenate([names[b], names]),
    }
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture
def card(tmp_path: Path) -> Path:
    jobs.calibrate(pairs(tmp_path / "p.parquet"), "mine-1", tmp_path / "mine.toml", dimension=64)
    return tmp_path / "mine.toml"


@pytest.mark.slow
def test_calibrate_writes_a_card_without_weights_for_any_model(card, tmp_path):
    found = load_card(str(card))
    assert (found.model_id, found.dimension, found.weights) == ("mine-1", 64, None)
    assert "p.parquet" in found.calibration["source"]
    jobs.calibrate(tmp_path / "p.parquet", str(card), tmp_path / "again.toml")  # and fits it anew
    again_ = load_card(str(tmp_path / "again.toml"))
    assert (again_.model_id, again_.dimension) == ("mine-1", 64)
    done = CliRunner().invoke(
        app, ["calibrate", str(tmp_path / "p.parquet"), "--model", "mine-2", "--out", str(tmp_path / "2.toml")]
    )
    assert done.exit_code == 0, done.output
    assert load_card(str(tmp_path / "2.toml")).dimension is None


@pytest.mark.slow
def test_an_engine_that_is_given_the_card_scores_by_it(card, tmp_path):
    crowd = unit(people(300, 3, 64) + 0.5 * people(1, 2, 64))
    probe = bd.Encounter("new", templates={"face": again(crowd[:1], 0.98)[0]})
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(300)], {"face": crowd}, model_id="mine-1")
        assert engine.identify(probe).reasons == ("uncalibrated",)
    with bd.Engine.open(tmp_path / "g", bd.Config(face=bd.FaceConfig(model=str(card)))) as engine:
        assert "p.parquet" in engine.pairs.calibrations.of("mine-1").source
        decision = engine.identify(probe)
        assert (decision.outcome, decision.best.subject_id, decision.reasons) == ("duplicate", "s0", ())
        with pytest.raises(bd.ModelMismatch, match="makes 64 numbers"):
            bd.Engine.open(tmp_path / "h", engine.config).add_templates(["a"], {"face": VECTORS[:1]}, model_id="mine-1")


@pytest.mark.slow
def test_a_model_that_runs_elsewhere_makes_nothing_of_captures_here(card, tmp_path, portrait):
    for config in (
        bd.Config(face=bd.FaceConfig(model=str(card))),
        bd.Config(finger=bd.FingerConfig(model=str(card))),
    ):
        capture = bd.Face(portrait) if config.face.model != "sface" else bd.Finger(portrait)
        with bd.Engine.open(tmp_path / "g", config) as engine, pytest.raises(bd.ModelCardError, match="no weights"):
            engine.identify(bd.Encounter(captures=[capture]))


def test_a_card_needs_weights_or_a_calibration(tmp_path):
    (tmp_path / "bare.toml").write_text(
        'name = "x"\nmodel_id = "x-1"\nkind = "face-embedding"\nlicence = ""\nsource = ""\n'
    )
    with pytest.raises(bd.ModelCardError, match="neither weights nor a calibration"):
        load_card(str(tmp_path / "bare.toml"))
    (tmp_path / "least.toml").write_text(
        'model_id = "x-1"\ndimension = 512\n[calibration]\nscore = [0, 1]\nllr_db = [-9, 60]\nnonmated_db = [3, 90]\n'
        'measured_db = 40\nsource = "a test"\n'
    )
    least = load_card(str(tmp_path / "least.toml"))
    assert (least.model_id, least.dimension, least.kind) == ("x-1", 512, "face-embedding")


def test_a_gallerys_impostors_alone_do_not_calibrate_a_model_without_a_card(tmp_path, card):
    crowd = unit(people(100, 3, 64) + 0.5 * people(1, 2, 64))
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(100)], {"right_index": crowd}, model_id="mine-1")
    with pytest.raises(bd.InvalidInput, match="mine-1 has no earlier calibration to start from"):
        jobs.calibrate(tmp_path / "g", "mine-1", tmp_path / "none.toml")
    jobs.calibrate(tmp_path / "g", str(card), tmp_path / "own.toml")  # with a card, they do
    assert load_card(str(tmp_path / "own.toml")).dimension == 64


def test_a_model_of_faces_makes_no_fingers_and_a_model_of_fingers_no_faces(engine):
    vectors = people(2)
    for column, model_id in (("right_index", SFACE), ("face", bd.Config().finger.record_model_id)):
        for given in (vectors[0], bd.Template(column, model_id, vectors[0])):
            with pytest.raises(bd.ModelMismatch, match="model of f"):
                engine.enroll(bd.Encounter("anna", templates={column: given}, model_id=model_id))
        with pytest.raises(bd.ModelMismatch, match="model of f"):
            engine.add_templates(["anna"], {column: vectors[:1]}, model_id=model_id)
    with pytest.raises(bd.ModelMismatch, match="no embeddings"):
        engine.add_templates(["anna"], {"left_index": vectors[:1]}, model_id="external-minutiae")
    assert len(engine) == 0
