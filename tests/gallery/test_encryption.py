"""An encrypted gallery: what it answers, what it gives away, and what it says to the wrong key."""

from __future__ import annotations

import base64
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.care import encrypting
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.column_file import Stream, open_column_file, write_column_file
from biodedup.gallery.files.encryption.keyring import Key, KeyFile, key_file
from biodedup.gallery.files.encryption.sealed_file import NotAuthentic, SealedMap, SealedWriter
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.handles import LocalFile
from biodedup.jobs.enrolment.queue import Arrival
from biodedup.testing import internals
from tests.support import ROOT
from tests.support.faults import Countdown
from tests.support.galleries import PEOPLE, enroll, small
from tests.support.minutiae import record, strewn
from tests.support.vectors import SFACE

BLOCK = 1 << 12
KEY = bytes(range(1, 33))


def with_key(config: bd.Config | None = None, key: bytes = KEY) -> bd.Config:
    return replace(config or small(), keys=lambda: key)


def seal(path: Path, content: bytes, key: Key, name: str = "x", pieces: int = 1) -> None:
    writer = SealedWriter(LocalFile(path), key, name, BLOCK)
    cuts = np.linspace(0, len(content), pieces + 1).astype(int)
    for low, high in itertools.pairwise(cuts):
        writer.write(content[low:high])
    writer.finish()


def unseal(path: Path, key: Key, name: str = "x") -> bytes:
    content = SealedMap.of(os.open(path, os.O_RDONLY), key, name)
    content.need(0, content.content_size)
    return bytes(content[: content.content_size])


def opened_by_hand(path: Path, key: bytes, name: str = "x") -> bytes:
    """A sealed file, decrypted as its description says, by the primitives alone."""
    data = path.read_bytes()
    size = int.from_bytes(data[8:12], "little")
    wrap = HKDF(SHA256(), 32, None, b"biodedup wrap").derive(key)
    secret = AESGCM(wrap).decrypt(data[28:40], data[40:88], data[:28] + name.encode())
    blocks = [data[at : at + size + 16] for at in range(128, len(data), size + 16)]
    last = len(blocks) - 1
    nonces = [i.to_bytes(11, "big") + bytes([i == last]) for i in range(len(blocks))]
    aead = AESGCM(secret)
    return b"".join(aead.decrypt(n, block, data[:128]) for n, block in zip(nonces, blocks, strict=True))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 70 * BLOCK + 5])
@pytest.mark.parametrize("pieces", [1, 7])
def test_a_sealed_file_gives_back_what_was_written_and_is_as_its_description_says(tmp_path, size, pieces):
    content = np.random.default_rng(size).bytes(size)
    seal(tmp_path / "f", content, Key(KEY), pieces=pieces)
    assert unseal(tmp_path / "f", Key(KEY)) == content
    assert opened_by_hand(tmp_path / "f", KEY) == content
    assert size < 16 or content[:16] not in (tmp_path / "f").read_bytes()


def test_a_block_of_a_sealed_file_is_read_without_the_others(tmp_path):
    content = np.random.default_rng(0).bytes(9 * BLOCK)
    seal(tmp_path / "f", content, Key(KEY))
    spoiled = bytearray((tmp_path / "f").read_bytes())
    spoiled[128 + 2 * (BLOCK + 16)] ^= 1
    (tmp_path / "f").write_bytes(spoiled)
    read = SealedMap.of(os.open(tmp_path / "f", os.O_RDONLY), Key(KEY), "x")
    read.need(5 * BLOCK - 10, 5 * BLOCK + 10)
    assert read[5 * BLOCK - 10 : 5 * BLOCK + 10] == content[5 * BLOCK - 10 : 5 * BLOCK + 10]
    with pytest.raises(NotAuthentic, match="block 2 "):
        read.need(2 * BLOCK, 2 * BLOCK + 1)
    read.release()
    assert read[5 * BLOCK : 5 * BLOCK + 10] == bytes(10)
    read.need(5 * BLOCK, 5 * BLOCK + 10)
    assert read[5 * BLOCK : 5 * BLOCK + 10] == content[5 * BLOCK : 5 * BLOCK + 10]


