"""All settings of an engine in one dataclass, and their TOML file.

Owns the settings that belong to no group, such as threads, keys and identities. Never looks for a settings file (`settings.py` does).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from biodedup.common.arguments import check_fields, checked
from biodedup.common.tables import made, read_toml, typed
from biodedup.config.captures import CaptureConfig, FaceConfig, FingerConfig, IsolationConfig
from biodedup.config.gallery import ClusterConfig, GalleryConfig, SearchConfig
from biodedup.config.output import LabelConfig, LogConfig
from biodedup.config.policy import Policy
from biodedup.errors import InvalidInput, NotAllowed
from biodedup.keys import KeyProvider
from biodedup.principals import Principal, folded

AUDITS = ("none", "changes", "all")
"""Values of `Config.audit`."""
_NOT_STORED = ("cluster", "keys", "subject_keys", "identities", "allow_template_export", "audit")
"""Settings that a gallery does not store: where the gallery and its key are, and who may use it."""


@dataclass(frozen=True)
class Config:
    """All settings. See each class for its fields."""

    face: FaceConfig = field(default_factory=FaceConfig)
    finger: FingerConfig = field(default_factory=FingerConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    policy: Policy | None = None
    """The policy of a new gallery; None: the default policy. An existing gallery uses its stored policy, and opening it with another policy
    raises PolicyMismatch (`Engine.open`)."""
    search: SearchConfig = field(default_factory=SearchConfig)
    gallery: GalleryConfig = field(default_factory=GalleryConfig)
    log: LogConfig = field(default_factory=LogConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    threads: int = 2
    """Threads of extraction, and threads of search. The library never reads the number of processor cores: set it to the number of cores
    to use."""
    batch_size: int = 32
    """Captures that are embedded together, and encounters that `enroll_many` commits together."""
    isolation: IsolationConfig | None = None
    """None: captures are decoded in this process, within the limits of `capture`. Otherwise they are decoded in `threads` worker processes
    with limits of their own, as jobs and the command line do. A program that sets it guards its main module by
    `if __name__ == "__main__"`."""
    cluster: ClusterConfig | None = None
    """Settings of a register in PostgreSQL. None: a gallery in a folder. The gallery does not store them."""
    keys: KeyProvider | Callable[[], bytes] | None = None
    """The source of the register's key: a provider, or a function that returns 32 bytes. With a key, a new gallery is encrypted. An
    encrypted gallery opens only with its key, and an unencrypted gallery only without a key (`KeyMismatch`). Needs the extra
    `encryption`."""

    subject_keys: Path | None = None
    """Folder outside the gallery and its backups. With it, minutiae that are enrolled from now on are sealed by a key of their row. The keys
    are in this folder. A removal destroys those of its rows, so that no backup yields these minutiae any more. From the first opening with it on,
    the gallery opens with this folder alone (`KeyMismatch`). Embeddings are not sealed by it, and a register in PostgreSQL refuses it. It is
    not stored with the gallery. Needs the extra `encryption`."""

    identities: dict[str, str] | None = None
    """name -> its roles, separated by spaces (`biodedup.principals.ROLES`), and its public keys, `ed25519:HEX`, which verify its signed
    approvals. If it is set, `by` of verdicts and policies, and `--by`, must be one of these names with the necessary role, and
    `Engine.as_principal` accepts only these names. None: `by` is any name. The gallery does not store it."""
    audit: str | None = None
    """Which calls the gallery's audit log records, with time, principal, purpose, kind, ids and outcome, and without biometric data or
    scores.
      `none`      no calls;
      `changes`   calls that change the gallery, in the commit that carries them out;
      `all`       also searches, verifications, reading, and calls that are refused. These records wait in memory for up to a second, or
                  for the next change; a crash loses them.
    None: `all` if `identities` are configured, otherwise `changes`. The gallery does not store it."""
    allow_template_export: bool | None = None
    """Whether `Engine.templates`, `encounters`, `subject`, FAISS indexes and exports may hand out templates. Each export is logged. None:
    they may; if `identities` or `keys` are configured, the log warns, and a later release will refuse. False: NotAllowed."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 1")
        if self.audit is not None and self.audit not in AUDITS:
            raise InvalidInput(f"audit is {self.audit!r}, wanted one of {', '.join(AUDITS)}, or None")
        self._check_identities()

    def _check_identities(self) -> None:
        by_folded: dict[str, str] = {}
        by_key: dict[str, str] = {}
        for name in self.identities or ():
            for key in self.identity(name).public_keys:
                if (other := by_key.setdefault(key, name)) != name:
                    raise InvalidInput(
                        f"identities {other!r} and {name!r} state the same public key, and would approve as two people; give each "
                        "person a key, as `biodedup log key` makes one"
                    )
            if (other := by_folded.setdefault(folded(name), name)) != name:
                raise InvalidInput(
                    f"identities {other!r} and {name!r} differ in case alone; give people different names"
                )

    def identity(self, name: str) -> Principal:
        """The principal of a configured name. Raises NotAllowed for another name, InvalidInput for unknown roles."""
        roles = (self.identities or {}).get(name)
        if not name:
            raise NotAllowed("identities are configured, and no name was given; pass by='NAME', or --by NAME")
        if roles is None:
            raise NotAllowed(
                f"{name!r} is none of the configured identities; name one of them, or add it to `identities`"
            )
        return Principal.of(name, roles.split())

    @property
    def public_keys(self) -> dict[str, Collection[str]]:
        """Name of each identity -> its public keys."""
        return {name: self.identity(name).public_keys for name in self.identities or ()}

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Config:
        """The settings of a TOML file. Its tables `[face]`, `[search]`, ... and their keys have the names of these fields; a field that is not
        in the file has its default.

        Relative paths start from the file's folder; "" stands for None. Raises InvalidInput, which names the file and the setting.
        """
        path = Path(path)
        return made(cls, typed(cls, read_toml(path), str(path), path.parent), str(path))

    @property
    def audited(self) -> str:
        """Which calls the audit log records: one of AUDITS."""
        return self.audit or ("changes" if self.identities is None else "all")

    @property
    def stated_policy(self) -> Policy:
        """The policy, or the default policy if it is None."""
        return self.policy or Policy()

    def with_policy(self) -> Config:
        """The same settings with the default policy in place of None."""
        return replace(self, policy=self.stated_policy)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy, as the gallery stores it: with a policy, and without `cluster`, `keys`, `identities`, `audit` and
        `allow_template_export`."""
        stored = asdict(
            replace(self.with_policy(), cluster=None, keys=None, identities=None),
            dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items},
        )
        return {name: value for name, value in stored.items() if name not in _NOT_STORED}
