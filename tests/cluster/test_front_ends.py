"""Several front-ends of one register: what each sees of the others, and what no failure changes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psycopg
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.cluster import catalogue as postgres_catalogue
from biodedup.errors import StorageUnavailable
from biodedup.testing import internals
from tests.support.vectors import SFACE, again, people

STRICT = bd.Config(policy=bd.Policy(duplicate_db=58, review_db=58))
NO_POLL = {"poll_ms": 3_600_000, "stale_ms_max": 3_600_000}


def enroll(engine: bd.Engine, subject_id: str, vector: np.ndarray, **more: object) -> bd.Decision:
    return engine.enroll(bd.Encounter(subject_id, templates={"face": vector}, **more))


def identify(engine: bd.Engine, vector: np.ndarray) -> bd.Decision:
    return engine.identify(bd.Encounter(templates={"face": vector}))


@pytest.mark.slow
def test_a_register_is_created_enrols_and_is_opened_again(register):
    anna, bella = people(2)
    with register() as engine:
        assert enroll(engine, "anna", anna).outcome == "unique"
        assert enroll(engine, "anna2", again(anna, 0.8)).outcome == "duplicate"
    with register() as engine:
        assert engine.subject_ids() == ["anna"]
        assert enroll(engine, "bella", bella).outcome == "unique"
        assert engine.problems() == []


def test_what_one_front_end_enrolled_is_a_duplicate_at_another_that_has_not_looked_since(register):
    (anna,) = people(1)
    first, second = register(cluster=NO_POLL), register(cluster=NO_POLL)
    enroll(first, "anna", anna)
    assert second.gallery_version == 0
    decision = enroll(second, "bella", again(anna, 0.8))
    assert decision.outcome == "duplicate"
    assert decision.best.subject_id == "anna"


def test_calls_that_come_while_another_front_end_writes_are_one_commit(register, postgres):
    vectors = people(6)
    engine = register(cluster=NO_POLL)
    enroll(engine, "first", vectors[0])
    inside = internals(engine)
    with postgres.connect() as other:
        other.execute(f"SELECT pg_advisory_lock({inside.catalogue._lock_key})")
        with ThreadPoolExecutor(5) as pool:
            answers = [pool.submit(enroll, engine, f"s{i}", vectors[i]) for i in range(1, 6)]
            until = time.monotonic() + 60
            while len(inside.enrolment._waiting) < 5:
                assert time.monotonic() < until, "the calls do not gather"
                time.sleep(0.001)
            before = inside.commits
            other.execute(f"SELECT pg_advisory_unlock({inside.catalogue._lock_key})")
            assert {answer.result().outcome for answer in answers} == {"unique"}
    assert inside.commits == before + 1


def test_every_change_of_one_front_end_is_seen_by_another(register):
    anna, bella, carla, dora = people(4)
    first, second = register(cluster=NO_POLL), register(cluster=NO_POLL)
    enroll(first, "anna", anna, groups=("north",), encounter_id="a1")
    enroll(first, "bella", bella)
    first.update(bd.Encounter("anna", templates={"face": again(anna, 0.9)}))
    first.dispute(bd.Encounter("bella", templates={"face": carla}, encounter_id="case"))
    first.remove("bella")
    enroll(first, "dora", dora)
    first.set_policy(bd.Policy(fpir=1e-5), by="clerk", reason="test")
    second.refresh()
    assert second.subject_ids() == first.subject_ids() == ["anna", "dora"]
    assert second.groups() == {"north": 1}
    assert [case.encounter_id for case in second.cases()] == ["case"]
    assert second.policy.fpir == 1e-5
    assert second.decision("a1") == first.decision("a1")
    assert len(second.encounters("anna")) == 2
    assert second.info() == first.info()


def test_a_front_end_follows_by_itself(register):
    (anna,) = people(1)
    first, second = register(), register(cluster={"poll_ms": 5})
    enroll(first, "anna", anna)
    deadline = time.monotonic() + 30
    while "anna" not in second and time.monotonic() < deadline:
        second.decision("x")  # reads all the time: the thread that follows gets its turn nevertheless
    assert "anna" in second


@pytest.mark.slow
def test_the_thread_that_follows_waits_for_a_reader_that_holds_the_lock(register):
    (anna,) = people(1)
    first, second = register(cluster=NO_POLL), register(cluster={"poll_ms": 1, "stale_ms_max": 3_600_000})
    parts, held, let_go = internals(second), threading.Event(), threading.Event()
    parts.stop_following()  # this test takes the step
    time.sleep(0.1)

    def read() -> None:
        with parts.gallery.lock:
            held.set()
            let_go.wait(30)

    reader = threading.Thread(target=read)
    reader.start()
    held.wait(30)
    enroll(first, "anna", anna)
    threading.Timer(0.2, let_go.set).start()
    parts.follow_once()
    reader.join()
    assert "anna" in second


@pytest.mark.slow
def test_a_seal_of_one_front_end_is_followed_by_another_and_answers_stay(register):
    vectors = people(40)
    first, second = register(cluster=NO_POLL), register(cluster=NO_POLL)
    for i, vector in enumerate(vectors):
        enroll((first, second)[i % 2], f"s{i}", vector, encounter_id=f"e{i}")
    first.seal()
    before = first.decision("e3")
    enroll(second, "new", people(1, seed=5)[0])
    assert second.info()["segments"] == 1
    assert second.decision("e3") == before
    assert identify(second, again(vectors[7], 0.9)).best.subject_id == "s7"
    first.refresh()
    assert first.info() == second.info()
    assert first.problems() == second.problems() == []


def test_the_answer_is_given_when_the_reply_to_the_commit_is_lost(register, monkeypatch):
    (anna,) = people(1)
    engine = register(cluster=NO_POLL)
    lose_reply(engine, monkeypatch)
    assert enroll(engine, "anna", anna, encounter_id="a").outcome == "unique"
    assert engine.subject_ids() == ["anna"]
    assert enroll(engine, "bella", again(anna, 0.8)).outcome == "duplicate"


def test_a_commit_of_unknown_fate_is_answered_when_it_is_sent_again(register, monkeypatch):
    (anna,) = people(1)
    engine = register(cluster=NO_POLL)
    lose_reply(engine, monkeypatch)
    monkeypatch.setattr(postgres_catalogue, "_SETTLE_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(postgres_catalogue.PostgresCatalogue, "_stands", unreachable)
        with pytest.raises(bd.StorageUnavailable):
            enroll(engine, "anna", anna, encounter_id="a")
    assert enroll(engine, "anna", anna, encounter_id="a").outcome == "unique"
    assert engine.subject_ids() == ["anna"]
    assert len(engine.encounters("anna")) == 1


def test_a_connection_lost_before_the_commit_writes_nothing(register, postgres, monkeypatch):
    (anna,) = people(1)
    engine = register(cluster=NO_POLL)
    catalogue = internals(engine).catalogue
    set_state = catalogue.set_state
    monkeypatch.setattr(catalogue, "set_state", lambda state: (set_state(state), postgres.terminate_backends()))
    with pytest.raises(bd.StorageUnavailable):
        enroll(engine, "anna", anna, encounter_id="a")
    monkeypatch.undo()
    assert "anna" not in engine
    assert enroll(engine, "anna", anna, encounter_id="a").outcome == "unique"


def test_a_front_end_stops_when_the_database_was_taken_back_in_time(register, postgres):
    anna, bella = people(2)
    engine = register(cluster=NO_POLL)
    enroll(engine, "anna", anna)
    schema = register.url.rpartition("=")[2]
    with postgres.connect() as connection:  # as a restored backup
        connection.execute(f"CREATE SCHEMA kept_{schema}")
        query = "SELECT table_name FROM information_schema.tables WHERE table_schema = %s"
        tables = [name for (name,) in connection.execute(query, (f"biodedup_{schema}",)).fetchall()]
        for table in tables:
            connection.execute(f"CREATE TABLE kept_{schema}.{table} AS SELECT * FROM biodedup_{schema}.{table}")
        connection.execute("SELECT 1")
        enroll(engine, "bella", bella)
        for table in tables:
            connection.execute(f"TRUNCATE biodedup_{schema}.{table}")
            connection.execute(f"INSERT INTO biodedup_{schema}.{table} SELECT * FROM kept_{schema}.{table}")
    with pytest.raises(bd.GalleryDamaged, match="restored to an older state"):
        enroll(engine, "carla", people(3)[2])
    with pytest.raises(bd.GalleryDamaged, match="restored to an older state"):
        identify(engine, anna)
    assert register().subject_ids() == ["anna"]


def test_a_front_end_stops_when_another_history_has_the_same_number_of_commits(register, postgres):
    engine = register(cluster=NO_POLL)
    enroll(engine, "anna", people(1)[0])
    schema = register.url.rpartition("=")[2]
    with postgres.connect() as connection:
        connection.execute(f"UPDATE biodedup_{schema}.commit_log SET commit_id = 'other' WHERE commits > 0")
    with pytest.raises(bd.GalleryDamaged, match="restored to an older state"):
        enroll(engine, "bella", people(2)[1])


def test_a_front_end_that_stands_still_in_a_transaction_does_not_hold_the_others_up(register):
    anna, bella = people(2)
    stopped, other = register(cluster={"transaction_ms_max": 200, **NO_POLL}), register()
    gallery = internals(stopped).gallery
    with pytest.raises(bd.StorageUnavailable), gallery.transaction() as transaction:
        transaction.add("anna", {"face": bd.Template("face", "m", anna)})
        assert enroll(other, "bella", bella).outcome == "unique"  # after the server has ended the other transaction
    assert stopped.subject_ids() == []
    stopped.refresh()
    assert stopped.subject_ids() == ["bella"]


def test_a_search_is_refused_when_the_newest_commits_are_unknown_for_too_long(register, monkeypatch):
    (anna,) = people(1)
    engine = register(cluster={"poll_ms": 3_600_000, "stale_ms_max": 1})
    enroll(engine, "anna", anna)
    with monkeypatch.context() as patched:
        patched.setattr(postgres_catalogue.PostgresCatalogue, "begin_reading", unreachable)
        time.sleep(0.05)
        with pytest.raises(bd.StorageUnavailable):
            identify(engine, anna)
    assert identify(engine, anna).outcome == "duplicate"


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGQUIT"])
def test_what_was_acknowledged_is_there_after_the_server_was_restarted(register, postgres, signal_name):
    import signal

    anna, bella = people(2)
    engine = register(cluster=NO_POLL)
    enroll(engine, "anna", anna)
    postgres.stop(signal.Signals[signal_name])
    with pytest.raises(bd.StorageUnavailable):
        enroll(engine, "bella", bella)
    postgres.start()
    assert enroll(engine, "bella", bella).outcome == "unique"
    assert register().subject_ids() == ["anna", "bella"]


def test_a_server_that_acknowledges_before_it_is_durable_is_refused(register, postgres):
    with postgres.connect() as connection:
        connection.execute("ALTER ROLE postgres SET synchronous_commit = off")
    try:
        with pytest.raises(bd.InvalidInput, match="synchronous_commit"):
            register()
    finally:
        with postgres.connect() as connection:
            connection.execute("ALTER ROLE postgres RESET synchronous_commit")


@pytest.mark.parametrize("url", ["postgresql://h/db", "postgresql://h/db?gallery=", "postgresql://h/db?gallery=a;drop"])
def test_a_url_without_a_gallery_is_named(url, tmp_path):
    config = bd.Config(cluster=bd.ClusterConfig(segments=f"file://{tmp_path}"))
    with pytest.raises(bd.InvalidInput, match="gallery=register"):
        bd.Engine.open(url, config)


def test_a_register_needs_its_settings_and_a_folder_takes_none(register, tmp_path):
    with pytest.raises(bd.InvalidInput, match="ClusterConfig"):
        bd.Engine.open(register.url)
    with pytest.raises(bd.InvalidInput, match=r"config\.cluster"):
        bd.Engine.open(tmp_path / "g", bd.Config(cluster=bd.ClusterConfig(segments=f"file://{tmp_path}")))


def test_a_reader_of_a_register_that_is_not_there_is_told_so(register):
    with pytest.raises(bd.NotAGallery):
        register(read_only=True)
    enroll(register(), "anna", people(1)[0])
    reader = register(read_only=True)
    assert reader.subject_ids() == ["anna"]
    with pytest.raises(bd.InvalidInput):
        enroll(reader, "bella", people(2)[1])


def test_what_needs_a_folder_says_so_and_messages_name_the_register(register, tmp_path):
    with register() as engine:
        with pytest.raises(bd.InvalidInput, match="gallery export"):
            engine.backup(tmp_path / "copy")
    with pytest.raises(bd.PolicyMismatch, match=r"gallery r[0-9]+ in PostgreSQL has its own policy"):
        register(bd.Config(policy=bd.Policy(fpir=1e-5)))


def test_the_settings_of_a_register_are_read_from_a_file(tmp_path):
    (tmp_path / "a.toml").write_text('[cluster]\nsegments = "file:///nfs/register"\npoll_ms = 50\n')
    assert bd.Config.load(tmp_path / "a.toml").cluster == bd.ClusterConfig("file:///nfs/register", poll_ms=50)
    (tmp_path / "b.toml").write_text("[cluster]\npoll_ms = 50\n")
    with pytest.raises(bd.InvalidInput, match="segments"):
        bd.Config.load(tmp_path / "b.toml")


def test_a_damaged_row_is_refused(register, postgres):
    enroll(register(), "anna", people(1)[0])
    schema = register.url.rpartition("=")[2]
    with postgres.connect() as connection:
        connection.execute(f"UPDATE biodedup_{schema}.subject SET subject_id = 'anne'")
    with pytest.raises(bd.GalleryDamaged, match="subject"):
        register()


def test_front_ends_that_start_at_once_create_one_register(register):
    with ThreadPoolExecutor(4) as threads:
        engines = list(threads.map(lambda _: register(cluster=NO_POLL), range(4)))
    assert len({engine.info()["gallery_id"] for engine in engines}) == 1
    vectors = people(4)
    for i, engine in enumerate(engines):
        enroll(engine, f"s{i}", vectors[i])
    assert register().subject_ids() == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize("text", ["a\0b", "a\nb", "\ud800"])
def test_a_text_that_postgresql_cannot_hold_is_refused_as_the_callers_mistake(register, text):
    engine = register(cluster=NO_POLL)
    (anna,) = people(1)
    enroll(engine, "anna", anna, encounter_id="a")
    for call in (
        lambda: enroll(engine, text, anna),
        lambda: enroll(engine, "bella", anna, encounter_id=text),
        lambda: enroll(engine, "bella", anna, groups=(text,)),
        lambda: engine.set_policy(bd.Policy(fpir=1e-5), by=text, reason="test"),
    ):
        with pytest.raises(bd.InvalidInput):
            call()
    assert "anna" in engine
    assert "b\0" not in engine
    assert engine.decision("b\0") is None


def test_a_note_is_kept_as_it_was_written(register):
    engine = register(cluster=NO_POLL)
    anna, bella = people(2)
    enroll(engine, "anna", anna)
    engine.dispute(bd.Encounter("anna", templates={"face": bella}, encounter_id="c"))
    note = "line one\nline 'two'; DROP TABLE subject; -- %s \u00e9\U0001f600"
    try:
        engine.adjudicate("c", "different", "clerk", note)
    except bd.InvalidInput:
        note = note.replace("\n", " ")
        engine.adjudicate("c", "different", "clerk", note)
    other = register(cluster=NO_POLL)
    assert [verdict.note for verdict in other.verdicts()] == [note]


def test_a_fork_cannot_use_the_register_and_leaves_the_parents_connection_alone(register):
    engine = register()
    enroll(engine, "anna", people(1)[0])
    child = os.fork()
    if child == 0:
        try:
            engine.subject_ids()
            os._exit(1)
        except bd.EngineClosed:
            engine.close()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert enroll(engine, "bella", people(2)[1]).outcome == "unique"


@pytest.mark.slow
def test_threads_of_two_front_ends_that_offer_the_same_people_enrol_each_once(register):
    engines, vectors = [register(STRICT), register(STRICT)], people(40)

    def offer(i: int) -> str:
        person, engine = i // 4, engines[i % 2]
        face = again(vectors[person], 0.9, seed=[i])
        return enroll(engine, f"s{person}-{i}", face).outcome

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(offer, range(160)))
    assert [outcomes[4 * i : 4 * i + 4].count("unique") for i in range(40)] == [1] * 40
    for engine in engines:
        engine.refresh()
    assert engines[0].subject_ids() == engines[1].subject_ids()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("BIODEDUP_HISTORIES", "1"))))
def test_any_history_at_three_front_ends_leaves_what_a_dictionary_would_hold(register, seed):
    """Operations at random front-ends, which do not look in between, against a model; front-ends come, go and seal."""
    chance, vectors = random.Random(seed), people(12)
    engines = [register(STRICT, cluster=NO_POLL) for _ in range(3)]
    rows: dict[str, int] = {}
    answers: dict[str, bd.Decision] = {}
    for step in range(80):
        engine, person = chance.choice(engines), chance.randrange(12)
        name, vector = f"s{person}", again(vectors[person], 0.9, seed=[seed, step])
        encounter = bd.Encounter(name, templates={"face": vector}, encounter_id=f"e{step}")
        what = chance.choice(["enroll", "enroll", "twin", "update", "remove", "resend", "seal", "reopen"])
        if what == "enroll" and name in rows:
            with pytest.raises(bd.SubjectExists):
                engine.enroll(encounter)
        elif what == "enroll":
            answers[f"e{step}"] = decision = engine.enroll(encounter)
            assert decision.outcome == "unique"
            rows[name] = 1
        elif what == "twin" and name in rows:
            answers[f"e{step}"] = decision = engine.enroll(replace(encounter, subject_id=f"twin{step}"))
            assert (decision.outcome, decision.best.subject_id) == ("duplicate", name)
        elif what == "update" and name in rows:
            answers[f"e{step}"] = decision = engine.update(encounter)
            assert decision.outcome == "unique"
            rows[name] = min(rows[name] + 1, 3)
        elif what == "remove" and name in rows:
            engine.remove(name)
            del rows[name]
        elif what == "resend" and answers:
            known = chance.choice(sorted(answers))
            engine.refresh()
            assert replace(engine.decision(known), reasons=()) == replace(answers[known], reasons=())
        elif what == "seal":
            engine.seal()
        elif what == "reopen":
            engines[engines.index(engine)] = register(STRICT, cluster=NO_POLL)
    for engine in engines:
        engine.refresh()
        assert sorted(engine.subject_ids()) == sorted(rows)
        assert {name: len(engine.encounters(name)) for name in rows} == rows
        assert engine.problems() == []
    assert engines[0].info() == engines[1].info() == engines[2].info()


@pytest.mark.slow
def test_a_gallery_in_a_folder_loads_neither_psycopg_nor_ray(tmp_path):
    program = (
        "import sys, biodedup as bd\n"
        f"with bd.Engine.open({str(tmp_path / 'g')!r}) as engine: engine.subject_ids()\n"
        "print(sorted({'psycopg', 'ray', 'biodedup.cluster'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def lose_reply(engine: bd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next commit is done, and its reply does not come."""
    catalogue = internals(engine).catalogue
    run, lost = catalogue._run, []

    def losing(statement: str, values: object = None) -> object:
        done = run(statement, values)
        if statement == "COMMIT" and not lost:
            lost.append(1)
            raise StorageUnavailable("the connection was lost") from psycopg.OperationalError()
        return done

    monkeypatch.setattr(catalogue, "_run", losing)


