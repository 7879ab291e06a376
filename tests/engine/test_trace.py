"""The trace of a call: what it holds, whose it is, what it costs, and where it never goes."""

from __future__ import annotations

import logging
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import biodedup as bd
from biodedup.capture.minutiae.record import MinutiaeRecord, read_record, write_record
from biodedup.match.prints.minutiae import matched
from biodedup.synthetic import draw_impression, draw_master
from biodedup.trace import mapped, tracing
from tests.support.images import jpeg
from tests.support.vectors import again, people


def minutiae(seed: int = 0, count: int = 40) -> np.ndarray:
    """float64 (count, 3): x, y, ISO's angle of minutiae that stand apart, each in a 300 x 300 square."""
    rng = np.random.default_rng(seed)
    points: list[np.ndarray] = []
    while len(points) < count:
        point = rng.uniform(10, 290, 2)
        if all(np.hypot(*(point - other)) > 18 for other in points):
            points.append(point)
    return np.column_stack([points, rng.integers(0, 256, count)])


def moved(given: np.ndarray, steps: int, shift: tuple[float, float]) -> np.ndarray:
    """Turned anticlockwise, as seen, by steps of 1/256 turn about (150, 150), and shifted."""
    turn = 2 * np.pi * steps / 256
    x, y = given[:, 0] - 150, given[:, 1] - 150
    return np.column_stack(
        [
            x * np.cos(turn) + y * np.sin(turn) + 150 + shift[0],
            y * np.cos(turn) - x * np.sin(turn) + 150 + shift[1],
            (given[:, 2] + steps) % 256,
        ]
    )


def record(given: np.ndarray, quality: int = 60) -> bytes:
    rows = np.zeros((len(given), 6), np.uint8)
    points = np.rint(given[:, :2] + 100).astype(">u2")
    rows[:, :4] = points.view(np.uint8).reshape(-1, 4)
    rows[:, 0] |= 0x40
    rows[:, 4], rows[:, 5] = given[:, 2], quality
    return write_record(MinutiaeRecord(600, 600, rows.tobytes()), 0, 50)


# matched minutiae -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shift"), [(0, (0, 0)), (20, (12, -7)), (-30, (-15, 30)), (128, (3, 3))])
def test_a_turned_and_shifted_print_has_each_minutia_paired_with_itself(steps, shift):
    given = minutiae()
    order = np.random.default_rng(1).permutation(len(given))  # the second record lists them in another order
    pairs, motion = matched(record(given), record(moved(given, steps, shift)[order]))
    same = order[pairs[:, 1]] == pairs[:, 0]
    assert same.mean() > 0.95 and same.sum() >= 0.9 * len(given)
    cosine, sine = np.cos(2 * np.pi * steps / 256), np.sin(2 * np.pi * steps / 256)
    assert motion[:2] == pytest.approx([cosine, sine], abs=0.02)
    x, y = given[:, 0] + 100, given[:, 1] + 100
    there = np.column_stack([x * motion[0] + y * motion[1] + motion[2], y * motion[0] - x * motion[1] + motion[3]])
    assert np.abs(there - moved(given, steps, shift)[:, :2] - 100).max() < 3


def test_matched_minutiae_are_the_same_whichever_print_comes_first():
    a, b = record(minutiae()), record(moved(minutiae(), 17, (9, -20))[::-1])
    pairs, motion = matched(a, b)
    swapped, back = matched(b, a)
    assert {(i, k) for i, k in pairs.tolist()} == {(i, k) for k, i in swapped.tolist()}
    there = np.array([[motion[0], motion[1], motion[2]], [-motion[1], motion[0], motion[3]], [0, 0, 1]])
    home = np.array([[back[0], back[1], back[2]], [-back[1], back[0], back[3]], [0, 0, 1]])
    assert there @ home == pytest.approx(np.eye(3), abs=1e-9)


def test_rows_of_a_record_with_more_minutiae_than_are_compared_and_with_twins_are_numbered_as_they_lie():
    given = minutiae(count=90)
    given = np.concatenate([given, given[:1]])  # two rows that are the same
    pairs, _ = matched(record(given), record(given))
    body = np.frombuffer(read_record(record(given)).body, np.uint8).reshape(-1, 6)
    assert len(pairs) > 50
    assert (body[pairs[:, 0]] == body[pairs[:, 1]]).all()
    assert len(set(pairs[:, 0].tolist())) == len(pairs)