def test_every_change_of_a_sealed_file_is_noticed(tmp_path):
    key, rng = Key(KEY), np.random.default_rng(1)
    content = rng.bytes(5 * BLOCK + 100)
    seal(tmp_path / "f", content, key)
    seal(tmp_path / "other", content[::-1], key)
    sound, other = (tmp_path / "f").read_bytes(), (tmp_path / "other").read_bytes()
    stride = BLOCK + 16

    def block(data: bytes, i: int) -> bytes:
        return data[128 + i * stride : 128 + (i + 1) * stride]

    def flipped(place: int) -> bytes:
        return sound[:place] + bytes([sound[place] ^ 1 << int(rng.integers(8))]) + sound[place + 1 :]

    head = sound[:128]
    forged = {
        "two blocks swapped": head + block(sound, 1) + block(sound, 0) + sound[128 + 2 * stride :],
        "another file's block": head + block(other, 0) + sound[128 + stride :],
        "another file's head": other[:128] + sound[128:],
        "the last block lost": sound[: 128 + 5 * stride],
        "the last two lost": sound[: 128 + 4 * stride],
        "a block left out": head + sound[128 + stride :],
        "a block twice": head + block(sound, 0) + sound[128:],
        "a byte more": sound + b"\0",
        "a block more": sound + block(sound, 0),
        "cut within a tag": sound[:-5],
        "only the head": head,
        "nothing": b"",
        "in the clear": content,
        **{f"bit at {at}": flipped(at) for at in [*range(0, 128, 3), *rng.integers(128, len(sound), 60).tolist()]},
    }
    for what, data in forged.items():
        (tmp_path / "f").write_bytes(data)
        with pytest.raises(NotAuthentic):
            unseal(tmp_path / "f", key)
            pytest.fail(f"{what} was taken")
    (tmp_path / "f").write_bytes(sound)
    assert unseal(tmp_path / "f", key) == content
    with pytest.raises(NotAuthentic, match="belongs to another file"):
        unseal(tmp_path / "f", key, name="y")
    with pytest.raises(NotAuthentic, match="another key"):
        unseal(tmp_path / "f", Key(bytes(32)))


def test_two_sealed_files_of_one_content_have_nothing_in_common(tmp_path):
    content = bytes(3 * BLOCK)
    for name in ("a", "b"):
        seal(tmp_path / name, content, Key(KEY))
    a, b = ((tmp_path / name).read_bytes()[28:] for name in ("a", "b"))
    pieces = [{data[at : at + 8] for at in range(100, len(data) - 8)} for data in (a, b)]
    assert not pieces[0] & pieces[1]