def unreachable(*given: object) -> None:
    raise StorageUnavailable("no server")


def acting(engine: bd.Engine, name: str) -> bd.Engine:
    return engine.as_principal(bd.Principal(name, bd.ROLES))


def test_an_approval_is_about_what_the_register_holds_and_not_what_a_front_end_has_seen(register):
    (anna,) = people(1)
    config = bd.Config(policy=bd.Policy(two_people=("remove",)))
    first, second, third = (register(config, cluster=NO_POLL) for _ in range(3))
    enroll(first, "anna", anna)
    second.refresh()
    with pytest.raises(bd.ApprovalNeeded):
        acting(first, "a").remove("anna")
    assert third.update(bd.Encounter("anna", templates={"face": again(anna, 0.9)}, model_id=SFACE)).outcome == "unique"
    with pytest.raises(bd.ApprovalNeeded):  # a request of its own: the subject has another row now
        acting(second, "b").remove("anna")
    acting(first, "a").remove("anna")
    first.refresh()
    assert "anna" not in first


def test_the_rule_of_two_people_holds_for_front_ends_that_have_not_seen_it_yet(register):
    (anna,) = people(1)
    first, second = register(cluster=NO_POLL), register(cluster=NO_POLL)
    enroll(first, "anna", anna)
    second.refresh()
    first.set_policy(bd.Policy(two_people=("remove", "policy")), by="clerk", reason="test")
    with pytest.raises(bd.ApprovalNeeded):
        acting(second, "b").remove("anna")


