"""Swapped labels: found across positions when asked, reported as swaps, and scores stay honest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise, permutations, product
from math import log10, perm

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc
from scipy.stats import norm

import biodedup as bd
from biodedup.gallery.answers import from_json, to_json
from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.match.compare import Comparer, TemplateCandidates
from biodedup.match.labels import AS_LABELLED, readings_of
from biodedup.match.scores.calibration import Calibration
from biodedup.search.multicolumn import plan as multicolumn_plan
from biodedup.search.positions import comparable, comparable_bits, strongest
from biodedup.search.shards import faiss as faiss_engine
from biodedup.search.shards import fan_out, native
from biodedup.testing import internals
from biodedup.values import BIT
from tests.support.bozorth import Bozorth3
from tests.support.images import finger
from tests.support.laws import FACE as FACE_LAW
from tests.support.laws import FINGER as FINGER_LAW
from tests.support.minutiae import moved, record, strewn
from tests.support.shell import run_here as run
from tests.support.vectors import again, people

pytestmark = pytest.mark.slow

KNOWN = bd.FINGER_POSITIONS[:10]
DIMENSION = 64
STRICT = bd.Policy(duplicate_db=60, review_db=45)
"""Fingers of 64 numbers are of no model that has a card: what would be a duplicate is for a person."""


def other_hand(finger: str) -> str:
    hand, name = finger.split("_")
    return f"{'left' if hand == 'right' else 'right'}_{name}"


@pytest.fixture(scope="module")
def fingers() -> dict[str, np.ndarray]:
    """float32 (400, 64) of each finger."""
    return {finger: people(400, seed=20 + i, dimension=DIMENSION) for i, finger in enumerate(KNOWN)}


@pytest.fixture(scope="module")
def anew(fingers) -> dict[str, np.ndarray]:
    """Second captures of the same fingers."""
    return {finger: again(one, 0.85, seed=60 + i) for i, (finger, one) in enumerate(fingers.items())}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, fingers):
    """Three hundred subjects with ten fingers, sealed; a hundred in the tail. For searches only."""
    config = bd.Config(gallery=bd.GalleryConfig(background=False), policy=STRICT)
    with bd.Engine.open(tmp_path_factory.mktemp("swap") / "g", config) as engine:
        for low, high in ((0, 300), (300, 400)):
            names = [f"s{i}" for i in range(low, high)]
            engine.add_templates(names, {finger: one[low:high] for finger, one in fingers.items()})
            if not low:
                engine.compact()
        yield engine


@pytest.fixture
def small(tmp_path):
    """An empty gallery."""
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=STRICT)) as engine:
        yield engine


def wrong(anew: Mapping[str, np.ndarray], row: int, labels: Mapping[str, str]) -> bd.Encounter:
    """An encounter whose captures carry labels: label -> the finger that it really is."""
    return bd.Encounter(templates={label: anew[finger][row] for label, finger in labels.items()})


MISTAKES = {
    "one finger under the label of the other hand": {"right_index": "left_index"},
    "two fingers exchanged": {"right_index": "right_middle", "right_middle": "right_index"},
    "two of ten exchanged": {
        **{f: f for f in KNOWN},
        "right_index": "right_middle",
        "right_middle": "right_index",
    },
    "the left hand recorded as the right": {f: other_hand(f) for f in KNOWN[:5]},
    "both hands exchanged": {f: other_hand(f) for f in KNOWN},
    "a slap numbered from the wrong end": dict(zip(KNOWN[1:5], reversed(KNOWN[6:10]), strict=True)),
    "three moved by one": dict(pairwise(KNOWN[1:5])),
}


@pytest.mark.parametrize("row", [7, 350], ids=["sealed", "tail"])
@pytest.mark.parametrize("labels", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_swapped_label_hides_no_mate_when_asked_and_is_reported(gallery, anew, labels, row):
    encounter = wrong(anew, row, labels)
    decision = gallery.identify(encounter, across_positions=True)
    assert (decision.outcome, decision.best.subject_id) == ("review", f"s{row}")
    assert dict(decision.best.swaps) == {label: finger for label, finger in labels.items() if label != finger}
    assert {part.column for part in decision.best.evidence} == set(labels)
    if len(labels) < 10 or labels == MISTAKES["both hands exchanged"]:
        assert gallery.identify(encounter).outcome == "unique"


@pytest.mark.parametrize("count", [1, 2, 10])
def test_right_labels_are_charged_one_decibel_and_are_no_swap(gallery, anew, count):
    encounter = wrong(anew, 7, {finger: finger for finger in KNOWN[:count]})
    plain, across = gallery.identify(encounter), gallery.identify(encounter, across_positions=True)
    assert across.best.subject_id == plain.best.subject_id == "s7"
    assert across.best.swaps == plain.best.swaps == ()
    assert [(part.column, part.candidate_column) for part in across.best.evidence] == [(f, f) for f in KNOWN[:count]]
    assert across.best.label_penalty_db == pytest.approx(-10 * log10(AS_LABELLED))
    assert across.best.score_db == pytest.approx(plain.best.score_db - across.best.label_penalty_db)
    assert plain.best.label_penalty_db == 0


def test_a_search_that_is_not_asked_looks_into_no_other_column(gallery, anew, monkeypatch):
    seen = []
    real = fan_out.FanOut.nearest
    monkeypatch.setattr(
        fan_out.FanOut,
        "nearest",
        lambda s, shards, p, plan: seen.append((plan.column, len(p))) or real(s, shards, p, plan),
    )
    encounter = wrong(anew, 7, {"right_index": "right_index", "left_thumb": "left_thumb"})
    gallery.identify(encounter)
    assert sorted(seen) == [("left_thumb", 1), ("right_index", 1)]
    seen.clear()
    gallery.identify(encounter, across_positions=True)
    assert sorted(seen) == sorted((finger, 2) for finger in KNOWN)  # one pass over a column for both fingers


def test_what_a_config_always_asks_for_a_call_may_leave_out(tmp_path, fingers, anew):
    config = bd.Config(policy=STRICT, search=bd.SearchConfig(across_positions=True))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        engine.add_templates(["a"], {"left_index": fingers["left_index"][:1]})
        probe = wrong(anew, 0, {"right_index": "left_index"})
        assert engine.identify(probe).outcome == "review"
        as_labelled = engine.identify(probe, across_positions=False)
        assert as_labelled.candidates == () and as_labelled.reasons == ("nothing_in_common",)
        # a search that waits for another one's pass gets what it asked for itself
        assert engine.enroll(bd.Encounter("b", templates=probe.templates)).best.swaps == (
            ("right_index", "left_index"),
        )
        assert engine.find_duplicates() == []
        engine.add_templates(["c"], {"right_index": anew["left_index"][:1]})
        ((link,),) = (cluster.links for cluster in engine.find_duplicates())
        assert set(link.subject_ids) == {"a", "c"} and link.evidence[0].swapped


def test_a_candidate_found_through_one_swapped_finger_is_compared_with_all_captures(small, fingers, anew):
    faces = people(50, seed=5)
    small.add_templates([f"s{i}" for i in range(50)], {"face": faces, "left_index": fingers["left_index"][:50]})
    templates = {"face": again(faces[3], 0.4), "right_index": anew["left_index"][3]}
    best = small.identify(bd.Encounter(templates=templates), across_positions=True).best
    assert best.subject_id == "s3"
    assert [(part.column, part.candidate_column) for part in best.evidence] == [
        ("face", "face"),
        ("right_index", "left_index"),
    ]


def test_a_swap_is_stored_with_the_decision_and_read_back(tmp_path, fingers, anew):
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=STRICT)) as engine:
        engine.add_templates(["a"], {"left_index": fingers["left_index"][:1], "left_thumb": fingers["left_thumb"][:1]})
        encounter = wrong(anew, 0, {"left_index": "left_thumb", "left_thumb": "left_index"})
        encounter = bd.Encounter("b", templates=encounter.templates, encounter_id="e")
        decision = engine.enroll(encounter, across_positions=True)
        assert decision.outcome == "review"
        assert decision.best.swaps == (("left_index", "left_thumb"), ("left_thumb", "left_index"))
    with bd.Engine.open(tmp_path / "g") as engine:
        assert engine.decision("e") == decision == engine.enroll(encounter)
        assert engine.decision("e").best.swaps == decision.best.swaps
    with pytest.warns(DeprecationWarning, match="label_penalty_db"):
        assert decision.best.charge_db == decision.best.label_penalty_db > 0
    older = json.loads(to_json(decision))
    assert older["candidates"][0]["charge_db"] == decision.best.label_penalty_db  # its name in JSON stays
    for candidate in older["candidates"]:
        del candidate["charge_db"]  # as releases wrote it that knew no charge
    assert from_json(json.dumps(older)).best.label_penalty_db == 0


def test_a_finger_of_unknown_position_is_no_swap(small, fingers, anew):
    small.add_templates(["a"], {finger: fingers[finger][:1] for finger in ("left_index", "left_thumb")})
    for across in (False, True):
        best = small.identify(wrong(anew, 0, {"unknown": "left_thumb"}), across_positions=across).best
        assert (best.evidence[0].column, best.evidence[0].candidate_column) == ("unknown", "left_thumb")
        assert best.swaps == ()
        assert best.label_penalty_db == 0  # there was nothing more to try
    small.add_templates(["b"], {"unknown": fingers["right_ring"][:1]})
    best = small.identify(wrong(anew, 0, {"left_index": "right_ring"}), across_positions=True).best
    assert (best.subject_id, best.swaps) == ("b", ())


def test_removed_subjects_and_other_groups_are_not_found(small, fingers, anew):
    for i, group in enumerate(("north", "south")):
        templates = {"left_index": fingers["left_index"][i]}
        small.enroll(bd.Encounter(f"s{i}", templates=templates, groups=[group]), across_positions=True)
    probe = wrong(anew, 0, {"right_index": "left_index"})
    assert small.identify(probe, across_positions=True, groups=["north"]).best.subject_id == "s0"
    assert small.identify(probe, across_positions=True, groups=["south"]).outcome == "unique"
    small.remove("s0")
    assert small.identify(probe, across_positions=True).outcome == "unique"


def test_a_reader_beside_the_writer_sees_swaps(small, fingers, anew):
    small.add_templates(["a"], {"left_index": fingers["left_index"][:1]})
    with bd.Engine.open(internals(small).gallery.folder, bd.Config(policy=STRICT), read_only=True) as reader:
        decision = reader.identify(wrong(anew, 0, {"right_index": "left_index"}), across_positions=True)
        assert decision.best.swaps == (("right_index", "left_index"),)


def test_a_person_enrolled_between_search_and_commit_is_found_under_another_label(small, fingers, anew, monkeypatch):
    small.add_templates(["x"], {"left_index": fingers["left_index"][9:10]})
    search = internals(small).searcher.search
    calls = []

    def meanwhile(*args, **kwargs):
        found = search(*args, **kwargs)
        if not calls:
            calls.append(1)
            small.add_templates(["anna"], {"left_index": fingers["left_index"][:1]})
        return found

    monkeypatch.setattr(internals(small).searcher, "search", meanwhile)
    encounter = bd.Encounter("bella", templates=wrong(anew, 0, {"right_index": "left_index"}).templates)
    decision = small.enroll(encounter, across_positions=True)
    assert (decision.outcome, decision.best.subject_id) == ("review", "anna")
    assert decision.best.swaps == (("right_index", "left_index"),)


def test_a_batch_finds_swaps_inside_itself(small, fingers, anew):
    first = bd.Encounter("a", templates={"left_index": fingers["left_index"][0]})
    second = bd.Encounter("b", templates={"right_index": anew["left_index"][0]})
    assert [d.outcome for d in small.enroll_many([first, second], across_positions=True)] == ["unique", "review"]
    updated = small.update(bd.Encounter("a", templates=second.templates), across_positions=True)
    assert (updated.outcome, updated.reasons[0]) == ("review", "another_person")  # 1:1 goes by the labels
    assert updated.best.subject_id == "a" and not updated.best.swaps


def test_a_search_that_could_not_see_everything_says_incomplete(gallery, fingers, anew, monkeypatch):
    real = native.NativeShard.search

    def failing(self, probes, plan):
        if plan.column == "left_index" and any(part.first_row == 0 for part in self._parts):
            raise bd.GalleryDamaged("unreadable")
        return real(self, probes, plan)

    monkeypatch.setattr(native.NativeShard, "search", failing)
    monkeypatch.setattr(faiss_engine, "shares", lambda parts: [[part] for part in parts])
    probe = bd.Encounter(templates={"right_index": people(1, seed=99, dimension=DIMENSION)[0]})
    assert gallery.identify(probe).outcome == "unique"
    across = gallery.identify(probe, across_positions=True)
    assert (across.outcome, across.incomplete) == ("review", True)


def test_minutiae_are_compared_across_positions_row_by_row_up_to_the_limit(tmp_path):
    def encounter(name: str, column: str, seed: int, shift: int = 0) -> bd.Encounter:
        one = bd.Template(
            column,
            internals(engine).extractor.model_ids["finger"],
            minutiae=record(moved(strewn(40, seed), shift=(shift, shift))),
        )
        return bd.Encounter(name, templates={column: one})

    config = bd.Config(finger=bd.FingerConfig(model=None), search=bd.SearchConfig(finger_rows_max=2))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        for i in range(2):
            assert engine.enroll(encounter(f"s{i}", "left_index", i)).outcome == "unique"
        probe = encounter("p", "right_index", 1, 20)
        assert engine.identify(probe).best is None
        best = engine.identify(probe, across_positions=True).best
        assert (best.subject_id, best.swaps) == ("s1", (("right_index", "left_index"),))
        engine.import_captures([encounter("s2", "left_thumb", 2)])
        assert not engine.identify(probe).incomplete
        assert engine.identify(probe, across_positions=True).incomplete


def test_fingers_of_two_models_are_not_compared(small, fingers):
    small.add_templates(["a"], {"left_index": fingers["left_index"][:1]})
    small.add_templates(["b"], {"right_index": people(1, seed=3, dimension=128)})
    for column, theirs in (("left_index", "a"), ("unknown", "a")):
        probe = bd.Encounter(templates={column: fingers["left_index"][0]})
        assert small.identify(probe, across_positions=True).best.subject_id == theirs
        assert len(small.identify(probe, across_positions=True).candidates) == 1


def test_rows_searched_together_are_searched_across_positions_too(tmp_path, monkeypatch):
    monkeypatch.setattr(multicolumn_plan, "ROWS_MIN", 2_000)
    columns = ("face", "left_index", "right_index")
    everybody = {column: people(6_000, seed=200 + i) for i, column in enumerate(columns)}
    policy = bd.Policy(duplicate_db=110, review_db=106)
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=policy)) as engine:
        engine.add_templates([f"s{i}" for i in range(6_000)], everybody)
        engine.compact()
        monkeypatch.setattr(
            internals(engine).comparer,
            "_calibration_of",
            lambda model_id, *_: {"external-128": FINGER_LAW}.get(model_id, FACE_LAW),
        )
        assert internals(engine).searcher.multicolumn_query(internals(engine).gallery.snapshot(), columns) is not None
        probe = {
            "face": again(everybody["face"][17], 0.2, seed=1),
            "right_index": again(everybody["left_index"][17], 0.75, seed=2),
            "left_index": again(everybody["right_index"][17], 0.75, seed=3),
        }
        assert engine.identify(bd.Encounter(templates=probe)).outcome == "unique"
        decision = engine.identify(bd.Encounter(templates=probe), across_positions=True)
        assert (decision.outcome, decision.best.subject_id) == ("duplicate", "s17")
        assert len(decision.best.swaps) == 2 and len(decision.best.evidence) == 3


def test_the_command_line_shows_swaps(tmp_path):
    cv2.imwrite(str(tmp_path / "f.png"), finger(1))
    cv2.imwrite(str(tmp_path / "again.png"), finger(1, noise_seed=1))
    there = ("--gallery", "fingers")
    assert run("enroll", "anna", "--finger", "left_index=f.png", *there, cwd=tmp_path)[0] == 0
    probe = ("--finger", "right_index=again.png", *there)
    assert run("identify", *probe, cwd=tmp_path)[0] == 11  # nobody has a right index
    code, out, _ = run("identify", *probe, "--across-positions", cwd=tmp_path)
    assert code == 10
    assert "right_index, enrolled as left_index" in out and "swapped" in out
    code, out, _ = run("enroll", "bella", *probe, "--across-positions", "--json", cwd=tmp_path)
    assert (code, json.loads(out)["candidates"][0]["swaps"]) == (10, [["right_index", "left_index"]])


def test_rows_whose_evidence_adds_up_to_the_most_are_kept():
    lists = [
        (np.array([1, 2, 3]), np.array([30.0, 20.0, -25.0])),
        (np.array([3, 4, 2]), np.array([28.0, 27.0, 15.0])),
        (np.array([9]), np.array([np.inf])),
    ]
    assert strongest(lists, 3).tolist() == [1, 2, 9]
    assert strongest(lists, 4).tolist() == [1, 2, 3, 9]
    assert strongest(lists, 0).tolist() == [9]


# readings and their charges ----------------------------------------------------------------------------------------

SIDES = st.lists(st.sampled_from([*KNOWN[:3], *KNOWN[5:8], "unknown"]), unique=True, min_size=1, max_size=4).map(tuple)


def every_reading(mine: Sequence[str], theirs: Sequence[str]) -> dict[frozenset[tuple[str, str]], float]:
    """Each reading but that of right labels, and its charge: the sentences of labels.py, one by one, nothing clever."""
    common = {(a, a) for a in mine if a in theirs}
    known = [[a for a in side if a != "unknown"] for side in (mine, theirs)]
    hands = []
    ends = {"thumb": "thumb", "index": "little", "middle": "ring", "ring": "middle", "little": "index"}
    for turned in (False, True):
        pairs = set()
        for a in known[0]:
            hand, name = other_hand(a).split("_")
            b = f"{hand}_{ends[name]}" if turned else f"{hand}_{name}"
            pairs |= {(a, b)} if b in theirs else set()
        hands += [pairs] if len(pairs) > 1 else []
    exchanged = []
    for a, b in combinations([a for a in known[0] if a in theirs], 2):
        exchanged.append({pair for pair in common if not {a, b} & set(pair)} | {(a, b), (b, a)})
    single = []
    for a in known[0]:
        for b in known[1]:
            if a != b and not (a in theirs and b in mine):
                single.append({pair for pair in common if not {a, b} & set(pair)} | {(a, b)})
    seen, classes = {frozenset(common)}, []
    for some in (hands, exchanged, single):
        fresh = {frozenset(one) for one in some} - seen
        seen |= fresh
        classes += [fresh] if fresh else []
    if min(len(mine), len(theirs)) > 2 or (min(len(mine), len(theirs)) == 2 and set(mine) != set(theirs)):
        if len(mine) <= len(theirs):
            classes.append({frozenset(zip(mine, some, strict=True)) for some in permutations(theirs, len(mine))})
        else:
            classes.append({frozenset(zip(some, theirs, strict=True)) for some in permutations(mine, len(theirs))})
    charges: dict[frozenset[tuple[str, str]], float] = {}
    for some in classes:
        for one in some:
            label_penalty_db = 10 * log10(len(classes) * len(some))
            charges[one] = min(
                label_penalty_db, charges.get(one, label_penalty_db)
            )  # in two classes: it has the chances of the wider share
    return charges


@given(SIDES, SIDES)
def test_the_chances_of_all_readings_add_up_to_one(mine, theirs):
    for labelled in (False, True):
        readings = readings_of(mine, theirs, labelled)
        if readings is None:
            continue
        chances = 10 ** (-readings.label_penalties_db / 10)
        total = chances.sum() + (AS_LABELLED if labelled else 0.0)
        if readings.assignment_db is not None:
            fewer, more = sorted((len(mine), len(theirs)))
            total += perm(more, fewer) * 10 ** (-readings.assignment_db / 10)
        assert total == pytest.approx(1)
        for one in readings.paired:
            used = [pair for pair, there in zip(readings.pairs, one, strict=True) if there]
            assert len({a for a, _ in used}) == len({b for _, b in used}) == len(used) > 0


MODEL = "external-64"
GRID = np.linspace(-1, 1, 4001)
TAIL = betainc((DIMENSION - 1) / 2, 0.5, 1 - GRID**2) / 2
LLR_DB = 10 / np.log(10) * (norm.logpdf(GRID, 0.6, 0.15) - norm.logpdf(GRID, 0, DIMENSION**-0.5))
LAW = Calibration.from_card(
    {
        "score": GRID,
        "nonmated_db": -10 * np.log10(np.maximum(np.where(GRID < 0, 1 - TAIL, TAIL), 1e-30)),
        "llr_db": np.maximum.accumulate(np.where(GRID < -0.2, -20, LLR_DB.clip(-20))),
        "measured_db": 60.0,
        "source": "the exact law of the cosine of random directions, and a normal one for mates",
    }
)
COMPARER = Comparer(lambda model_id: LAW, Bozorth3())


def templates(vectors: Mapping[str, np.ndarray]) -> dict[str, bd.Template]:
    return {column: bd.Template(column, MODEL, vector) for column, vector in vectors.items()}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_result_is_that_of_trying_every_reading_one_by_one(data):
    mine, theirs = data.draw(SIDES), data.draw(SIDES)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pool = people(4, seed=int(rng.integers(2**32)), dimension=DIMENSION)  # few, so that many pairs are mates
    probe, candidate = (
        templates({c: again(pool[rng.integers(4)], rng.uniform(0.3, 0.9), seed=int(rng.integers(2**32))) for c in side})
        for side in (mine, theirs)
    )
    if data.draw(st.booleans()):
        probe, candidate = (
            {**some, "face": bd.Template("face", MODEL, pool[rng.integers(4)])} for some in (probe, candidate)
        )
    (found,) = COMPARER.compare(probe, TemplateCandidates(candidate), [0], across=True) or (None,)

    def as_read(reading: frozenset[tuple[str, str]]) -> object:
        """The candidate with the probe's labels put on its fingers, compared as labelled."""
        relabelled = {a: candidate[b] for a, b in reading}
        fingers = {a: probe[a] for a, _ in reading}
        if "face" in probe:
            relabelled["face"], fingers["face"] = candidate["face"], probe["face"]
        (result,) = COMPARER.compare(fingers, TemplateCandidates(relabelled), [0])
        return result

    labelled = COMPARER.compare(probe, TemplateCandidates(candidate), [0])
    charges = every_reading(mine, theirs)
    share = 1 - AS_LABELLED if labelled else 1.0
    read = [(as_read(one), charge - 10 * log10(share)) for one, charge in charges.items()]
    share_db = 10 * log10(AS_LABELLED) if charges else 0.0
    right = [one.score_db + share_db for one in labelled]
    most = max((result.llr_db - charge for result, charge in read), default=0.0)
    strongest_other = [r.score_db - charge for r, charge in read if r.llr_db - charge > most - 1e-3]  # several in a tie
    if not labelled and not read:
        assert found is None
    elif max(right + strongest_other) < 250:  # further on scores end before evidence does
        wanted = [max(*right, one, 0.0) for one in strongest_other] or right
        assert any(found.score_db == pytest.approx(one, abs=1e-3) for one in wanted)