def test_a_rotation_changes_the_key_file_alone(tmp_path):
    old, new, secret = Key(KEY), Key(bytes(32)), os.urandom(32)
    before, after = (KeyFile.parse(tmp_path / "gallery.key", key_file(key, secret)) for key in (old, new))
    assert before.gallery_key_id == after.gallery_key_id
    assert before.opened(old).secret == after.opened(new).secret == secret
    with pytest.raises(bd.KeyMismatch, match=f"with key {new.key_id}, got key {old.key_id}"):
        after.opened(old)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments, a removed subject, and two rows in the journal."""
    folder = tmp_path_factory.mktemp("encrypted") / "g"
    fill(folder, with_key(small(merge_fan=9)))
    return folder


def fill(folder: Path, config: bd.Config) -> None:
    with bd.Engine.open(folder, config, clock=lambda: 1e9, new_id=lambda: "0" * 32) as engine:
        for low in (0, 6):
            for i in range(low, low + 6):
                enroll(engine, i)
            engine.maintain()
        engine.remove("s2")
        enroll(engine, 12)
        enroll(engine, 13)


def answers(folder: Path, config: bd.Config) -> tuple[object, ...]:
    with bd.Engine.open(folder, config, read_only=True) as engine:
        found = engine.search({"face": PEOPLE}, k=5)
        assert engine.problems() == []
        return found.ids.tolist(), found.similarity.tolist(), engine.subject_ids(), engine.decision("e5")


@pytest.mark.slow
def test_an_encrypted_gallery_answers_as_one_in_the_clear(encrypted, tmp_path):
    fill(tmp_path / "plain", small(merge_fan=9))
    assert answers(encrypted, with_key()) == answers(tmp_path / "plain", small())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("read_only", [False, True])
def test_without_its_key_a_gallery_says_so_and_nothing_changes(encrypted, read_only):
    before = files_of(encrypted)
    wrong = {
        "got no key": small(),
        f"got key {Key(bytes(32)).key_id}": with_key(key=bytes(32)),
    }
    for words, config in wrong.items():
        with pytest.raises(bd.KeyMismatch, match=words):
            bd.Engine.open(encrypted, config, read_only=read_only)
    with pytest.raises(bd.KeyMismatch):
        inspect(LocalStorage(), encrypted)
    assert files_of(encrypted) == before


def test_a_key_for_a_gallery_in_the_clear_is_refused_and_nothing_changes(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        enroll(engine, 0)
    before = files_of(tmp_path / "g")
    for read_only in (False, True):
        with pytest.raises(bd.KeyMismatch, match="is not encrypted"):
            bd.Engine.open(tmp_path / "g", with_key(), read_only=read_only)
    assert files_of(tmp_path / "g") == before


@pytest.mark.slow
def test_a_lost_or_damaged_key_file_is_named(encrypted, tmp_path):
    shutil.copytree(encrypted, tmp_path / "g")
    file = tmp_path / "g" / "gallery.key"
    sound = file.read_bytes()
    for place in range(0, len(sound), 7):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        with pytest.raises((bd.GalleryDamaged, bd.KeyMismatch), match=r"gallery\.key|with key"):
            bd.Engine.open(tmp_path / "g", with_key())
    file.unlink()
    with pytest.raises(bd.GalleryDamaged, match=r"gallery\.key is missing; copy it from a backup"):
        bd.Engine.open(tmp_path / "g", with_key())
    with pytest.raises(bd.BiodedupError):
        bd.Engine.open(tmp_path / "g", small())


@pytest.mark.slow
def test_doctor_reads_every_page_of_the_databases_beside_an_encrypted_gallery(tmp_path):
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        enroll(engine, 0)
    with jobs.Backlog.open(tmp_path / "g", with_key()) as backlog:
        backlog.enqueue([Arrival(f"encounter {i:04}", "s" * 60) for i in range(200)], 1e9)
    assert jobs.examine(tmp_path / "g", with_key()).problems == ()
    file = tmp_path / "g" / "backlog.sqlite3"
    sound = file.read_bytes()
    for place in range(100, len(sound), 4096):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        (problem,) = jobs.examine(tmp_path / "g", with_key()).problems
        assert "backlog.sqlite3" in problem


def test_the_key_file_of_another_gallery_is_named(tmp_path):
    for name in ("g", "other"):
        with bd.Engine.open(tmp_path / name, with_key()) as engine:
            enroll(engine, 0)
    shutil.copy(tmp_path / "other" / "gallery.key", tmp_path / "g" / "gallery.key")
    for read_only in (False, True):
        with pytest.raises(bd.GalleryDamaged, match=r"cannot be decrypted with the key in gallery\.key"):
            bd.Engine.open(tmp_path / "g", with_key(), read_only=read_only)


@pytest.mark.slow
def test_a_file_in_the_clear_is_not_taken_for_one_of_an_encrypted_gallery(encrypted, tmp_path):
    shutil.copytree(encrypted, tmp_path / "g")
    fill(tmp_path / "plain", small(merge_fan=9))
    shutil.copy(tmp_path / "plain" / "segments" / "1.face", tmp_path / "g" / "segments" / "1.face")
    with pytest.raises(bd.GalleryDamaged, match=r"1\.face is damaged: it is not encrypted"):
        bd.Engine.open(tmp_path / "g", with_key())
    assert [(p.segment, p.kind) for p in inspect(LocalStorage(lambda: KEY), tmp_path / "g")] == [(1, "face")]


class TestKeyProvider:
    def test_a_key_comes_from_a_file_a_variable_or_a_command_in_any_of_its_forms(self, tmp_path, monkeypatch):
        forms = [KEY, KEY.hex().encode() + b"\n", KEY.hex().upper().encode(), base64.b64encode(KEY) + b"\n"]
        for form in forms:
            (tmp_path / "key").write_bytes(form)
            (tmp_path / "key").chmod(0o600)
            assert bd.KeyProvider(file=tmp_path / "key")() == KEY
            assert bd.KeyProvider(command=("cat", str(tmp_path / "key")))() == KEY
        monkeypatch.setenv("REGISTER_KEY", KEY.hex())
        assert bd.KeyProvider(environment="REGISTER_KEY")() == KEY

    def test_what_is_no_key_is_refused_and_never_shown(self, tmp_path, monkeypatch):
        secret = "0123456789abcdef" * 3
        monkeypatch.setenv("REGISTER_KEY", secret)
        (tmp_path / "key").write_text(secret)
        (tmp_path / "key").chmod(0o600)
        for provider in (
            bd.KeyProvider(environment="REGISTER_KEY"),
            bd.KeyProvider(file=tmp_path / "key"),
            bd.KeyProvider(command=("cat", str(tmp_path / "key"))),
        ):
            with pytest.raises(bd.InvalidInput, match="no key; wanted 32 bytes") as raised:
                provider()
            assert secret not in str(raised.value)
        with pytest.raises(bd.InvalidInput, match="UNSET_KEY holds no key"):
            bd.KeyProvider(environment="UNSET_KEY")()
        with pytest.raises(bd.InvalidInput, match="cannot be read"):
            bd.KeyProvider(file=tmp_path / "absent")()
        for value in ("text", None, b"short"):
            with pytest.raises(bd.InvalidInput):
                bd.Engine.open(tmp_path / "g", bd.Config(keys=lambda value=value: value))
        assert not (tmp_path / "g").exists()

    def test_a_key_file_that_others_can_read_is_refused(self, tmp_path):
        (tmp_path / "key").write_bytes(KEY)
        (tmp_path / "key").chmod(0o644)
        with pytest.raises(bd.InvalidInput, match="chmod 600"):
            bd.KeyProvider(file=tmp_path / "key")()

    def test_a_command_that_fails_may_be_tried_again(self, tmp_path):
        for command in (("false",), (str(tmp_path / "absent"),)):
            with pytest.raises(bd.StorageUnavailable, match="the key's command"):
                bd.Engine.open(tmp_path / "g", bd.Config(keys=bd.KeyProvider(command=command)))
        assert not (tmp_path / "g").exists()

    def test_exactly_one_place_is_stated(self):
        for stated in ({}, {"file": "a", "environment": "B"}):
            with pytest.raises(bd.InvalidInput, match="exactly one"):
                bd.KeyProvider(**stated)

    def test_a_settings_file_names_the_place_and_a_gallery_never_stores_it(self, tmp_path):
        (tmp_path / "key").write_bytes(KEY)
        (tmp_path / "key").chmod(0o600)
        (tmp_path / "biodedup.toml").write_text('[keys]\nfile = "key"\n')
        config = bd.Config.load(tmp_path / "biodedup.toml")
        assert config.keys == bd.KeyProvider(file=tmp_path / "key")
        assert "keys" not in config.to_dict()
        with bd.Engine.open(tmp_path / "g", config) as engine:
            enroll(engine, 0)
        with bd.Engine.open(tmp_path / "g", with_key()) as engine:
            assert engine.subject_ids() == ["s0"]


def a_days_work(folder: Path, keys: bytes | None) -> dict[str, bytes]:
    """Enrolments, a case, removals, merges of segments, canaries, a queue, a backup and a join, and what must not be readable."""
    config = replace(small(seal_rows=8, merge_fan=3), keys=None if keys is None else lambda: keys)
    config = replace(config, policy=bd.Policy(duplicate_db=60, review_db=10, required=()))
    secret = {}
    gallery = folder / "g"
    with bd.Engine.open(gallery, config, new_id=lambda: "0" * 32, clock=lambda: 1e9) as engine:
        for i in range(30):
            name, visit = f"subject-{i:03}-of-the-register", f"encounter-{i:03}-of-the-day"
            minutiae = record(strewn(20, seed=i))
            templates = {
                "face": bd.Template("face", SFACE, PEOPLE[i]),
                "right_index": bd.Template("right_index", "external-minutiae", None, minutiae),
            }
            engine.enroll(bd.Encounter(name, templates=templates, encounter_id=visit))
            vector = PEOPLE[i].astype("<f4").tobytes()
            secret |= {f"id {i}": name.encode(), f"visit {i}": visit.encode(), f"minutiae {i}": minutiae[24:60]}
            secret |= {f"vector {i} at {at}": vector[at : at + 16] for at in range(0, 512, 128)}
            if i % 8 == 7:
                engine.maintain()
        between = (0.45 * PEOPLE[0] + np.sqrt(1 - 0.45**2) * PEOPLE[40]).astype(np.float32)
        waiting = bd.Encounter("a-person-who-waits", templates={"face": between}, encounter_id="a-case-that-waits")
        assert engine.enroll(waiting).outcome == "review"
        secret |= {"waiting": b"a-person-who-waits", "case": b"a-case-that-waits"}
        engine.remove("subject-003-of-the-register")
        engine.backup(folder / "backup")
        jobs.find_duplicates(engine, folder / "pairs.parquet")
        (folder / "pairs.parquet").unlink()  # the result, which was asked for
    jobs.examine(gallery, config, canaries=True)
    with jobs.Backlog.open(gallery, config) as backlog:
        backlog.enqueue([Arrival("an-encounter-in-the-queue", "a-person-in-the-queue")], 1e9)
    secret |= {"queued": b"an-encounter-in-the-queue"}
    with bd.Engine.open(gallery, config) as engine:
        engine.compact()
        engine.backup(folder / "backup")
    return secret


def sampled(folder: Path, count: int) -> dict[str, bytes]:
    """Sixteen bytes each from all over the files of a gallery in the clear: codes, look-ups, answers, whatever they are."""
    rng, pieces = np.random.default_rng(0), {}
    files = [content for name, content in files_of(folder).items() if "/segments/" in name or "sentinels" in name]
    while len(pieces) < count:
        content = files[rng.integers(len(files))]
        at = int(rng.integers(max(len(content) - 16, 1)))
        piece = content[at : at + 16]
        if len(set(piece)) > 8:
            pieces[f"piece {len(pieces)}"] = piece
    return pieces


@pytest.mark.slow
def test_no_file_of_an_encrypted_gallery_holds_a_byte_string_of_a_template_or_an_id(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "sealed" / "tmp"))
    for name in ("plain", "sealed/tmp"):
        (tmp_path / name).mkdir(parents=True)
    secret = a_days_work(tmp_path / "plain", None)
    secret |= sampled(tmp_path / "plain", 400)
    assert a_days_work(tmp_path / "sealed", KEY).keys() <= secret.keys()
    seen = b"\0".join(files_of(tmp_path / "plain").values())
    assert sum(needle in seen for needle in secret.values()) > 0.6 * len(secret), "the search can find what is there"
    names = files_of(tmp_path / "sealed")
    assert {"g/gallery.sqlite3", "g/gallery.sqlite3-journal", "g/backlog.sqlite3", "g/sentinels"} <= names.keys()
    assert any(name.startswith("backup/segments/") for name in names)
    hits = [(what, name) for name, content in names.items() for what, needle in secret.items() if needle in content]
    assert hits == []
    assert len(secret) > 600
    kept = []
    for folder, config in ((tmp_path / "sealed" / "backup", with_key()), (tmp_path / "plain" / "backup", small())):
        with bd.Engine.open(folder, config, read_only=True) as engine:
            kept.append(engine.subject_ids())
            assert engine.problems() == []
    assert kept[0] == kept[1]
    assert len(kept[0]) > 25


@pytest.mark.slow
def test_a_gallery_is_encrypted_and_decrypted_and_answers_as_before(tmp_path):
    fill(tmp_path / "g", small(merge_fan=9))
    with jobs.Backlog.open(tmp_path / "g") as backlog:
        backlog.enqueue([Arrival("in-the-queue")], 1e9)
    jobs.examine(tmp_path / "g", small(), canaries=True)
    before, canaries = answers(tmp_path / "g", small()), (tmp_path / "g" / "sentinels").read_bytes()
    status = encrypting.encrypt(tmp_path / "g", lambda: KEY)
    assert status.register_key_id == Key(KEY).key_id
    assert encrypting.key_status(tmp_path / "g") == status
    assert answers(tmp_path / "g", with_key()) == before
    assert jobs.queue_status(tmp_path / "g", 1e9, with_key()).waiting == 1
    content = b"".join(files_of(tmp_path / "g").values())
    assert b"in-the-queue" not in content
    assert PEOPLE[12].astype("<f4").tobytes()[:16] not in content
    assert encrypting.encrypt(tmp_path / "g", lambda: KEY) == status, "done already"
    with pytest.raises(bd.KeyMismatch):
        encrypting.decrypt(tmp_path / "g", lambda: bytes(32))
    assert encrypting.decrypt(tmp_path / "g", lambda: KEY) == encrypting.KeyStatus(False, None, None)
    assert answers(tmp_path / "g", small()) == before
    assert (tmp_path / "g" / "sentinels").read_bytes() == canaries
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


@pytest.mark.slow
def test_an_encryption_that_fails_anywhere_leaves_the_gallery_as_it_was_or_encrypted_and_the_next_run_ends_it(
    tmp_path, monkeypatch
):
    fill(tmp_path / "before", small(merge_fan=9))
    wanted = answers(tmp_path / "before", small())
    for n in itertools.count(1, 6):
        shutil.copytree(tmp_path / "before", tmp_path / "g")
        countdown = Countdown(n)
        with monkeypatch.context() as patched:
            for name in ("create", "replace", "remove", "sync_folder", "make_folder", "connect"):
                patched.setattr(LocalStorage, name, failing(getattr(LocalStorage, name), countdown))
            try:
                encrypting.encrypt(tmp_path / "g", lambda: KEY)
            except bd.StorageUnavailable:
                pass
        done = encrypting.key_status(tmp_path / "g").encrypted
        assert answers(tmp_path / "g", with_key() if done else small()) == wanted, n
        assert encrypting.encrypt(tmp_path / "g", lambda: KEY).encrypted
        assert answers(tmp_path / "g", with_key()) == wanted, n
        assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "g"]
        shutil.rmtree(tmp_path / "g")
        if countdown.left > 0:
            break
    assert n > 40


def failing(action, countdown: Countdown):
    def call(*given, **named):
        return countdown.call(lambda: action(*given, **named), OSError(5, "input/output error"))

    return call


def test_a_rotation_lets_the_new_key_open_the_gallery_and_no_longer_the_old_one(encrypted, tmp_path):
    shutil.copytree(encrypted, tmp_path / "g")
    new = bytes(range(50, 82))
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        before = files_of(tmp_path / "g")
        encrypting.rotate(tmp_path / "g", lambda: KEY, lambda: new)
        assert [name for name, content in files_of(tmp_path / "g").items() if before[name] != content] == [
            "gallery.key"
        ]
        enroll(engine, 20)  # a process that has it open goes on
        engine.maintain()
        engine.backup(tmp_path / "b")
    for folder in ("g", "b"):
        with pytest.raises(bd.KeyMismatch):
            bd.Engine.open(tmp_path / folder, with_key())
        with bd.Engine.open(tmp_path / folder, with_key(key=new)) as engine:
            assert "s20" in engine
    with pytest.raises(bd.KeyMismatch):
        encrypting.rotate(tmp_path / "g", lambda: KEY, lambda: bytes(32))
    assert encrypting.rotate(tmp_path / "g", lambda: KEY, lambda: new).register_key_id == Key(new).key_id, "repeated"


def test_a_backup_before_a_rotation_is_brought_up_to_date_after_it(encrypted, tmp_path):
    shutil.copytree(encrypted, tmp_path / "g")
    new = bytes(range(50, 82))
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        engine.backup(tmp_path / "b")
    encrypting.rotate(tmp_path / "g", lambda: KEY, lambda: new)
    with bd.Engine.open(tmp_path / "g", with_key(key=new)) as engine:
        assert engine.backup(tmp_path / "b").files_copied == 0
    assert answers(tmp_path / "b", with_key(key=new)) == answers(tmp_path / "g", with_key(key=new))


PAGE = 4096


class Forger:
    """Changes one file of an encrypted gallery, as someone does who has all files of all times and no key."""

    def __init__(self, gallery: Path, earlier: Path, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._gallery = gallery
        names = sorted(name for name in files_of(gallery) if name not in ("writer.lock", "gallery.sqlite3-journal"))
        self.name = names[self._rng.integers(len(names))]
        self._path = gallery / self.name
        self._sound = self._path.read_bytes()
        self._others = [
            content for name, content in files_of(earlier).items() if name != self.name and len(content) > 200
        ]

    def forge(self) -> str:
        """What was done. The file is another one afterwards."""
        ways = [self._flip, self._cut, self._lengthen, self._blocks, self._other_file, self._other_block, self._remove]
        while True:
            way = ways[self._rng.integers(len(ways))]
            content = way(bytearray(self._sound))
            if content is None:
                self._path.unlink()
                return f"{way.__name__} {self.name}"
            if bytes(content) != self._sound:
                self._path.write_bytes(content)
                return f"{way.__name__} {self.name}"

    def restore(self) -> None:
        self._path.write_bytes(self._sound)

    def _flip(self, content: bytearray) -> bytearray:
        content[self._rng.integers(len(content))] ^= 1 << int(self._rng.integers(8))
        return content

    def _cut(self, content: bytearray) -> bytearray:
        return content[: self._rng.integers(len(content))]

    def _lengthen(self, content: bytearray) -> bytearray:
        return content + content[-int(self._rng.integers(1, len(content) + 1)) :]

    def _blocks(self, content: bytearray) -> bytearray:
        """Two blocks of a sealed file, or pages of a database, change places."""
        head, size = (0, PAGE) if self.name.endswith("sqlite3") else (128, BLOCK + 16)
        places = range(head, len(content) - size + 1, size)
        if len(places) > 1:
            a, b = self._rng.choice(places, 2, replace=False)
            content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
        return content

    def _other_file(self, content: bytearray) -> bytearray:
        return bytearray(self._others[self._rng.integers(len(self._others))])

    def _other_block(self, content: bytearray) -> bytearray:
        other = self._others[self._rng.integers(len(self._others))]
        at, size = self._rng.integers(len(content)), int(self._rng.integers(1, 200))
        piece = other[at % len(other) :][:size]
        content[at : at + len(piece)] = piece
        return content

    def _remove(self, content: bytearray) -> None:
        return None


def tables_of(gallery: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of the database."""
    with closing(LocalStorage(lambda: KEY).connect(gallery / "gallery.sqlite3", read_only=True)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f"SELECT * FROM {name}").fetchall() for name in names}