def test_a_budget_is_shared_by_all_front_ends(register):
    (anna,) = people(1)
    config = bd.Config(policy=bd.Policy(subject_calls_per_day=3))
    first, second = register(config, cluster=NO_POLL), register(config, cluster=NO_POLL)
    enroll(first, "anna", anna)
    second.refresh()
    probe = bd.Encounter(templates={"face": again(anna, 0.9)}, model_id=SFACE)
    for engine in (first, second, first):
        engine.verify(probe, "anna")
    with pytest.raises(bd.BudgetExhausted):
        second.verify(probe, "anna")


# the audit log ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_calls_of_several_front_ends_are_one_audit_log(register):
    some = people(6)
    config = bd.Config(audit="all")
    ends = [register(config, cluster=NO_POLL) for _ in range(2)]
    for i, vector in enumerate(some):
        enroll(ends[i % 2], f"s{i}", vector)
        acting(ends[i % 2], f"p{i % 2}").search({"face": some[:1]})
    acting(ends[1], "p1").remove("s0")
    internals(ends[0]).audit.flush()
    seen = list(ends[0].audit_records())
    assert [record.number for record in seen] == list(range(1, len(seen) + 1))
    assert sorted(record.subject_id for record in seen if record.call == "enroll") == [f"s{i}" for i in range(6)]
    assert sorted(record.principal for record in seen if record.call == "search") == ["p0"] * 3 + ["p1"] * 3
    assert ends[1].problems() == []
    catalogue = internals(ends[1]).catalogue
    catalogue._connect()
    catalogue._run(f"DELETE FROM {catalogue._table('audit')} WHERE number = 3")
    assert any("audit record 3 is missing" in text for text in ends[1].problems())


