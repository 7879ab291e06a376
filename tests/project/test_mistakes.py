"""Plausible mistakes get an InvalidInput that says what was got, what is wanted and what to do, and never an error of Python's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.common.arguments import check_fields, checked

VECTOR = np.eye(1, 128, dtype=np.float32)[0]
TEMPLATE, REFUSAL = bd.Template("face", "m-1", VECTOR), bd.Refusal("face", "blurred")
PROBE = bd.Encounter(templates={"face": VECTOR}, model_id="m-1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    pq.write_table(pa.table({"subject_id": ["x"], "face": [VECTOR.tolist()]}), folder / "t.parquet")
    return folder


@pytest.fixture(scope="module")
def engine(place):
    with bd.Engine.open(place / "g") as engine:
        engine.add_templates(["anna"], {"face": VECTOR[None]}, model_id="m-1")
        yield engine


VALUES = {
    "minutiae of a mapping": (lambda: bd.write_minutiae({"right_index": TEMPLATE}), "got dict; write templates.values"),
    "minutiae of a template": (lambda: bd.write_minutiae(TEMPLATE), "got Template"),
    "minutiae of texts": (lambda: bd.write_minutiae(["x"]), "made of Template, got str"),
    "minutiae of a path": (lambda: bd.read_minutiae("x.fmr"), "content is bytes, got str; read the file"),
    "dpi as text": (lambda: bd.Finger("x.png", dpi="500"), "dpi is a number, got str; state it as a number"),
    "dpi as a pair": (lambda: bd.Finger("x.png", dpi=(500, 500)), "dpi is a number, got tuple"),
    "a policy as a mapping": (
        lambda: bd.Config(policy={"fpir": 1e-3}),
        r"policy is a Policy, got dict; write bd\.Policy",
    ),
    "a gallery's settings as a mapping": (
        lambda: bd.Config(gallery={"seal_rows": 3}),
        "got dict; write bd.GalleryConfig",
    ),
    "threads as text": (lambda: bd.Config(threads="2"), "threads is a whole number, got str"),
    "threads as a fraction": (lambda: bd.Config(threads=2.5), "threads is a whole number, got float"),
    "a rate as text": (lambda: bd.SearchConfig(miss_risk="x"), "miss_risk is a number, got str"),
    "captures as a path": (lambda: bd.Encounter("a", Path("face.jpg")), "captures is a sequence, got PosixPath"),
    "captures as a mapping": (lambda: bd.Encounter("a", {"face": "x.jpg"}), "captures is a sequence, got dict"),
    "no captures": (lambda: bd.Encounter("a", None), "captures is a sequence, got NoneType; it is required"),
    "a refusal among captures": (lambda: bd.Encounter("a", [REFUSAL]), r"got Refusal; .*declined=\[refusal\]"),
    "a template among captures": (lambda: bd.Encounter("a", [TEMPLATE]), r"got Template; .*templates=\{"),
    "templates as a list": (lambda: bd.Encounter("a", templates=[TEMPLATE]), "templates is a mapping, got list"),
    "one refusal": (lambda: bd.Encounter("a", declined=REFUSAL), r"write declined=\[refusal\]"),
    "a model without a name": (lambda: bd.Template("face", None, VECTOR), "model_id is a str, got NoneType"),
    "quality in words": (lambda: bd.Template("face", "m", VECTOR, quality="good"), "quality is a number, got str"),
    "an engine made": (lambda: bd.Engine("g"), r"got str; write bd\.Engine\.open"),
    "an engine of nothing": (lambda: bd.Engine(), r"write bd\.Engine\.open"),
    "a folder as a number": (lambda: bd.Engine.open(3), "path is a str or a path, got int"),
    "settings as a mapping": (
        lambda: bd.Engine.open("g", {"threads": 2}),
        r"config is a Config, got dict; write bd\.Config",
    ),
    "settings of a policy": (lambda: bd.Engine.open("g", bd.Policy()), "config is a Config, got Policy"),
    "an extractor of a folder": (lambda: bd.Extractor("g"), "config is a Config, got str"),
    "no settings file": (lambda: bd.Config.load(None), "path is a str or a path, got NoneType"),
    "compared vectors": (lambda: bd.compare(VECTOR, VECTOR), "a is a Template, got ndarray"),
    "compared with a refusal": (lambda: bd.compare(TEMPLATE, REFUSAL), "b is a Template, got Refusal"),
}
CALLS = {
    "a subject alone": (lambda e: e.enroll("anna"), r"encounter is an Encounter, got str; write bd\.Encounter"),
    "a face alone": (lambda e: e.identify(bd.Face("x.jpg")), "got Face"),
    "one of many": (lambda e: list(e.enroll_many(PROBE)), "encounters is a sequence, got Encounter"),
    "texts for many": (lambda e: list(e.enroll_many(["anna"])), "holds str, wanted Encounter"),
    "arguments exchanged": (lambda e: e.verify("anna", PROBE), "encounter is an Encounter, got str"),
    "probes without a column": (lambda e: e.search(VECTOR[None]), "probes is a mapping, got ndarray"),
    "a count as text": (lambda e: e.search({"face": VECTOR[None]}, k="3"), "k is a whole number, got str"),
    "one group": (lambda e: e.identify(PROBE, groups="north"), "groups is a sequence, got str"),
    "a list to remove": (lambda e: e.remove(["anna"]), "subject_id is a str, got list"),
    "a number to look up": (lambda e: e.templates(3), "subject_id is a str, got int; convert it"),
    "numbers to look up": (lambda e: e.rows_of([1]), "a subject_id is a str, got int"),
    "a text to look up": (lambda e: e.are_enrolled("anna"), "subject_ids is a sequence, got str"),
    "no encounter": (lambda e: e.decision(None), "encounter_id is a str, got NoneType"),
    "a case by number": (lambda e: e.case(3), "encounter_id is a str, got int"),
    "a policy in words": (lambda e: e.set_policy({"fpir": 1}, by="x", reason="y"), "policy is a Policy, got dict"),
    "vectors without a column": (lambda e: e.add_templates(["b"], VECTOR[None]), "templates is a mapping, got ndarray"),
    "no vectors": (lambda e: e.add_templates(["b"], {"face": None}), "column face is NoneType, wanted vectors"),
    "a threshold as text": (lambda e: e.find_duplicates(threshold_db="40"), "threshold_db is a number, got str"),
    "rows in words": (lambda e: e.subjects_of_rows(["x"]), "rows: .* wanted int64"),
    "one column": (lambda e: e.plan("face"), "columns is a sequence, got str"),
    "no table": (lambda e: jobs.load(e, None), "source is a path or a sequence, got NoneType"),
    "options in words": (lambda e: jobs.load(e, "t.parquet", options={"a": 1}), "options is a TableOptions, got dict"),
    "a job without an engine": (lambda e: jobs.load("g", "t.parquet"), "engine is an Engine, got str; open it"),
    "a job's settings in words": (lambda e: jobs.dedup("folder", "o.parquet", {}), "config is a Config, got dict"),
    "a job without a backlog": (lambda e: jobs.enroll_batch(e, "g", "m.csv", "o.csv"), "backlog is a Backlog, got str"),
    "progress left out": (lambda e: jobs.load(e, "t.parquet", progress=None), "progress is a function, got NoneType"),
}


@pytest.mark.parametrize(("mistake", "text"), VALUES.values(), ids=VALUES)
def test_a_mistake_in_a_value_is_named(mistake, text):
    with pytest.raises(bd.InvalidInput, match=text):
        mistake()


@pytest.mark.parametrize(("mistake", "text"), CALLS.values(), ids=CALLS)
def test_a_mistake_in_a_call_is_named(engine, mistake, text):
    with pytest.raises(bd.InvalidInput, match=text):
        mistake(engine)


def test_jobs_take_paths_as_text(engine, place):
    assert jobs.load(engine, str(place / "t.parquet"), model_id="m-1").added == 1
    assert jobs.is_gallery(str(place / "g"))
    jobs.find_duplicates(engine, str(place / "d.parquet"))
    jobs.list_cases(engine, str(place / "c.parquet"))
    assert jobs.export_gallery(str(place / "g"), str(place / "out")).folder == place / "out"
    jobs.Backlog.open(str(place / "g")).close()


@pytest.mark.slow
def test_the_jobs_are_there_after_import_biodedup_and_load_nothing_before():
    script = (
        "import sys, biodedup as bd\n"
        "assert 'biodedup.jobs' not in sys.modules and 'jobs' in dir(bd)\n"
        "assert callable(bd.jobs.load) and 'jobs' not in bd.__all__\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_arguments_are_checked_by_position_and_by_name_and_others_pass():
    @checked
    def act(path: Path, *more: int, wanted: float | None = None, **others: object) -> tuple:
        return path, more, wanted, others

    assert act("x", 1, 2, wanted=np.float32(3), other="y") == (Path("x"), (1, 2), np.float32(3), {"other": "y"})
    assert act(path=Path("x")) == (Path("x"), (), None, {})
    with pytest.raises(bd.InvalidInput, match="wanted is a number, got str"):
        act("x", wanted="3")
    with pytest.raises(TypeError, match="missing 1 required"):  # Python's own text is clear
        act()
    check_fields(bd.Refusal("face", "blurred"))


def test_numbers_of_numpy_and_sequences_of_arrow_are_taken(engine):
    assert engine.are_enrolled(np.array(["anna"]))[0] and engine.are_enrolled(pa.array(["anna"]).to_pylist())[0]
    assert engine.search({"face": VECTOR[None]}, k=np.int64(1)).ids.shape == (1, 1)
    assert bd.Finger("x.png", dpi=np.float64(500)).dpi == 500