def forged_answers(gallery: Path, wanted: tuple[object, ...]) -> tuple[bool, bool]:
    """(an error names a damage, the answers are right)."""
    try:
        problems = inspect(LocalStorage(lambda: KEY), gallery)
    except (bd.GalleryDamaged, bd.KeyMismatch, bd.NotAGallery) as error:
        problems = [error]
    try:
        with bd.Engine.open(gallery, with_key(), read_only=True) as engine:
            found = engine.search({"face": PEOPLE}, k=5)
            given = found.ids.tolist(), found.similarity.tolist(), engine.subject_ids(), engine.decision("e5")
    except (bd.GalleryDamaged, bd.KeyMismatch, bd.NotAGallery):
        return bool(problems), True
    return bool(problems), given == wanted


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_every_forgery_of_a_file_is_found_and_none_changes_an_answer(encrypted, tmp_path, count):
    shutil.copytree(encrypted, tmp_path / "g")
    shutil.copytree(encrypted, tmp_path / "earlier")
    with bd.Engine.open(tmp_path / "g", with_key(small(merge_fan=9))) as engine:  # the files of before are old ones now
        enroll(engine, 14)
        engine.compact()
        enroll(engine, 15)
    wanted = answers(tmp_path / "g", with_key())
    (tmp_path / "g" / "gallery.sqlite3-journal").unlink()
    tables, unused = tables_of(tmp_path / "g"), 0
    for seed in range(count):
        forger = Forger(tmp_path / "g", tmp_path / "earlier", seed)
        done = forger.forge()
        found, right = forged_answers(tmp_path / "g", wanted)
        assert right, f"seed {seed}: {done} changed an answer"
        if not found:  # a page that the database does not use, or bytes behind its end
            assert forger.name == "gallery.sqlite3", f"seed {seed}: {done} was not found"
            assert tables_of(tmp_path / "g") == tables, f"seed {seed}: {done} was not found"
            unused += 1
        forger.restore()
    assert unused <= count / 10
    assert answers(tmp_path / "g", with_key()) == wanted