def test_a_register_of_an_older_release_gets_the_tables_that_it_lacks(register):
    engine = register(bd.Config(audit="none"), cluster=NO_POLL)
    catalogue = internals(engine).catalogue
    for table in ("audit", "audit_span", "approval_signature", "chain", "digest", "row_change"):
        catalogue._run(f"DROP TABLE {catalogue._table(table)}")
    catalogue._run(f"DELETE FROM {catalogue._table('meta')} WHERE key IN ('audit', 'signatures', 'chain')")
    engine.close()
    engine = register()
    enroll(engine, "anna", people(1)[0])
    assert [record.call for record in engine.audit_records()] == ["enroll"]
    engine.close()
    found = jobs.verify_log(register.url, engine.config)
    assert not found.problems and found.links == 2 and "the chain begins at commit 1" in found.notes[0]


def test_a_table_that_a_register_had_is_not_laid_anew(register):
    engine = register(cluster=NO_POLL)
    catalogue = internals(engine).catalogue
    catalogue._run(f"DROP TABLE {catalogue._table('approval')}")
    with pytest.raises(bd.GalleryDamaged, match="table approval is lost"):
        register()


@pytest.mark.slow
def test_calls_of_a_front_end_that_only_reads_are_recorded(register):
    config = bd.Config(audit="all")
    writer = register(config, cluster=NO_POLL)
    enroll(writer, "anna", people(1)[0])
    reader = register(config, cluster=NO_POLL, read_only=True)
    reader.subject("anna")
    reader.templates("anna")
    reader.close()
    seen = [(record.call, record.principal[:3]) for record in writer.audit_records()]
    assert seen == [("enroll", "os:"), ("subject", "os:"), ("templates", "os:")]
    enroll(writer, "bella", people(2)[1])
    assert writer.problems() == []