def test_impostors_and_empty_records_have_few_pairs_or_none():
    pairs, _ = matched(record(minutiae(0)), record(minutiae(1)))
    assert len(pairs) < 20
    pairs, motion = matched(record(minutiae()), record(minutiae()[:1]))
    assert pairs.shape == (0, 2) and motion.tolist() == [1, 0, 0, 0]


# whose trace it is ----------------------------------------------------------------------------------------------


def test_a_trace_holds_the_steps_of_its_block_alone():
    assert tracing() is None
    with bd.explain() as steps:
        tracing().add("first", x=1)
        with bd.explain() as inner:
            tracing().add("second")
        tracing().add("third")
    assert [step.name for step in steps] == ["first", "third"]
    assert [step.name for step in inner] == ["second"]
    assert tracing() is None and steps[0]["x"] == 1


def test_other_threads_do_not_see_a_trace_but_the_calls_own_workers_report_in_the_order_of_the_work():
    heard: list[object] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> int:
        barrier.wait()  # all four at once
        tracing().add("worked", number=number)
        return number

    with bd.explain() as steps, ThreadPoolExecutor(4) as pool:
        stranger = threading.Thread(target=lambda: heard.append(tracing()))
        stranger.start()
        stranger.join()
        assert mapped(pool.map, work, range(4)) == [0, 1, 2, 3]
        assert [pool.submit(tracing).result() for _ in range(8)] == [None] * 8
    assert heard == [None]
    assert [(step.item, step["number"]) for step in steps] == [(i, i) for i in range(4)]


def test_callers_whose_searches_are_made_together_have_their_own_evidence_alone(engine):
    faces = people(64)
    engine.add_templates([f"s{i}" for i in range(64)], {"face": faces})
    probes = again(faces, 0.8)
    start = threading.Barrier(8)
    traces: dict[int, object] = {}

    def call(i: int) -> None:
        start.wait()
        encounter = bd.Encounter(f"new{i}", templates={"face": probes[i]})
        if i % 4 == 3:  # nobody listens
            engine.identify(encounter)
            return
        with bd.explain() as steps:
            (engine.enroll if i % 2 else engine.identify)(encounter)
        traces[i] = steps

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, steps in traces.items():
        (told,) = steps.of("decision")
        assert told["decision"].subject_id == f"new{i}"
        assert steps.of("candidate")[0]["candidate"].subject_id == f"s{i}"
        assert len(steps.of("candidate")) == len(told["decision"].candidates)
        assert len(steps.of("thresholds")) == 1


# what it costs --------------------------------------------------------------------------------------------------


def test_a_hook_costs_less_than_a_microsecond_without_a_listener():
    def hook() -> None:
        if (steps := tracing()) is not None:
            steps.add("never")

    # the best of many: the machine is shared
    assert min(timeit.repeat(hook, number=2_000, repeat=25)) / 2_000 < 1e-6


# what it holds, and where it never goes -------------------------------------------------------------------------