def written_rest(folder: Path) -> tuple[LocalStorage, np.ndarray]:
    """A sealed file whose rows are read singly, as the rest of a column is."""
    storage = LocalStorage(lambda: KEY)
    storage.unlock(folder, new=True)
    rows = np.random.default_rng(0).integers(1, 255, (4_000, 64), np.uint8)
    write_column_file(
        storage, folder / "1.face.rest", {"kind": "x"}, [Stream("rest", "|u1", rows.shape, [rows])], BLOCK
    )
    return storage, rows


@pytest.mark.slow
def test_rows_are_right_while_another_thread_gives_their_memory_back(tmp_path):
    storage, rows = written_rest(tmp_path)
    file = open_column_file(storage, tmp_path / "1.face.rest")
    wrong, ended = [], threading.Event()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not ended.is_set():
            at = rng.integers(0, len(rows), 50)
            low = int(rng.integers(0, 3_900))
            if not (
                np.array_equal(file.take("rest", at), rows[at])
                and np.array_equal(file.read("rest", low, low + 99), rows[low : low + 99])
            ):
                wrong.append(seed)

    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(read, seed) for seed in range(3)]
        for _ in range(60):
            file.release(forget=True)
            time.sleep(0.005)
        ended.set()
        for one in done:
            one.result()
    assert wrong == []


