"""The lock file of a deployment: what the package asks for, at one version each, with digests."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

DEPLOY = ROOT / "docs" / "deploy"
LOCK = (DEPLOY / "requirements.lock").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK, re.MULTILINE))


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["cluster"] + extras["encryption"] + extras["kit"]
    service = (DEPLOY / "service.in").read_text(encoding="utf-8").splitlines()
    lines += [line.partition("#")[0] for line in service if line.partition("#")[0].strip()]
    return [Requirement(line) for line in lines]


def test_every_package_that_a_deployment_needs_is_locked_at_a_version_that_is_allowed() -> None:
    for requirement in wanted():
        version = PINS.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in requirements.lock: run .ci/lock"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}: run .ci/lock"


def test_every_locked_package_has_digests() -> None:
    entries = re.split(r"\n(?=\S)", LOCK.strip())
    assert len(entries) == len(PINS)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)


def test_the_image_installs_only_what_the_lock_holds() -> None:
    image = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    installs = re.findall(r"pip install ([^&\n]*)", image.split("FROM")[-1])
    assert all("--require-hashes" in install or "--no-deps" in install for install in installs)
    assert len(installs) == 2
