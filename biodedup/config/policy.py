"""The policy of a gallery: target error rates, required captures, and the rules for callers.

Owns its fields, their ranges, and the thresholds that follow from the target rates. Never decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log10

from biodedup.common.arguments import check_fields
from biodedup.common.renamed import renamed_fields
from biodedup.config.ranges import is_number
from biodedup.errors import InvalidInput
from biodedup.required import SENT, check_required

REPLAYS = ("report", "refuse")
"""Values of `Policy.replays`."""
LIVENESS = ("", "device", "pad", "either")
"""Values of `Policy.require_liveness`."""
DISCLOSURES = ("full", "coarse", "outcome")
"""Values of `Policy.disclosure`, from the most to the least information."""
TWO_PEOPLE = ("remove", "replace", "adjudicate", "policy", "index", "merge", "key", "model")
"""Values of `Policy.two_people`."""


@renamed_fields(own_strangers="use_gallery_impostors")
@dataclass(frozen=True)
class Policy:
    """The rules and target error rates of decisions. A gallery stores its policy.

    Thresholds follow from the target rates and the present gallery size N: FMR = FPIR / N, if comparisons are independent; in decibels
    10 log10(N / FPIR).
    """

    fpir: float = 1e-3
    """Target share of non-mated searches with the outcome `duplicate`, between 0 and 1. Lower it if a false duplicate costs more than a
    review."""
    review_fpir: float = 5e-3
    """Target share of non-mated searches that score at or above the review threshold; at least fpir. A person judges searches between the
    two thresholds. Raise it to review more and miss fewer mates."""
    fnir_review: float = 0.5
    """Maximum share of mates that may score below the review threshold. If a search has too few captures for this share, such as one face
    among many millions, its review threshold is lowered until the share is met. Then most such searches go to review, so that captures
    that are too weak to recognise a mate are never cleared. The default requires that a mate is more likely found than missed."""
    duplicate_db: float | None = None
    """A fixed duplicate threshold in dB. None: the threshold follows from fpir and N."""
    review_db: float | None = None
    """A fixed review threshold in dB, at most duplicate_db. None: the threshold follows from review_fpir, fnir_review and N."""
    duplicate_floor_db: float = 50.0
    """Minimum duplicate threshold in dB, also for a fixed threshold. A gallery of ten subjects needs 40 dB by its size. Impostor pairs of
    another camera than that of the model card reach this value (MEDS 46, Yale 41, ORL 61 dB; fingers of UareU 49 dB). By the lower end of
    the calibration's interval (match/scores/calibrations.py) they reach 44 dB."""
    verify_fmr: float = 1e-4
    """Target false match rate of 1:1 verifications and updates, between 0 and 1."""
    trust_extrapolation: bool = True
    """Whether a score that the calibration extrapolates beyond its measured pairs can make a `duplicate`. False: such a search goes to
    review."""
    use_gallery_impostors: bool = True
    """Whether embeddings are calibrated on impostor pairs of this gallery, from 32 subjects on. False: the model card's calibration
    applies unchanged, as in `biodedup.compare`."""
    replays: str = "report"
    """What an update or a 1:1 verification does with a probable replay: a capture that is nearly equal to an enrolled capture of the same
    subject, because the same picture or template was sent again. `report`: `replays` of the decision or verification names it. `refuse`:
    the update goes to review (`replay_suspected`), and the verification is not accepted."""
    require_liveness: str = ""
    """The proof of liveness that every face capture needs. `device`: the signed verdict of a known device (`Face.device`,
    `CaptureConfig.devices`). `pad`: the network of `FaceConfig.pad`. `either`: one of the two. "": no proof. A face without the proof is
    refused as `liveness_unproved`. A ready-made face template is refused, too, since it cannot have a proof. Fingers need no proof."""
    required: tuple[str, ...] = (SENT,)
    """The captures that an encounter needs to enrol or update a subject. An encounter that lacks some is `refused` as `incomplete`, and may
    be sent again under its encounter_id. A sequence of
      `sent`                       every capture that was sent is usable (the default). Of two usable captures of one finger the better
                                   one counts;
      `face`, `right_index`, ...   this capture;
      `N fingers`                  N fingers of any position, N from 1 to 10.
    `biodedup.Missing` excuses a column. `N fingers` never asks for more fingers than ten minus the excused ones: for a subject with one
    finger left, `2 fingers` asks for this finger. An empty sequence requires nothing."""

    disclosure: str = "full"
    """How much the answers to enrolments, searches and verifications say about scores. The gallery always keeps the complete decision.
      `full`      everything;
      `coarse`    scores are rounded down to steps of 10 dB, and are 0 below the threshold; there are no scores of single captures;
                  candidates below the review threshold are not named;
      `outcome`   as `coarse`, but a score is only the threshold that it reaches.
    Scores let a caller approximate an enrolled vector (hill climbing): with `full` in 146 verifications, with steps alone in 430 (2026-11).
    `coarse` without a budget only makes this harder."""
    caller_calls_per_hour: float | None = None
    """How many searches, verifications and enrolments a principal may make in an hour, and in one burst (a token bucket). None: no limit.
    A caller without a name (`Engine.as_principal`) has no limit."""
    subject_calls_per_day: float | None = None
    """How many answers about one enrolled subject all callers together may get in a day: verifications, updates, and searches that name
    the subject. It also limits the answers that name one open case. None: no limit."""
    climbs_max: int = 0
    """Number of rises in a day that lock a caller out from a subject. A rise is a failed verification of the subject whose score is above that
    of the caller's earlier ones with like captures. The lock-out lasts a day and gives an alarm (`Engine.alarms`). Of eight failed tries in
    random order, 1 series in 115 rises five times. 0: no lock-out."""
    keep_refused_days: float | None = None
    """For how many days a decision `refused` is kept. Then `biodedup retention run` erases it, with its encounter_id. None: for ever."""
    keep_cases_days: float | None = None
    """For how many days a closed case is kept after its last verdict: its request and answer, its verdicts, and its templates if it was not
    enrolled. Then `biodedup retention run` erases it. Open cases are kept, however old they are. None: for ever."""
    two_people: tuple[str, ...] = ()
    """The calls that need two principals: `remove`, `replace` (`update(replace=True)`), `adjudicate`, `policy` (`set_policy`), `index`
    (`reindex`), `merge` (`merge --apply`, `undo`), `key` (`key rotate`, `key rekey`, `encrypt`, `decrypt`), `model` (`accept_models`). The
    first principal's call stores a request and raises `ApprovalNeeded`. The same call by another principal approves the request and is
    carried out. `Engine.approvals` lists the requests."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "required", check_required(self.required))
        self._check_word("replays", REPLAYS, ", ".join(REPLAYS))
        self._check_word("require_liveness", LIVENESS, ", ".join(map(repr, LIVENESS)))
        self._check_word("disclosure", DISCLOSURES, ", ".join(DISCLOSURES))
        if isinstance(self.two_people, str) or (unknown := set(self.two_people) - set(TWO_PEOPLE)):
            got = self.two_people if isinstance(self.two_people, str) else sorted(unknown)[0]
            raise InvalidInput(f"two_people holds {got!r}, wanted a sequence of {', '.join(TWO_PEOPLE)}")
        object.__setattr__(self, "two_people", tuple(name for name in TWO_PEOPLE if name in self.two_people))
        for name in ("trust_extrapolation", "use_gallery_impostors"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"{name} is {getattr(self, name)!r}, wanted True or False")
        self._check_limits()
        self._check_thresholds()

    def _check_word(self, name: str, known: Sequence[str], wanted: str) -> None:
        if getattr(self, name) not in known:
            raise InvalidInput(f"{name} is {getattr(self, name)!r}, wanted one of {wanted}")

    def _check_limits(self) -> None:
        for name in ("caller_calls_per_hour", "subject_calls_per_day"):
            limit = getattr(self, name)
            if limit is not None and not (is_number(limit) and 1 <= limit < 1e9):
                raise InvalidInput(f"{name} is {limit}, wanted at least 1 and less than 1e9, or None for no limit")
        for name in ("keep_refused_days", "keep_cases_days"):
            days = getattr(self, name)
            if days is not None and not (is_number(days) and 0 <= days < 1e6):
                raise InvalidInput(f"{name} is {days}, wanted days from 0 to a million, or None to keep for ever")
        if self.climbs_max < 0:
            raise InvalidInput(f"climbs_max is {self.climbs_max}, wanted at least 0, which means no lock-out")

    def _check_thresholds(self) -> None:
        for name in ("fpir", "review_fpir", "fnir_review", "verify_fmr"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                raise InvalidInput(f"{name} is {value}, wanted a rate between 0 and 1")
        for name in ("duplicate_db", "review_db"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and isfinite(value)):
                raise InvalidInput(f"{name} is {value}, wanted a finite number of decibels, or None")
        if self.review_fpir < self.fpir:
            raise InvalidInput(f"review_fpir {self.review_fpir} is below fpir {self.fpir}; review is the wider band")
        if self.duplicate_db is not None and self.review_db is not None and self.review_db > self.duplicate_db:
            raise InvalidInput(
                f"review_db {self.review_db} is above duplicate_db {self.duplicate_db}; review is the wider band"
            )
        floor_db = self.duplicate_floor_db
        if not (is_number(floor_db) and isfinite(floor_db) and floor_db >= 0):
            raise InvalidInput(f"duplicate_floor_db is {floor_db}, wanted a finite number of decibels from 0 on")

    def thresholds_db(self, gallery_size: int) -> tuple[float, float]:
        """The (duplicate, review) thresholds in dB for a gallery of gallery_size subjects."""
        size = max(gallery_size, 1)
        duplicate = max(self.link_db(size), self.duplicate_floor_db)
        review = self.review_db if self.review_db is not None else 10 * log10(size / self.review_fpir)
        return duplicate, min(review, duplicate)

    def link_db(self, gallery_size: int) -> float:
        """The score from which a join links two subjects: the duplicate threshold without its floor. A link alone decides nothing."""
        return self.duplicate_db if self.duplicate_db is not None else 10 * log10(max(gallery_size, 1) / self.fpir)