def finger_image(impressions: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    master = draw_master(rng)
    return [draw_impression(rng, master).image for _ in range(impressions)][-1]


def told_by(values: object) -> list[str]:
    """Pieces of biometric data as a text would show them."""
    if isinstance(values, bytes):
        return [repr(values[40:52])[2:-1], values[40:52].hex()]
    array = np.asarray(values).ravel()
    middle = array[len(array) // 2 : len(array) // 2 + 4]
    return [" ".join(map(str, middle)), ", ".join(map(str, middle.tolist())), repr(middle.tobytes())[2:-1]]


@pytest.mark.slow
def test_no_biometric_data_reaches_logs_errors_or_reprs(tmp_path, portrait, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    captures = [bd.Face(jpeg(portrait)), bd.Finger(finger_image(1), "right_index"), bd.Face(portrait[:60, :60])]
    texts: list[str] = []
    config = bd.Config(policy=bd.Policy(required=()))  # one of the captures cannot be used
    with bd.Engine.open(tmp_path / "gallery", config) as engine, bd.explain() as steps:
        first = engine.enroll(bd.Encounter("a", captures))
        second = engine.identify(bd.Encounter("b", captures))
        accepted = engine.verify(bd.Encounter("b", captures), "a")
        texts += [repr(first), repr(second), repr(accepted)]
        face, finger = (steps.of("template", item)[0]["result"] for item in (0, 1))
        bd.compare(finger, finger)
        for wrong in (
            lambda: engine.enroll(bd.Encounter("a", captures)),  # enrolled
            lambda: bd.compare(face, finger),
            lambda: engine.enroll(bd.Encounter("c", templates={"face": face.embedding * 3})),
            lambda: engine.enroll(bd.Encounter("d", templates={"right_index": finger.minutiae[:70]})),
        ):
            with pytest.raises(bd.CallerError) as caught:
                wrong()
            texts += [str(caught.value), repr(caught.value), repr(caught.value.args)]
        monkeypatch.setattr("biodedup.embed.extractor.decode", lambda data, *_: 1 / (data.sum() * 0))
        engine.identify(bd.Encounter("e", [bd.Finger(finger_image(1), "right_index")]))  # a defect, which is logged
    assert "could not be processed" in caplog.text
    texts += [caplog.text, repr(steps), str(steps), f"{steps}", *map(repr, steps), *map(str, steps)]
    told = {step.name for step in steps}
    assert told >= {
        "pixels", "faces", "face", "ridges", "quality", "pose", "template", "refusal", "candidate", "matched_minutiae",
        "thresholds", "decision", "verification", "score",
    }  # fmt: skip
    assert "uint8 (512, 512, 3)" in repr(steps.of("pixels", 0)[0])
    secrets = [face.embedding, finger.embedding, finger.minutiae, portrait, finger_image(1)]
    secrets += [steps.of("face")[0][name] for name in ("image", "box", "landmarks", "aligned")]
    secrets += [steps.of("matched_minutiae")[0]["pairs"], steps.of("ridges")[0]["image"]]
    together = "\n".join(texts)
    for piece in (piece for secret in secrets for piece in told_by(secret)):
        assert piece not in together
    assert all(len(text) < 2_000 for text in texts if text is not caplog.text)


def test_the_pieces_that_are_looked_for_would_be_found():
    vector = people(1)[0]
    middle = vector[64:68]
    assert any(piece in str(middle) or piece in repr(middle.tolist()) for piece in told_by(vector))
    assert any(piece in repr(bytes(range(80))) for piece in told_by(bytes(range(80))))


@pytest.mark.slow
def test_steps_tell_where_the_face_and_the_fingers_core_are(portrait):
    rng = np.random.default_rng(5)
    drawn = draw_impression(rng, draw_master(rng))
    extractor = bd.Extractor()
    with bd.explain() as steps:
        extractor.extract([bd.Finger(drawn.image, "left_thumb"), bd.Face(portrait), bd.Missing("left_index", "lost")])
    assert [step.column for step in steps.of("template")] == ["left_thumb", "face"]
    (face,) = steps.of("face", 1)
    x, y, width, height = face["box"]
    assert ((face["landmarks"] > (x, y)) & (face["landmarks"] < (x + width, y + height))).all()
    (pose,) = steps.of("pose", 0)
    assert np.hypot(*np.subtract(pose["core"], drawn.core)) < 25
    assert abs(pose["angle"] - drawn.angle) < 0.3
    assert {check[0] for step in steps.of("quality", 0) for check in step["checks"]} == {
        "too_small_area", "no_ridges", "few_minutiae", "low_quality",
    }  # fmt: skip
    assert steps.of("refusal", 2)[0]["result"].reason == "missing"


@pytest.mark.slow
def test_tracing_changes_no_template(portrait):
    extractor = bd.Extractor()
    captures = [bd.Face(portrait), bd.Finger(finger_image(1), "right_index")]
    plain = extractor.extract(captures)
    with bd.explain():
        traced = extractor.extract(captures)
    for one, other in zip(plain, traced, strict=True):
        assert (one.embedding == other.embedding).all() and one.minutiae == other.minutiae