def test_a_file_that_is_closed_while_it_is_read_gives_right_rows_or_says_that_it_is_closed(tmp_path):
    storage, rows = written_rest(tmp_path)
    for seed in range(20):
        file = open_column_file(storage, tmp_path / "1.face.rest")
        rng = np.random.default_rng(seed)
        closer = threading.Timer(0.001 * seed / 4, file.close)
        closer.start()
        try:
            for _ in range(200):
                at = rng.integers(0, len(rows), 50)
                assert np.array_equal(file.take("rest", at), rows[at])
        except bd.EngineClosed:
            pass
        closer.join()


def test_a_search_of_a_closed_encrypted_gallery_says_so(encrypted):
    engine = bd.Engine.open(encrypted, with_key(), read_only=True)
    snapshot = internals(engine).gallery.snapshot()
    engine.close()
    with pytest.raises(bd.EngineClosed):
        snapshot.parts[0].columns["face"].vectors_at(np.array([0]))


def test_a_child_of_a_fork_leaves_the_encrypted_gallery_of_its_parent_alone(encrypted, tmp_path):
    shutil.copytree(encrypted, tmp_path / "g")
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        child = os.fork()
        if child == 0:
            try:
                internals(engine).gallery.transaction().__enter__()
            except bd.EngineClosed:
                engine.close()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        enroll(engine, 20)
        assert engine.problems() == []


