"""An encrypted register: what lies in the store and on machines is sealed, and only the register's key opens it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import biodedup as bd
from biodedup.cluster import moving
from biodedup.cluster.cache import copies_of
from biodedup.cluster.key import ActorKey, actor_storage
from biodedup.cluster.shards.host import ShardHost
from biodedup.cluster.shards.remote import units_of
from biodedup.gallery.files.encryption.sealed_file import MAGIC
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.names import finished, unfinished
from biodedup.keys import KeyProvider, new_key
from biodedup.testing import internals
from tests.support.vectors import again, people

VECTORS = people(40)


def test_a_file_is_bound_to_the_name_that_it_will_have():
    for name in ("12.face", "12.face.rest", "12.face.index.0123456789012345", "gallery.sqlite3"):
        assert finished(name) == finished(f"{name}.new") == finished(unfinished(name)) == name


@pytest.fixture
def keys(tmp_path: Path) -> KeyProvider:
    (tmp_path / "key").write_bytes(new_key())
    (tmp_path / "key").chmod(0o600)
    return KeyProvider(file=tmp_path / "key")


@pytest.fixture
def config(keys: KeyProvider) -> bd.Config:
    return bd.Config(gallery=bd.GalleryConfig(background=False), keys=keys)


def filled(engine: bd.Engine) -> None:
    engine.add_templates([f"s{i}" for i in range(30)], {"face": VECTORS[:30]})
    engine.seal()
    for i in range(30, 39):
        engine.enroll(bd.Encounter(f"s{i}", templates={"face": VECTORS[i]}, encounter_id=f"e{i}"))


def answers(engine: bd.Engine) -> list[str]:
    return engine.search({"face": again(VECTORS[:39], 0.9)}, k=1).ids[:, 0].tolist()


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.name != "gallery.key"]


EVERYBODY = [f"s{i}" for i in range(39)]


@pytest.mark.slow
def test_files_of_an_encrypted_register_are_sealed_and_front_ends_with_its_key_find_everybody(
    register, config, tmp_path
):
    first = register(config, cluster={"cache": tmp_path / "one"})
    filled(first)
    second = register(config, cluster={"cache": tmp_path / "two"})
    assert answers(first) == answers(second) == EVERYBODY
    second.seal()
    second.remove("s7")
    second.compact()
    first.refresh()
    assert answers(first) == answers(second) and "s7" not in answers(first)
    assert first.problems() == second.problems() == []
    sealed = [*files_in(tmp_path / "store"), *files_in(tmp_path / "one"), *files_in(tmp_path / "two")]
    assert len(sealed) > 6 and all(file.read_bytes().startswith(MAGIC) for file in sealed)


@pytest.mark.slow
def test_another_key_or_none_opens_nothing_and_a_register_in_the_clear_takes_no_key(register, config, tmp_path, keys):
    filled(register(config))
    with pytest.raises(bd.KeyMismatch, match="got no key; nothing changed; state its key"):
        register(replace(config, keys=None))
    with pytest.raises(bd.KeyMismatch, match=r"got key [0-9a-f]{16}; nothing changed"):
        register(replace(config, keys=new_key))
    with pytest.raises(bd.KeyMismatch, match="got no key"):
        moving.export_gallery(register.url, tmp_path / "x", bd.ClusterConfig(segments=f"file://{tmp_path}/store"))
    plain = register.url + "_two"
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    bd.Engine.open(plain, bd.Config(cluster=cluster)).close()
    with pytest.raises(bd.KeyMismatch, match="the register is not encrypted"):
        bd.Engine.open(plain, bd.Config(cluster=cluster, keys=keys))


@pytest.mark.slow
def test_a_folder_of_copies_serves_one_register(register, config, tmp_path):
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store", cache=tmp_path / "one")
    register(config, cluster={"cache": tmp_path / "one"})
    for other in (config, replace(config, keys=None)):
        with pytest.raises(bd.InvalidInput, match=r"copies of another register; name another folder"):
            bd.Engine.open(f"{register.url}_{2 + (other.keys is None)}", replace(other, cluster=cluster))


@pytest.mark.slow
def test_renewable_templates_are_refused(register, config, tmp_path):
    renewable = replace(config, gallery=replace(config.gallery, renewable=True))
    with pytest.raises(bd.InvalidInput, match="for a gallery in a folder"):
        register(renewable)
    engine = register(config)
    with pytest.raises(bd.InvalidInput, match="for a gallery in a folder"):
        engine.rekey()
    bd.Engine.open(tmp_path / "g", renewable).close()
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    with pytest.raises(bd.InvalidInput, match="are renewable"):
        moving.import_gallery(tmp_path / "g", register.url + "_two", cluster, LocalStorage(config.keys))


@pytest.mark.slow
def test_an_encrypted_gallery_moves_there_and_back_under_its_key(register, config, tmp_path, keys):
    with bd.Engine.open(tmp_path / "g", config) as engine:
        filled(engine)
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    moving.import_gallery(tmp_path / "g", register.url, cluster, LocalStorage(keys))
    engine = register(config)
    assert answers(engine) == EVERYBODY and engine.problems() == []
    engine.seal()
    moving.export_gallery(register.url, tmp_path / "back", cluster, LocalStorage(keys))
    with bd.Engine.open(tmp_path / "back", config) as engine:
        assert answers(engine) == EVERYBODY and engine.problems() == []
    with pytest.raises(bd.KeyMismatch):
        bd.Engine.open(tmp_path / "back")


@pytest.mark.slow
def test_an_actor_fetches_the_key_on_its_node_again_where_it_was_not_there(register, config, tmp_path, keys):
    engine = register(config)
    filled(engine)
    gallery = internals(engine).gallery
    sent = ActorKey.of(keys, gallery.key_file).sent()
    assert keys.file.read_bytes().hex() not in str(sent) and repr(keys.file.read_bytes()) not in str(sent)
    keys.file.rename(tmp_path / "away")
    (unit,) = units_of(gallery.snapshot())
    host = ShardHost(
        lambda folder: actor_storage(sent, folder),
        tmp_path / "node",
        f"file://{tmp_path}/store",
        gallery.register_id,
        1 << 40,
        1,
    )
    assert "cannot be read" in host.take(unit.entries_text)
    (tmp_path / "away").rename(keys.file)
    assert host.take(unit.entries_text) == ""
    assert host.about()["segments"] == [part.entry.number for part in gallery.snapshot().segments]
    sealed = files_in(tmp_path / "node")
    assert len(sealed) == len(copies_of(part.entry for part in unit.segments))
    assert all(file.read_bytes().startswith(MAGIC) for file in sealed)
    host.close()


def test_a_function_that_returns_the_key_is_for_this_process_alone():
    with pytest.raises(bd.InvalidInput, match="wanted a KeyProvider"):
        ActorKey.of(new_key, "")
    assert ActorKey.of(None, "") is None
