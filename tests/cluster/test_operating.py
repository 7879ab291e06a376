"""The commands that start, drain and upgrade: what they refuse, and what they tell `ray start`. With a real cluster: test_ray.py."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup.cli import app
from biodedup.cluster.operating import node_of
from biodedup.cluster.starting import start_command

NODES = [
    {"NodeID": "aa11", "NodeManagerAddress": "10.0.0.1", "Alive": True},
    {"NodeID": "aa22", "NodeManagerAddress": "10.0.0.2", "Alive": True},
    {"NodeID": "bb33", "NodeManagerAddress": "10.0.0.3", "Alive": False},
]


@pytest.mark.parametrize(
    ("part", "processors", "wanted"),
    [
        ("head", None, ["start", "--head", "--node-ip-address=10.0.0.1", "--port=6379", "--num-cpus=0"]),
        ("shards", None, ["start", "--address=10.0.0.1:6379"]),
        ("shards", 16, ["start", "--address=10.0.0.1:6379", "--num-cpus=16"]),
        ("front-end", None, ["start", "--address=10.0.0.1:6379", "--num-cpus=0"]),
    ],
)
def test_each_part_of_a_cluster_gets_its_options(part, processors, wanted):
    assert start_command(part, "10.0.0.1:6379", processors) == wanted


def test_a_node_states_the_memory_that_it_is_given():
    started = start_command("shards", "10.0.0.1:6379", 4, 64 * 10**9)
    assert started == ["start", "--address=10.0.0.1:6379", "--num-cpus=4", "--memory=64000000000"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("tail", "a:1", None), "the part is 'tail'"),
        (("head", None, None), "wanted host:port"),
        (("shards", "auto", None), "wanted host:port"),
        (("shards", "a:b", None), "wanted host:port"),
        (("head", "a:1", 4), "leave --cpus out"),
        (("front-end", "a:1", None, 10**9), "leave --memory out"),
    ],
)
def test_what_cannot_be_started_is_refused(given, said):
    with pytest.raises(bd.InvalidInput, match=said):
        start_command(*given)


def test_the_address_is_that_of_the_settings_and_a_dry_run_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("biodedup.cluster.starting.start", lambda arguments: pytest.fail("started"))
    (tmp_path / "s.toml").write_text('[cluster]\nsegments = "file:///s"\nray_address = "10.0.0.9:6379"\n')
    asked = ["cluster", "up", "shards", "--dry-run", "--config", str(tmp_path / "s.toml")]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"command": ["ray", "start", "--address=10.0.0.9:6379"], "started": False}
    assert "every program that reaches Ray's ports" in CliRunner().invoke(app, asked).stdout


def test_a_node_is_named_by_the_beginning_of_its_id_or_its_address():
    assert node_of(NODES, "aa1")["NodeID"] == "aa11"
    assert node_of(NODES, "10.0.0.2")["NodeID"] == "aa22"
    for name, said in (("aa", "several nodes"), ("bb33", "no living node"), ("", "no living node")):
        with pytest.raises(bd.InvalidInput, match=said):
            node_of(NODES, name)