@pytest.mark.slow
def test_a_killed_writer_of_an_encrypted_gallery_loses_nothing_that_it_acknowledged(tmp_path):
    program = """
import sys
import biodedup as bd
from tests.support.galleries import enroll, small
from dataclasses import replace
with bd.Engine.open(sys.argv[1], replace(small(), keys=bd.KeyProvider(environment="REGISTER_KEY"))) as engine:
    for i in range(len(engine), 60):
        print(i, enroll(engine, i).outcome, flush=True)
        engine.maintain()
"""
    acknowledged: set[str] = set()
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "g")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"REGISTER_KEY": KEY.hex()},
        )
        assert process.stdout is not None
        told = "".join(process.stdout.readline() for _ in range(5))
        time.sleep(0.03 * kill)
        process.kill()
        told += process.stdout.read()
        process.stdout.close()
        process.wait()
        acknowledged |= {f"s{line.split()[0]}" for line in told.splitlines(keepends=True) if line.endswith("unique\n")}
        with bd.Engine.open(tmp_path / "g", with_key()) as engine:
            assert acknowledged <= set(engine.subject_ids())
            assert engine.problems() == []
    assert len(acknowledged) >= 12


def test_a_gallery_opens_after_a_crash_while_its_key_file_was_written(tmp_path):
    (tmp_path / "g").mkdir()
    for name in ("writer.lock", "gallery.key.tmp"):
        (tmp_path / "g" / name).touch()
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        enroll(engine, 0)
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        assert engine.subject_ids() == ["s0"]


