"""`explain`: one page on one pair says what the comparison found, and nothing leaves by other ways."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.cli.base import Exit
from biodedup.jobs.explanation.explain import _headline, captures_at, parse_side
from biodedup.jobs.explanation.page import waterfall
from biodedup.match.judgement import judge
from biodedup.match.prints.minutiae import matched
from biodedup.match.ranked import Comparison
from biodedup.synthetic import draw_impression, draw_master
from biodedup.values import Evidence
from tests.support.images import jpeg
from tests.support.vectors import again, people

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A page's text, its tags, and whether they close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(self.source)
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    def count(self, tag: str, **wanted: str) -> int:
        return sum(t == tag and all(attrs.get(k) == v for k, v in wanted.items()) for t, attrs in self.tags)


@pytest.fixture(scope="module")
def prints() -> list[np.ndarray]:
    """Two impressions of one finger, and one of another."""
    rng = np.random.default_rng(7)
    first, second = draw_master(rng), draw_master(rng)
    return [draw_impression(rng, master).image for master in (first, first, second)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, portrait, prints) -> Path:
    folder = tmp_path_factory.mktemp("captures")
    for name, image in (
        ("face.jpg", portrait),
        ("face2.jpg", portrait[:300, 80:380]),
        ("nobody.jpg", portrait[:60, :60]),
    ):
        (folder / name).write_bytes(jpeg(image))
    for name, image in zip(("a.png", "b.png", "c.png"), prints, strict=True):
        cv2.imwrite(str(folder / name), image)
    return folder


@pytest.fixture(scope="module")
def pair(folder) -> tuple[jobs.Explained, Page]:
    out = folder / "pages" / "pair.html"
    out.parent.mkdir()
    told = jobs.explain(
        [bd.Face(folder / "face.jpg"), bd.Finger(folder / "a.png", "right_index"), bd.Missing("left_ring", "lost <1>")],
        [bd.Face(folder / "face2.jpg"), bd.Finger(folder / "b.png", "right_index"), bd.Face(folder / "nobody.jpg")],
        out,
        names=("<b>Anna</b>", "B & C"),
        size=1_000_000,
    )
    return told, Page(out)


@pytest.mark.slow
def test_a_page_is_one_escaped_file_without_scripts_or_references(pair):
    _, page = pair
    assert page.count("script") == 0 and "<b>Anna" not in page.source and "lost <1>" not in page.source
    assert "<b>Anna</b>" in page.text and "B & C" in page.text and "lost <1>" in page.text
    for _, attrs in page.tags:
        for name in ("src", "href"):
            assert name not in attrs or (attrs[name] or "").startswith("data:image/jpeg;base64,")
        assert not any(name.startswith("on") for name in attrs)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page.source)


@pytest.mark.slow
def test_the_verdict_says_the_score_the_odds_and_the_threshold(pair):
    told, page = pair
    assert told.outcome == "duplicate" and told.comparison is not None
    odds = str(int(told.comparison.score_db / 10)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    assert told.headline == (
        f"Same person at {told.comparison.score_db:.0f} dB: another person reaches this once in 10{odds} comparisons; "
        "the threshold for a gallery of 1,000,000 is 90 dB."
    )
    assert told.headline in page.text
    assert "Extrapolated." in page.text and "a gallery of 200,000,000" in page.text


def test_the_waterfall_adds_up_to_the_fused_evidence(pair):
    told, page = pair
    chart = waterfall(told.comparison, told.duplicate_db, told.review_db)
    steps = [bar for bar in chart["bars"] if bar["kind"] == "step"]
    assert [bar["from"] for bar in steps] == [0.0, *(bar["to"] for bar in steps[:-1])]
    assert sum(bar["value"] for bar in steps) == pytest.approx(told.comparison.llr_db)
    assert chart["bars"][-1]["value"] == told.comparison.score_db
    for bar in steps:
        assert f"{bar['value']:+.1f}" in page.text
    charged = replace(told.comparison, llr_db=told.comparison.llr_db - 7, label_penalty_db=7.0)
    bars = waterfall(charged, 90, 83)["bars"]
    assert sum(bar["value"] for bar in bars if bar["kind"] == "step") == pytest.approx(charged.llr_db)


def test_matched_minutiae_are_joined_and_numbered_and_the_face_is_marked(pair, prints):
    _, page = pair
    a, b = bd.Extractor().extract([bd.Finger(image, "right_index") for image in prints[:2]])
    pairs, _ = matched(a.minutiae, b.minutiae)
    assert len(pairs) >= 10
    assert f"{len(pairs)} minutiae are matched" in page.text
    assert page.count("path", **{"stroke-width": ".9"}) == len(pairs)
    numbers = [text.strip() for text in page.pieces if text.strip().isdigit() and 1 <= int(text) <= len(pairs)]
    assert all(numbers.count(str(i)) >= 2 for i in range(1, len(pairs) + 1))
    assert page.count("circle", fill="#ffd166") == 10  # landmarks of two faces
    assert page.count("path", **{"marker-end": "url(#arrow)"}) == 2  # poses


def test_refused_captures_are_shown_with_reason_figure_and_limit(pair):
    told, page = pair
    (missing,), (nobody,) = told.refusals
    assert (missing.reason, nobody.reason) == ("missing", "no_face")
    assert "Refused: no face, detector confidence: 0 (limit 0.8)" in page.text
    assert "at least 0.8" in page.text and "face2.jpg" in page.text and "biodedup " + bd.__version__ in page.text


def test_subjects_of_a_gallery_are_drawn_without_pictures_at_its_thresholds(tmp_path, prints):
    with bd.Engine.open(tmp_path / "gallery") as engine:
        a, b = bd.Extractor().extract([bd.Finger(image, "right_index") for image in prints[:2]])
        for name, template in (("a", a), ("b", b)):
            engine.import_captures(
                [bd.Encounter(name, templates={"right_index": template}, encounter_id=f"visit-{name}")]
            )
        told = jobs.explain(engine.templates("a"), engine.templates("b"), tmp_path / "pair.html", engine=engine)
        kept = jobs.explain_templates(
            engine.templates("a"),
            engine.templates("b"),
            tmp_path / "kept.html",
            images=({"right_index": prints[0]}, {}),
        )
        with pytest.raises(bd.UnknownSubject):
            engine.templates("nobody")
    page = Page(tmp_path / "pair.html")
    assert told.size == 2 and told.duplicate_db == 50.0
    assert page.count("image") == 0 and page.count("rect", fill="#f3f5f7") == 2 and "a stored template" in page.text
    assert "minutiae are matched" in page.text
    assert Page(tmp_path / "kept.html").count("image") == 1 and kept.comparison == told.comparison


def test_templates_of_two_models_are_an_error_and_of_no_common_column_a_page(tmp_path):
    face, other = bd.Template("face", "one", people(1)[0]), bd.Template("face", "two", people(1)[0])
    with pytest.raises(bd.ModelMismatch):
        jobs.explain_templates({"face": face}, {"face": other}, tmp_path / "pair.html")
    assert not (tmp_path / "pair.html").exists()
    finger = bd.Template("right_index", "one", people(1)[0])
    told = jobs.explain_templates({"face": face}, {"right_index": finger}, tmp_path / "pair.html")
    assert told.comparison is None and told.outcome == "refused"
    assert "Nothing to compare" in Page(tmp_path / "pair.html").text


def comparison(score_db: float, **llr_db: float) -> Comparison:
    parts = tuple(Evidence(column, column, max(llr, 0.0), llr, 0.5) for column, llr in llr_db.items())
    return Comparison(0, score_db, sum(llr_db.values()), False, parts)


@pytest.mark.parametrize(
    ("compared", "said"),
    [
        (
            comparison(131, face=120),
            "Same person at 131 dB: another person reaches this once in 10¹³ comparisons; the threshold",
        ),
        (comparison(87, face=80), "For a person to judge: 87 dB; another person reaches this once in 10⁸ comparisons."),
        (
            comparison(3, face=-5),
            "Not shown to be the same person: 3 dB; another person reaches this once in 2.0 comparisons",
        ),
        (comparison(45, face=-5), "once in 32,000 comparisons"),
        (comparison(300, face=300), "once in more than 10³⁰ comparisons"),
        (comparison(95, face=110, right_index=-15), "For a person to judge: the faces agree but the fingers do not"),
        (comparison(95, face=-15, right_index=110), "For a person to judge: only one finger agrees"),
        (None, "Nothing to compare"),
    ],
)
def test_the_verdict_is_one_plain_sentence(compared, said):
    verdict = judge([] if compared is None else [compared], 90.0, 83.0, band_db=83.0, usable=compared is not None)
    assert said in _headline(compared, verdict, 90.0, 83.0, 1_000_000)


def test_a_score_that_the_policy_does_not_trust_goes_to_a_person():
    beyond = replace(comparison(131, face=120), extrapolated=True)
    verdict = judge([beyond], 90.0, 83.0, band_db=83.0, trust_extrapolation=False)
    assert "the score is extrapolated" in _headline(beyond, verdict, 90.0, 83.0, 10**6)


def test_plain_files_are_recognised_by_name_and_content(tmp_path, portrait, prints):
    cv2.imwrite(str(tmp_path / "1.png"), prints[0])
    cv2.imwrite(str(tmp_path / "2.png"), cv2.cvtColor(portrait, cv2.COLOR_RGB2GRAY))
    cv2.imwrite(str(tmp_path / "7-Left-Thumb.bmp"), prints[0])
    (tmp_path / "notes.txt").write_text("no capture")
    assert [capture.column for capture in captures_at(tmp_path)] == ["unknown", "face", "left_thumb"]
    captures = parse_side(
        ["face=x,y.jpg", f"face={tmp_path}/2.png,finger={tmp_path}/1.png", str(tmp_path / "1.png")][1:]
    )
    assert [capture.column for capture in captures] == ["face", "unknown", "unknown"]
    with pytest.raises(bd.InvalidInput):
        captures_at(tmp_path / "absent.png")


@pytest.mark.slow
def test_the_command_writes_a_page_and_says_the_verdict(folder, tmp_path):
    out, run = tmp_path / "pair.html", CliRunner().invoke
    done = run(app, ["explain", str(folder / "a.png"), str(folder / "b.png"), "--out", str(out), "--size", "1000"])
    assert done.exit_code == Exit.DONE and "Same person at" in done.stdout and "a.png" in Page(out).text
    done = run(
        app,
        [
            "explain",
            "--a",
            f"right_index={folder}/a.png",
            "--b",
            f"right_index={folder}/c.png",
            "-o",
            str(out),
            "--json",
        ],
    )
    told = json.loads(done.stdout)
    assert told["outcome"] == "unique" and told["page"] == str(out) and told["comparison"]["score_db"] < 40
    done = run(app, ["explain", f"face={folder}/nobody.jpg", str(folder / "b.png"), "-o", str(out)])
    assert done.exit_code == Exit.REFUSED and "refused face: no_face" in done.stdout
    for wrong in (["explain"], ["explain", str(folder / "a.png")], ["explain", "absent.png", str(folder / "a.png")]):
        assert isinstance(run(app, wrong).exception, bd.InvalidInput)


@pytest.mark.slow
def test_the_command_takes_subjects_and_encounters_of_a_gallery(folder, tmp_path):
    faces = people(1)
    gallery, out, run = tmp_path / "gallery", tmp_path / "pair.html", CliRunner().invoke
    with bd.Engine.open(gallery, bd.Config(policy=bd.Policy(duplicate_db=290, review_db=280))) as engine:
        # with a finger, too: of a face alone, candidates below the review threshold are not looked for
        engine.enroll(bd.Encounter("a", templates={"face": faces[0], "left_index": faces[0]}, encounter_id="first"))
        mate = again(faces, 0.7)[0]
        engine.enroll(bd.Encounter("b", templates={"face": mate, "left_index": mate}, encounter_id="second"))
        assert len(engine) == 2
        engine.set_policy(bd.Policy(), by="A. Officer", reason="so that the page says duplicate")
    done = run(app, ["explain", "a", "b", "--gallery", str(gallery), "-o", str(out), "--json"])
    pair = json.loads(done.stdout)
    assert pair["gallery_size"] == 2 and pair["outcome"] == "duplicate" and "No picture is kept" in Page(out).text
    done = run(app, ["explain", "--encounter", "second", "--gallery", str(gallery), "-o", str(out), "--json"])
    assert json.loads(done.stdout)["comparison"]["score_db"] == pytest.approx(pair["comparison"]["score_db"], abs=0.5)
    assert "b and a" in Page(out).text
    for wrong in (["--encounter", "first"], ["--encounter", "never"], ["--encounter", "second", "a"]):
        assert isinstance(run(app, ["explain", *wrong, "--gallery", str(gallery)]).exception, bd.InvalidInput)


@pytest.mark.slow
def test_nothing_biometric_is_logged_while_a_page_is_made(folder, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    told = jobs.explain(folder / "a.png", folder / "b.png", tmp_path / "pair.html")
    assert capsys.readouterr() == ("", "")
    assert not [entry for entry in caplog.records if not entry.name.startswith("PIL.")]  # Pillow names a file's chunks
    assert all(len(entry.getMessage()) < 100 for entry in caplog.records)
    assert told.comparison is not None and len(json.dumps(told.to_dict())) < 3_000
    assert re.search(r"\d+, \d+, \d+, \d+", json.dumps(told.to_dict())) is None
