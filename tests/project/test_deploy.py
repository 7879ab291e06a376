"""The files of docs/deploy name what exists. Whether containers start is not tested here."""

from __future__ import annotations

import re

import pytest
import yaml

import biodedup as bd
from tests.support import ROOT

DEPLOY = ROOT / "docs" / "deploy"


def test_the_service_uses_names_that_the_library_has():
    text = (DEPLOY / "service.py").read_text()
    compile(text, "service.py", "exec")
    assert {name for name in re.findall(r"\bbd\.(\w+)", text) if not hasattr(bd, name)} == set()
    given = re.findall(r"^        (\w+)=", text, re.MULTILINE)
    assert given and set(given) <= bd.ClusterConfig.__dataclass_fields__.keys()


def test_every_variable_that_the_service_reads_is_set_by_compose():
    read = set(re.findall(r'environ\["(\w+)"\]', (DEPLOY / "service.py").read_text()))
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("front-end-1", "front-end-2"):
        assert read <= services[name]["environment"].keys()


@pytest.mark.parametrize("file", ["compose.yaml", "values.yaml", "Dockerfile"])
def test_images_are_of_this_version(file):
    versions = re.findall(r"(?:biodedup:|tag: )(\d+\.\d+\.\d+)", (DEPLOY / file).read_text())
    assert versions and set(versions) == {bd.__version__}


def test_only_nodes_for_shards_have_processors():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    starts = {name: s["command"] for name, s in services.items() if "ray start" in s.get("command", "")}
    assert {name for name, command in starts.items() if "--num-cpus=0" not in command} == {
        "ray-worker-1",
        "ray-worker-2",
    }


def test_the_head_keeps_its_state_in_a_redis_that_compose_starts_and_that_stores_it_on_disk():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    host, port = services["ray-head"]["environment"]["RAY_REDIS_ADDRESS"].split(":")
    assert port == "6379" and "--appendonly yes" in services[host]["command"] and services[host]["volumes"]
    assert services["ray-head"]["depends_on"] == {host: {"condition": "service_healthy"}}