@pytest.mark.slow
def test_an_export_of_an_encrypted_gallery_is_loaded_into_an_encrypted_one(encrypted, tmp_path):
    config = with_key()
    jobs.export_gallery(encrypted, tmp_path / "export", config)
    jobs.load_gallery(tmp_path / "export", tmp_path / "g", config)
    assert encrypting.key_status(tmp_path / "g").encrypted
    assert answers(tmp_path / "g", config) == answers(encrypted, config)


@pytest.mark.slow
def test_an_encrypted_gallery_that_is_lost_comes_back_from_its_backup(encrypted, tmp_path):
    with bd.Engine.open(encrypted, with_key(), read_only=True) as engine:
        engine.backup(tmp_path / "b")
    (tmp_path / "g" / "segments").mkdir(parents=True)
    report = jobs.examine(tmp_path / "g", with_key(), mend=True, backup=tmp_path / "b")
    assert report.problems == ()
    assert answers(tmp_path / "g", with_key()) == answers(encrypted, with_key())


@pytest.mark.slow
def test_a_lost_key_file_comes_back_from_a_backup_of_this_gallery_and_of_no_other(encrypted, tmp_path):
    shutil.copytree(encrypted, tmp_path / "g")
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        engine.backup(tmp_path / "b")
        enroll(engine, 20)
    fill(tmp_path / "other", with_key(small(merge_fan=9)))
    (tmp_path / "g" / "gallery.key").unlink()
    with pytest.raises(bd.InvalidInput, match="another gallery"):
        jobs.examine(tmp_path / "g", with_key(), mend=True, backup=tmp_path / "other")
    report = jobs.examine(tmp_path / "g", with_key(), mend=True, backup=tmp_path / "b")
    assert (report.problems, report.mended) == ((), ("gallery.key taken from the backup",))
    with bd.Engine.open(tmp_path / "g", with_key()) as engine:
        assert "s20" in engine