class Crowd:
    """Strangers, with one embedding of each column a row."""

    def __init__(self, rows: int, columns: Sequence[str], seed: int) -> None:
        self._columns = tuple(columns)
        self._vectors = {c: people(rows, seed=seed + i, dimension=DIMENSION) for i, c in enumerate(columns)}

    def presence(self, rows):
        return np.full(len(rows), sum(BIT[column] for column in self._columns), np.uint16)

    def similarities(self, rows, column, probes, which):
        return np.einsum("nd,nqd->nq", self._vectors[column][rows], probes[which])

    def model_ids(self):
        return dict.fromkeys(self._columns, MODEL)


@pytest.mark.parametrize(
    ("mine", "theirs", "tries"),
    [
        (("right_index",), ("left_index",), False),
        (("right_index", "left_index"), ("right_index", "left_index"), True),
        (KNOWN[1:4], KNOWN[1:4], True),
        (KNOWN[1:4], KNOWN[6:10], True),
        (("face", *KNOWN[1:3]), ("face", *KNOWN[:5]), True),
        (KNOWN, KNOWN, True),
    ],
    ids=["1 : 1", "exchange", "3 : 3", "3 : 4 of the other hand", "a face, 2 : 5", "10 : 10"],
)
def test_impostors_reach_a_score_across_positions_no_more_often_than_it_says(mine, theirs, tries):
    count, probes = 4_000, 4
    scores, uncharged = [], []
    for seed in range(probes):
        crowd = Crowd(count, theirs, 1_000 + 100 * seed)
        probe = templates(
            {c: people(1, seed=9_000 + 100 * seed + i, dimension=DIMENSION)[0] for i, c in enumerate(mine)}
        )
        results = COMPARER.compare(probe, crowd, range(count), across=True)
        assert len(results) == count
        scores += [one.score_db for one in results]
        uncharged += [one.score_db + one.label_penalty_db for one in results]
    excess = []
    for x in (3, 6, 10, 13, 16, 20, 25):
        expected = len(scores) * 10 ** (-x / 10)
        assert np.sum(np.array(scores) >= x) <= expected + 4 * np.sqrt(expected)
        excess.append((np.sum(np.array(uncharged) >= x) - expected) / np.sqrt(expected))
    assert not tries or max(excess) > 4  # without charges, this test would fail


def test_the_columns_that_compare_are_those_of_every_pair_asked_one_by_one():
    columns = ("face", "right_index", "left_index", "unknown")
    template = bd.Template("right_index", "m-1", np.eye(4, dtype=np.float32)[0])
    for mine, theirs in product(range(16), repeat=2):
        probe = {c: template for i, c in enumerate(columns) if mine >> i & 1}
        models = {c: ColumnModel("m-1", 4) for i, c in enumerate(columns) if theirs >> i & 1}
        for across in (False, True):
            wanted = sum(BIT[c] for c in models if any(comparable(own, c, across=across) for own in probe))
            assert comparable_bits(probe, models, across=across) == wanted
