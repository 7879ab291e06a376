"""Packing on a kit: captures alone, each record once, and nothing that the manifest's folder does not hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.jobs.kits.format.keys import load_centre_key, load_key
from biodedup.jobs.kits.format.record import RECORD_BYTES_MAX
from biodedup.synthetic import draw_impression, draw_master
from tests.support.kits import FRIDAY, Stop, enrolled, ingested, outcomes, packed, read, stop_at, table, written
from tests.support.vectors import again, people

# packing ----------------------------------------------------------------------------------------------------------


def test_the_same_manifest_changes_nothing_and_batches_never_share_sequences(centre):
    first = packed(centre, "A", "one.kit", table(people(5)))
    content, kit = first.read_bytes(), load_key(centre / "A.key")
    later = packed(centre, "A", "one.kit", table(people(5)), clock=FRIDAY)
    assert later.read_bytes() == content
    digest = read(first, kit)[1].digest
    first.unlink()
    anew = packed(centre, "A", "one.kit", table(people(5)), clock=FRIDAY)
    assert anew.read_bytes() != content  # a key of its own for every file
    assert read(anew, kit)[1].digest == digest
    second = packed(centre, "A", "two.kit", table(people(3, 9), ["x", "y", "z"]))
    assert [record.sequence for record in read(second, kit)[0]] == [6, 7, 8]
    names = [record.encounter.encounter_id for record in read(second, kit)[0]]
    assert names == [f"A-{kit.public.fingerprint.hex()[:6]}-{n:06d}" for n in (6, 7, 8)]


def test_after_a_recapture_only_the_changed_record_has_a_new_number_and_the_old_one_is_void(centre):
    vectors = people(4)
    packed(centre, "A", "b.kit", table(vectors))
    changed = vectors.copy()
    changed[1] = people(1, 77)[0]
    batch = packed(centre, "A", "b.kit", table(changed))
    records, reader = read(batch, load_key(centre / "A.key"))
    assert [record.sequence for record in records] == [1, 5, 3, 4]
    assert reader.void == (2,)
    result = ingested(centre, batch)
    assert result.gaps == ()
    assert result.batches[0].out_of_order == 1


def test_a_batch_is_never_replaced_by_one_that_lacks_its_records(centre):
    packed(centre, "A", "b.kit", table(people(3)))
    content = (centre / "b.kit").read_bytes()
    with pytest.raises(bd.InvalidInput, match="2 records that this manifest does not name"):
        packed(centre, "A", "b.kit", table(people(1)))
    with pytest.raises(bd.InvalidInput, match="does not list it as a batch of this kit"):
        packed(centre, "B", "b.kit", table(people(3)))
    assert (centre / "b.kit").read_bytes() == content


@pytest.mark.slow
def test_a_kit_killed_while_packing_gives_out_the_same_numbers_when_started_again(centre, monkeypatch):
    content = table(people(40))
    pa.parquet.write_table(content, centre / "m.parquet")

    def pack(out: str, **more):
        return jobs.pack_batch(
            centre / "m.parquet", centre / out, centre / "A.key", bd.Config(batch_size=8), clock=lambda: FRIDAY, **more
        )

    for stage, count in (("packing", 16), ("comparing", 1)):
        with pytest.raises(Stop):
            pack("b.kit", progress=stop_at(stage, count))
        assert not (centre / "b.kit").exists()
    with monkeypatch.context() as patched:  # between the state and the file
        real = Path.replace
        patched.setattr(Path, "replace", lambda self, to: _stop() if Path(to).name == "b.kit" else real(self, to))
        with pytest.raises(Stop):
            pack("b.kit")
    assert json.loads((centre / "A.state.json").read_text())["next_sequence"] == 41
    pack("b.kit")
    sequences = [record.sequence for record in read(centre / "b.kit", load_key(centre / "A.key"))[0]]
    assert sequences == list(range(1, 41))


def _stop() -> None:
    raise Stop


def test_a_kit_without_its_state_gives_out_no_numbers(centre):
    packed(centre, "A", "b.kit", table(people(2)))
    (centre / "A.state.json").unlink()
    with pytest.raises(bd.InvalidInput, match="restore it, or make new keys"):
        packed(centre, "A", "c.kit", table(people(2)))


def test_a_kit_finds_the_doubles_of_its_own_batch(centre):
    vectors = people(6)
    vectors[4] = again(vectors[1:2], 0.95)[0]
    names = ["a", "b", "c", "d", "e", "a"]
    pa.parquet.write_table(table(vectors, names, encounter_id=[f"v{i}" for i in range(6)]), centre / "m.parquet")
    result = jobs.pack_batch(centre / "m.parquet", centre / "b.kit", centre / "A.key")
    assert [double.subject_ids for double in result.doubles] == [("b", "e"), ("a", "a")]
    assert result.doubles[0].score_db > 60 and result.doubles[1].score_db is None
    page = (centre / "b.html").read_text()
    assert "look like one person" in page and "<script" not in page


# a manifest of images, as a team writes it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fingers() -> list[bytes]:
    """Seven generated fingers, and another impression of the first."""
    rng = np.random.default_rng(11)
    masters = [draw_master(rng) for _ in range(7)]
    images = [draw_impression(rng, master).image for master in [*masters, masters[0]]]
    return [cv2.imencode(".png", image)[1].tobytes() for image in images]


def manifest_of(centre: Path, rows: list[dict[str, object]]) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    (centre / "team.csv").write_text("\n".join(lines) + "\n")
    return centre / "team.csv"


TEAM_ROWS = [
    *(
        {"subject_id": f"00{i}", "path": f"f{i}.png", "position": "right_index", "captured_at": "2026-09-22T08:00:00"}
        for i in range(6)
    ),
    {"subject_id": "006", "path": "blank.png", "position": "right_index", "encounter_id": "e6"},
    {"subject_id": "006", "path": "f6.png", "position": "left_index", "encounter_id": "e6"},
    {"subject_id": "007", "path": "blank.png", "position": "right_index"},
    {"subject_id": "008", "path": "absent.png", "position": "right_index"},
    {"subject_id": "009", "path": "f1.png", "position": "righ_index"},
    {"subject_id": "010", "path": "f1.png", "position": "right_index", "dpi": "many"},
    {"subject_id": "011", "path": "f1.png", "position": "right_index", "encounter_id": "e1"},
    {"subject_id": "012", "path": "f2.png", "position": "right_index", "encounter_id": "e1"},
    {"subject_id": "000", "position": "left_thumb", "missing": "amputated"},
    {"subject_id": "013", "path": ".", "position": "right_index"},
    {"subject_id": "014", "path": "f7.png", "position": "right_index"},
    {"subject_id": "", "path": "f7.png", "position": "right_index"},
    {"subject_id": "015", "path": "torn.png", "position": "right_index"},
    {"subject_id": "015", "path": "f6.png", "position": "left_index"},
    {"subject_id": "016", "path": "text.png", "position": "right_index"},
]


@pytest.mark.slow
def test_a_team_packs_images_and_hears_what_to_capture_again(centre, fingers):
    for i, content in enumerate(fingers):
        (centre / f"f{i}.png").write_bytes(content)
    (centre / "blank.png").write_bytes(cv2.imencode(".png", np.full((500, 400), 255, np.uint8))[1].tobytes())
    (centre / "torn.png").write_bytes(fingers[1][: len(fingers[1]) // 2])
    (centre / "text.png").write_text("no image")
    manifest = manifest_of(centre, TEAM_ROWS)

    def pack(out: str, **more: object) -> jobs.PackResult:
        return jobs.pack_batch(manifest, centre / out, centre / "A.key", **more)

    result = pack("b.kit")
    broken = {one.subject_id: one.problem for one in result.broken}
    assert broken.keys() == {"008", "009", "010", "011, 012", "013", "", "015", "016"}
    assert "row 19: its file cannot be opened as a right_index capture (truncated)" in broken["015"]
    assert "row 21: its file cannot be opened as a right_index capture (not_an_image)" in broken["016"]
    assert "absent.png does not exist" in broken["008"] and "righ_index" in broken["009"]
    assert "'many'" in broken["010"] and "give each its own" in broken["011, 012"] and "not a file" in broken["013"]
    refused = {record.subject_id: [r.reason for r in record.refusals] for record in result.recaptures}
    assert refused.keys() == {"006", "007"}
    assert [record.subject_id for record in result.packed] == [*(f"00{i}" for i in range(8)), "014"]
    records, _ = read(centre / "b.kit", load_key(centre / "A.key"))
    assert bd.Missing("left_thumb", "amputated") in records[0].encounter.captures
    assert [refusal.column for refusal in records[6].refusals] == ["right_index"]
    assert len(records[6].encounter.captures) == 2
    page = (centre / "b.html").read_text()
    assert "Capture again" in page and "absent.png does not exist" in page

    good = pack("good.kit", only_good=True)
    assert [record.subject_id for record in good.packed] == [*(f"00{i}" for i in range(7)), "014"]
    (mixed,) = (r for r in read(centre / "good.kit", load_key(centre / "A.key"))[0] if r.encounter.subject_id == "006")
    assert [capture.column for capture in mixed.encounter.captures] == ["left_index"]

    small = pack("templates.kit", as_templates=True)
    templates = read(centre / "templates.kit", load_key(centre / "A.key"))[0]
    assert len(small.packed) == 8
    assert (centre / "templates.kit").stat().st_size < (centre / "b.kit").stat().st_size / 4
    assert all(isinstance(c, bd.Missing) for record in templates for c in record.encounter.captures)
    assert all(isinstance(given, bd.Template) for r in templates for given in r.encounter.templates.values())

    taken = ingested(centre, centre / "good.kit", centre / "templates.kit")
    assert outcomes(taken)[:7] == [*["enrolled"] * 6, "review"]  # no other subject has a left index
    assert outcomes(taken)[7] in ("duplicate", "review", "enrolled")  # an impression as poor as it may be
    assert outcomes(taken)[8:15] == ["subject_exists"] * 6 + ["conflict"]  # e6 came with captures first
    assert len(enrolled(centre)) in (6, 7)


@pytest.mark.slow
def test_what_was_extracted_once_is_not_extracted_again(centre, fingers, monkeypatch):
    for i, content in enumerate(fingers[:4]):
        (centre / f"f{i}.png").write_bytes(content)
    rows = [{"subject_id": f"s{i}", "path": f"f{i}.png", "position": "right_index"} for i in range(3)]
    asked: list[int] = []
    real = bd.Extractor.extract
    monkeypatch.setattr(
        "biodedup.jobs.kits.judge.Extractor.extract",
        lambda self, captures: asked.append(len(captures)) or real(self, captures),
    )
    first = jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key")
    content = (centre / "b.kit").read_bytes()
    assert jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key") == first
    assert (centre / "b.kit").read_bytes() == content
    rows[1]["path"] = "f3.png"
    again_packed = jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key")
    assert [record.sequence for record in again_packed.packed] == [1, 4, 3]
    assert sum(asked) == 4


def test_what_is_no_manifest_is_refused_whole(centre):
    for name, content, text in (
        ("no.csv", "name,photo\na,b\n", "lacks the columns"),
        ("empty.csv", "subject_id,path\n", "no rows"),
        ("none.csv", "", "is empty"),
        ("bytes.parquet", "PAR1 no", "not a readable table"),
    ):
        (centre / name).write_text(content)
        with pytest.raises(bd.InvalidInput, match=text):
            jobs.pack_batch(centre / name, centre / "b.kit", centre / "A.key")
    with pytest.raises(bd.InvalidInput, match="does not exist"):
        jobs.pack_batch(centre / "gone.csv", centre / "b.kit", centre / "A.key")


# what may be packed ------------------------------------------------------------------------------------------------


def sent(batch: Path, kit: Path) -> list[str]:
    return [record.encounter.subject_id for record in read(batch, load_key(kit))[0]]


@pytest.mark.slow
def test_a_manifest_names_files_below_its_own_folder_alone(centre, fingers):
    (centre / "outside.png").write_bytes(fingers[0])
    team = centre / "team"
    (team / "photos").mkdir(parents=True)
    (team / "photos" / "f.png").write_bytes(fingers[0])
    (team / "link.png").symlink_to(team / "photos" / "f.png")
    (team / "out.png").symlink_to(centre / "outside.png")
    (team / "folder").symlink_to(centre)
    (team / "circle.png").symlink_to(team / "circle.png")
    os.mkfifo(team / "pipe.png")
    (centre / "team.evil").mkdir()
    (centre / "team.evil" / "f.png").write_bytes(fingers[0])
    paths = {
        "inside": "photos/f.png",
        "link": "link.png",
        "up": "../outside.png",
        "up and down": "photos/../../outside.png",
        "roundabout": "photos/../photos/f.png",
        "absolute": str(centre / "outside.png"),
        "link out": "out.png",
        "folder out": "folder/outside.png",
        "circle": "circle.png",
        "sibling": "../team.evil/f.png",
        "pipe": "pipe.png",
        "device": "/dev/zero",
    }
    lines = [f"{name},{path},right_index" for name, path in paths.items()]
    (team / "m.csv").write_text("\n".join(["subject_id,path,position", *lines]) + "\n")
    result = jobs.pack_batch(team / "m.csv", centre / "b.kit", centre / "A.key")
    assert sent(centre / "b.kit", centre / "A.key") == ["inside", "link"]
    assert {one.subject_id for one in result.broken} == paths.keys() - {"inside", "link"}
    for one in result.broken:
        assert f"row {list(paths).index(one.subject_id) + 1}: " in one.problem
    for name in ("up", "absolute", "link out", "folder out"):
        assert "out of the manifest's folder" in next(b.problem for b in result.broken if b.subject_id == name)


@pytest.mark.slow
def test_files_that_are_no_captures_never_leave_the_kit(centre, fingers):
    """The kit's own private key above all, whatever position a row gives it."""
    secrets = {
        "key": (centre / "A.key").read_bytes(),
        "pem": json.loads((centre / "A.key").read_text())["private_key"].encode(),
        "state": (centre / "A.state.json").read_bytes(),
        "accounts": b"root:x:0:0:root:/root:/bin/bash\n" * 40,
        "empty": b"",
        "record": b"FMR\0 20\0" + b"a private note" * 20,
        "netpbm": b"P5 9999 9999 255\n" + b"a private note" * 20,
        "torn": fingers[0][: len(fingers[0]) // 2],
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    }
    rows = [{"subject_id": "sound", "path": "f.png", "position": "right_index"}]
    (centre / "f.png").write_bytes(fingers[0])
    for name, content in secrets.items():
        (centre / f"{name}.file").write_bytes(content)
        rows += [
            {"subject_id": f"{name}, {position}", "path": f"{name}.file", "position": position}
            for position in ("face", "left_thumb")
        ]
    (centre / "rows.csv").write_text(
        "subject_id,path,position\n" + "".join(f'"{r["subject_id"]}",{r["path"]},{r["position"]}\n' for r in rows)
    )
    result = jobs.pack_batch(centre / "rows.csv", centre / "b.kit", centre / "A.key")
    assert sent(centre / "b.kit", centre / "A.key") == ["sound"]
    assert [one.subject_id for one in result.broken] == [row["subject_id"] for row in rows[1:]]
    assert [one.problem.split(":")[0] for one in result.broken] == [f"row {n}" for n in range(2, len(rows) + 1)]
    told = json.dumps([one.problem for one in result.broken]) + (centre / "b.html").read_text()
    assert "private note" not in told and "BEGIN PRIVATE" not in told and "root:x" not in told


def test_a_column_of_minutiae_records_holds_nothing_else(centre):
    content = {
        "subject_id": ["a", "b"],
        "face": [v.tolist() for v in people(2)],
        "right_index": [b"a private note", None],
    }
    pa.parquet.write_table(pa.table(content), centre / "m.parquet")
    result = jobs.pack_batch(centre / "m.parquet", centre / "b.kit", centre / "A.key")
    assert [(one.subject_id, one.rows) for one in result.broken] == [("a", (1,))]
    assert "no minutiae record" in result.broken[0].problem
    assert sent(centre / "b.kit", centre / "A.key") == ["b"]


def test_an_id_that_is_reserved_or_too_long_breaks_its_record(centre):
    names = ["kit:0123:e", "KIT:e", "x" * 201, "fine"]
    pa.parquet.write_table(table(people(4), encounter_id=names), centre / "m.parquet")
    result = jobs.pack_batch(centre / "m.parquet", centre / "b.kit", centre / "A.key")
    assert [("reserved" in one.problem, "201" in one.problem) for one in result.broken] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert len(result.packed) == 1


@pytest.mark.slow
def test_captures_larger_than_any_record_break_theirs(centre, fingers):
    padded = fingers[0] + bytes(RECORD_BYTES_MAX)  # a sound image, and a tail
    (centre / "large.png").write_bytes(padded)
    (centre / "f.png").write_bytes(fingers[0])
    rows = [{"subject_id": n, "path": f"{n}.png", "position": "right_index"} for n in ("large", "f")]
    result = jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key")
    assert [one.subject_id for one in result.broken] == ["large"] and "save them smaller" in result.broken[0].problem
    assert [record.sequence for record in result.packed] == [1]


@pytest.mark.slow
def test_a_batch_is_not_replaced_by_one_whose_file_broke_since(centre, fingers):
    for i in range(2):
        (centre / f"f{i}.png").write_bytes(fingers[i])
    rows = [{"subject_id": f"s{i}", "path": f"f{i}.png", "position": "right_index"} for i in range(2)]
    jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key")
    content = (centre / "b.kit").read_bytes()
    (centre / "f1.png").write_bytes(fingers[1][:500])
    with pytest.raises(bd.InvalidInput, match="1 records that this manifest does not name"):
        jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key")
    assert (centre / "b.kit").read_bytes() == content


def test_without_the_centres_key_nothing_is_packed(centre):
    pa.parquet.write_table(table(people(2)), centre / "m.parquet")
    (centre / "centre.pub").rename(centre / "elsewhere.pub")
    with pytest.raises(bd.InvalidInput, match=r"centre\.pub does not exist; copy the \.pub file"):
        jobs.pack_batch(centre / "m.parquet", centre / "b.kit", centre / "A.key")
    with pytest.raises(bd.InvalidInput, match="no X25519 public key of a centre"):
        jobs.pack_batch(centre / "m.parquet", centre / "b.kit", centre / "A.key", centre=centre / "B.pub")
    assert not (centre / "b.kit").exists()
    jobs.pack_batch(centre / "m.parquet", centre / "b.kit", centre / "A.key", centre=centre / "elsewhere.pub")
    assert sent(centre / "b.kit", centre / "A.key") == ["s0", "s1"]


def test_a_batch_of_an_earlier_release_is_replaced_by_an_encrypted_one(centre):
    kit, to = load_key(centre / "A.key"), load_centre_key(centre / "centre.key")
    batch = packed(centre, "A", "b.kit", table(people(3)))
    digest = read(batch, kit)[1].digest
    batch.write_bytes(written((kit, to), read(batch, kit)[0], encrypted=False))
    with pytest.raises(bd.InvalidInput, match="2 records that this manifest does not name"):
        packed(centre, "A", "b.kit", table(people(1)))
    assert read(packed(centre, "A", "b.kit", table(people(3))), kit)[1].digest == digest
    assert batch.read_bytes()[7] == 2  # the version


@pytest.mark.slow
def test_what_a_kit_writes_is_for_its_owner_alone(centre, fingers):
    (centre / "f.png").write_bytes(fingers[0])
    old = os.umask(0)
    try:
        jobs.pack_batch(
            manifest_of(centre, [{"subject_id": "s", "path": "f.png", "position": "right_index"}]),
            centre / "b.kit",
            centre / "A.key",
        )
    finally:
        os.umask(old)
    work = centre / "b.kit.work"
    files = [
        centre / "b.kit",
        centre / "A.key",
        centre / "A.state.json",
        *(work / "records").iterdir(),
        work / "batches.json",
    ]
    assert len(files) == 5
    assert {f"{path.stat().st_mode & 0o777:o}" for path in files} == {"600"}
    assert {f"{path.stat().st_mode & 0o777:o}" for path in (work, work / "records")} == {"700"}


def test_a_manifest_beyond_reason_is_refused_before_it_is_read(centre, monkeypatch):
    monkeypatch.setattr("biodedup.jobs.kits.manifest._ROWS_MAX", 3)
    for name in ("m.parquet", "m.csv"):
        if name == "m.csv":
            (centre / name).write_text("subject_id,path\n" + "s,f.png\n" * 4)
        else:
            pa.parquet.write_table(table(people(4)), centre / name)
        with pytest.raises(bd.InvalidInput, match="4 rows"):
            jobs.pack_batch(centre / name, centre / "b.kit", centre / "A.key")
