"""All settings of biodedup, as frozen dataclasses that check their values when they are made.

Owns which settings exist, their defaults and their ranges. Never looks for a settings file (`settings.py` does), and never opens a
gallery, which stores its own policy. No default depends on the machine. Names end in their unit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite, log10
from pathlib import Path
from typing import Any

from biodedup.common.arguments import check_fields, checked
from biodedup.common.tables import made, read_toml, typed
from biodedup.devices import check_devices
from biodedup.errors import InvalidInput, NotAllowed
from biodedup.index_spec import parse_specs
from biodedup.keys import KeyProvider
from biodedup.outcomes import MEANINGS, outcome_of
from biodedup.principals import Principal, folded
from biodedup.required import SENT, check_required
from biodedup.values import COLUMNS, check_id, check_text

EXTERNAL_MINUTIAE = "external-minutiae"
"""The model_id of minutiae whose extractor is unknown."""


def _is_number(value: object) -> bool:
    """Whether it is one that JSON keeps as it is, as a gallery keeps its policy."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class FaceConfig:
    """The face model, the face detector, and the limits of the face quality gate."""

    model: str = "sface"
    """Name of a shipped model card, or path of a card (`*.toml`) of your own. A card without weights calibrates ready-made embeddings.
    A gallery column holds one model: another one needs another gallery."""
    model_folder: Path | None = None
    """Folder of the model cards. None: the cards that the package ships."""
    detector: str = "yunet"
    """Name of the face detector's card. YuNet is the only detector that the package ships."""
    pad: str | None = None
    """Path of a card (`*.toml`) of kind `pad`: a network that tells living faces from photographs, screens and masks. Faces below its limit are
    refused as `presentation_attack`. None: no network looks for attacks; the package ships none."""
    detector_confidence_min: float = 0.6
    """Detector confidence, 0 to 1, from which a face is reported. Lower than confidence_min, so that a refusal can say what is wrong with
    a doubtful face."""
    confidence_min: float = 0.8
    """Detector confidence, 0 to 1, below which a face is refused. The lowest of LFW's faces has 0.85; pictures without a face reach 0.7."""
    detector_side_px: int = 320
    """Longer side, in pixels, to which a picture is scaled for the detector. Where no face is found, 640 pixels are tried."""
    quality_min: float = 0.68
    """Least `Template.quality` of a face: the probability, 0 to 1, that a comparison with another capture of the person passes at FMR 1e-4.
    A face with signs of noise, patterns or covering needs more. 0.68 refuses 0.5 % of LFW and none of MEDS, ORL and Yale; raise it where
    an operator can capture again (`docs/guides/captures.md` has the curve)."""
    several_share_max: float = 0.6
    """A picture is refused if its second face has more than this share of the first one's prominence: box area, weighted down with the
    distance from the picture's centre. The chosen faces of LFW's pictures with a share of 0.5 to 0.6 match their mates, so that 0.6 refuses
    few of them; of two faces at 0.6 one is 1.3 times as long as the other. Raise it for pictures taken in crowds."""
    eye_distance_px_min: float = 20.0
    """Least distance between the eyes, in pixels of the capture."""
    sharpness_min: float = 0.1
    """Least sharpness of the aligned face: standard deviation of its Laplacian over that of its grey levels."""
    brightness_min: float = 14.0
    """Least mean grey level, 0 to 255, of the aligned face. The limit is for lost light, not for dark skin: mugshots at 15 still score 0.6
    with their mates (MEDS); LFW darkened to 10 %, mean 12, loses six times as many mates at 0.35."""
    brightness_max: float = 230.0
    """Greatest mean grey level, 0 to 255, of the aligned face."""
    yaw_deg_max: float = 60.0
    """Greatest turn of the head to a side, in degrees. Of faces turned by 45 to 60 degrees those with enough `quality` match their mates
    (all seven in 1,600 of LFW, 2026-11)."""
    roll_deg_max: float = 60.0
    """Greatest tilt of the head, in degrees. Alignment takes the tilt off, so that it harms less than yaw."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self, 0, 1, "detector_confidence_min", "confidence_min", "quality_min", "several_share_max")
        _check(self, 0, 255, "brightness_min", "brightness_max")
        _check(self, 0, 180, "yaw_deg_max", "roll_deg_max")
        _check(self, 0, inf, "eye_distance_px_min", "sharpness_min")
        _check(self, 1, inf, "detector_side_px")
        _check_text(self, "model", "detector")
        if self.brightness_min > self.brightness_max:
            raise InvalidInput(
                f"brightness_min is {self.brightness_min}, wanted at most brightness_max, {self.brightness_max}"
            )


@dataclass(frozen=True)
class FingerConfig:
    """The finger models, and the limits of the finger quality gate."""

    minutiae: str = "skeleton"
    """The minutiae extractor: `skeleton`, from the ridges that the embedding needs anyway; `mindtct` (NBIS), as in galleries of earlier builds,
    slower and less accurate; or `leader`, a network that is more accurate and takes twenty times as long."""
    minutiae_model: str | None = None
    """Path of a model card (`*.toml`) of your own for this extractor, with another calibration. None: the shipped card."""
    model: str | None = "finger256"
    """The finger embedding: name of a shipped model card, or path of a card of your own. None: templates hold minutiae alone, and each row
    is compared one by one."""
    record_model_id: str = EXTERNAL_MINUTIAE
    """The model_id of ready-made minutiae records, which do not state their extractor. By default they compare only with one another. Set
    it to the model_id of this configuration's extractor to declare that they compare with its minutiae, too."""
    area_mm2_min: float = 20.0
    """Least area covered by ridges, in mm2."""
    certainty_min: float = 0.32
    """Least certainty, 0 to 1, that the picture shows friction ridges."""
    minutiae_min: int = 8
    """Least number of minutiae."""
    side_px_max: int = 2500
    """Greatest side in pixels at 500 dpi: 127 mm, longer than any finger or a slap of four. A larger picture states a wrong dpi."""
    area_mm2_max: float = 3000.0
    """Greatest area, in mm2, of the rectangle around the ridges. A finger rolled from nail to nail takes 40 x 38 mm, 1,520 mm2. The limit
    bounds time: minutiae take about 0.9 s for 1,000 mm2 and grow faster than the area, to 20 s for 127 x 127 mm (2026-11)."""
    quality_min: float = 0.09
    """Least `Template.quality` of a finger: the probability, 0 to 1, that a comparison with another capture of the finger passes at FMR
    1e-4. Raise it if operators can capture a finger again."""
    nfiq2: bool = False
    """Whether NFIQ 2 predicts the quality of templates, and is the quality of records. It costs five times as much time as the rest of a finger."""
    nfiq2_min: float = 2.0
    """Least NFIQ 2 score, 0 to 100, where it is computed."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self, 0, inf, "area_mm2_min", "minutiae_min", "nfiq2_min")
        _check(self, 0, 1, "certainty_min", "quality_min")
        _check(self, 1, inf, "side_px_max")
        _check_text(self, "minutiae")
        check_id(self.record_model_id, "record_model_id")


@dataclass(frozen=True)
class CaptureConfig:
    """Limits that a capture must meet before it is decoded."""

    pixels_max: int = 16_000_000
    """Greatest number of pixels. A slap of four fingers at 1000 dpi has 10 million, a ten-print card at 500 dpi 16 million, a passport
    photograph one. JPEGs of faces may have eight times as many, as telephones make: they are decoded at a half or a quarter of their size,
    which leaves a face more pixels than the network takes."""
    side_px_min: int = 40
    """Least length of each side, in pixels."""
    bytes_max: int = 100_000_000
    """Greatest size of a file, in bytes; no more of a file is read."""
    devices: dict[str, str] | None = None
    """device_id -> Ed25519 public key, 64 hexadecimal digits: of capture devices whose verdicts (`Face.device`) count. None: of none."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.devices is not None:
            check_devices(self.devices)
        _check(self, 1, inf, "pixels_max", "side_px_min", "bytes_max")


@dataclass(frozen=True)
class IsolationConfig:
    """Limits of the worker processes that decode and extract, so that a hostile capture harms only itself."""

    capture_s_max: float = 10.0
    """Seconds of processor time that a capture may take, and six times as many by the clock, so that a busy machine refuses no capture. A
    face takes 0.06 s, a finger 0.2 s, with `leader` 1 s. Raise it on a slow machine."""
    memory_bytes_max: int = 1 << 30
    """Memory, in bytes, that a worker may use beyond its libraries and models, which take 150 MB. A picture of `pixels_max` takes up to
    500 MB."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.capture_s_max <= 86_400:
            raise InvalidInput(f"capture_s_max is {self.capture_s_max!r}, wanted seconds, above 0 and at most a day")
        if self.memory_bytes_max < 1 << 28:
            raise InvalidInput(f"memory_bytes_max is {self.memory_bytes_max}, wanted at least {1 << 28}")


REPLAYS = ("report", "refuse")
AUDITS = ("none", "changes", "all")
"""Values of `Config.audit`."""
LIVENESS = ("", "device", "pad", "either")
"""Values of `Policy.require_liveness`."""
DISCLOSURES = ("full", "coarse", "outcome")
"""Values of `Policy.disclosure`, the one that says most first."""
TWO_PEOPLE = ("remove", "replace", "adjudicate", "policy", "index", "merge", "key", "model")
"""Values of `Policy.two_people`: `Engine.remove`, `update(replace=True)`, `adjudicate`, `set_policy`, `reindex`, `jobs.merge(apply=True)` and
`undo`; keys and transforms of templates that are changed, set or taken away; other models or calibrations."""


@dataclass(frozen=True)
class Policy:
    """The rules and target error rates of decisions. A gallery stores its policy.

    Thresholds follow from the target rates at the present gallery size N: FMR = FPIR / N, independence assumed; in decibels
    10 log10(N / FPIR).
    """

    fpir: float = 1e-3
    """Target share of non-mated searches that come out `duplicate`, between 0 and 1. Lower it where a false duplicate costs more than a
    review."""
    review_fpir: float = 5e-3
    """Target share of non-mated searches that score at or above the review threshold; at least fpir. Searches between the two thresholds
    go to a person. Raise it to review more and miss fewer mates."""
    fnir_review: float = 0.5
    """Greatest share of mates that may score below the review threshold. With too few captures for it, such as one face among many
    millions, the review threshold is lowered for that search until the share is met; then most searches go to review, and captures that
    could not have been recognised are not cleared. The default only asks that a mate be found rather than missed."""
    duplicate_db: float | None = None
    """A fixed duplicate threshold in dB in place of the one from fpir. None: from fpir and N."""
    review_db: float | None = None
    """A fixed review threshold in dB, at most duplicate_db, in place of the one from review_fpir and fnir_review. None: from these."""
    duplicate_floor_db: float = 50.0
    """Least duplicate threshold in dB, also of a fixed one. A gallery of ten asks for 40 dB, which impostor pairs of another camera than
    the model card's reach (MEDS 46, Yale 41, ORL 61 dB; UareU's fingers 49); by the lower end of the calibration's interval
    (match/scores/calibrations.py) they reach 44 dB."""
    verify_fmr: float = 1e-4
    """Target false match rate of 1:1 verifications and updates, between 0 and 1."""
    trust_extrapolation: bool = True
    """False sends to review what would be `duplicate` by a score beyond the pairs that the calibration was measured on."""
    own_strangers: bool = True
    """Whether embeddings are calibrated on this gallery's own impostor scores, from 32 subjects on. False: scores are those of the model's
    card, as in `biodedup.compare`."""
    replays: str = "report"
    """What is done with a capture that is probably a copy of one of the same subject's, the same picture or template sent again, in an
    update or a 1:1 verification. `report`: `replays` of the decision or the verification names it. `refuse`: the update goes to review
    (`replay_suspected`), and the verification is not accepted."""
    require_liveness: str = ""
    """What has to prove that a face is a living person's, in every call that takes captures. `device`: the signed verdict of a known device
    (`Face.device`, `CaptureConfig.devices`); `pad`: the network of `FaceConfig.pad`; `either`; "": nothing. A face without the proof is refused
    as `liveness_unproved`, and so is a ready-made template, which cannot have one. Fingers need none."""
    required: tuple[str, ...] = (SENT,)
    """The captures that an encounter must bring to be enrolled or to update a subject. Otherwise it is `refused` as `incomplete`, and may
    be sent again under its encounter_id. A sequence of
      `sent`           every capture that was sent can be used (the default). Of two sound captures of one finger the better one counts;
      `face`, `right_index`, ...   this capture;
      `N fingers`      so many fingers of any position, N from 1 to 10.
    `biodedup.Missing` excuses a column. Its fingers are taken off the ten that `N fingers` may ask for: of a subject with one finger left,
    `2 fingers` asks for that one. An empty sequence requires nothing."""

    disclosure: str = "full"
    """What answers of enrolments, searches and verifications say of scores. The gallery keeps every decision complete.
      `full`      everything;
      `coarse`    scores rounded down to steps of 10 dB, and 0 where the threshold is not reached; no scores of single captures; candidates
                  below the review threshold are not named;
      `outcome`   the threshold that was reached in place of a score, otherwise as `coarse`.
    Scores let a caller approach an enrolled vector: with `full` in 146 verifications, with steps alone in 430 (2026-11). `coarse` without
    a budget only makes it harder."""
    caller_calls_per_hour: float | None = None
    """Searches, verifications and enrolments that one principal may make an hour, and at once (a token bucket). None: no limit. Callers
    without a name (`Engine.as_principal`) have none."""
    subject_calls_per_day: float | None = None
    """Answers about one enrolled subject a day, for all callers together: verifications, updates, and searches that name it. None: no limit."""
    climbs_max: int = 0
    """So often may the score of failed verifications of one subject by one caller rise, with captures like those before, within a day. Then the
    caller is locked out from this subject for a day, with an alarm (`Engine.alarms`). Eight failed tries in random order rise five times in 1
    of 115 cases. 0: no lock-out."""
    keep_refused_days: float | None = None
    """For how many days a decision `refused` is kept. Then `biodedup retention run` erases it, with its encounter_id. None: for ever."""
    keep_cases_days: float | None = None
    """For how many days a closed case is kept after its last verdict: what was sent and answered, its verdicts, and the templates of one that
    was not enrolled. Then `biodedup retention run` erases it. Open cases wait for a verdict, however old. None: for ever."""
    two_people: tuple[str, ...] = ()
    """Calls that two principals must make: `remove`, `replace` (`update(replace=True)`), `adjudicate`, `policy` (`set_policy`), `index`
    (`reindex`), `merge` (`merge --apply`, `undo`), `key` (`key rotate`, `key rekey`, `encrypt`, `decrypt`), `model` (`accept_models`). The first call
    stores a request (`ApprovalNeeded`); the same call by another principal approves it and is carried out. `Engine.approvals` lists them."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "required", check_required(self.required))
        if self.replays not in REPLAYS:
            raise InvalidInput(f"replays is {self.replays!r}, wanted one of {', '.join(REPLAYS)}")
        if self.require_liveness not in LIVENESS:
            wanted = ", ".join(map(repr, LIVENESS))
            raise InvalidInput(f"require_liveness is {self.require_liveness!r}, wanted one of {wanted}")
        if self.disclosure not in DISCLOSURES:
            raise InvalidInput(f"disclosure is {self.disclosure!r}, wanted one of {', '.join(DISCLOSURES)}")
        for name in ("caller_calls_per_hour", "subject_calls_per_day"):
            limit = getattr(self, name)
            if limit is not None and not (_is_number(limit) and 1 <= limit < 1e9):
                raise InvalidInput(f"{name} is {limit}, wanted at least 1 and less than 1e9, or None for no limit")
        if isinstance(self.two_people, str) or (unknown := set(self.two_people) - set(TWO_PEOPLE)):
            got = self.two_people if isinstance(self.two_people, str) else sorted(unknown)[0]
            raise InvalidInput(f"two_people holds {got!r}, wanted a sequence of {', '.join(TWO_PEOPLE)}")
        object.__setattr__(self, "two_people", tuple(name for name in TWO_PEOPLE if name in self.two_people))
        for name in ("keep_refused_days", "keep_cases_days"):
            days = getattr(self, name)
            if days is not None and not (_is_number(days) and 0 <= days < 1e6):
                raise InvalidInput(f"{name} is {days}, wanted days from 0 to a million, or None to keep for ever")
        if self.climbs_max < 0:
            raise InvalidInput(f"climbs_max is {self.climbs_max}, wanted at least 0, which means no lock-out")
        for name in ("trust_extrapolation", "own_strangers"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"{name} is {getattr(self, name)!r}, wanted True or False")
        for name in ("fpir", "review_fpir", "fnir_review", "verify_fmr"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1:
                raise InvalidInput(f"{name} is {value}, wanted a rate between 0 and 1")
        for name in ("duplicate_db", "review_db"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and isfinite(value)):
                raise InvalidInput(f"{name} is {value}, wanted a finite number of decibels, or None")
        if self.review_fpir < self.fpir:
            raise InvalidInput(f"review_fpir {self.review_fpir} is below fpir {self.fpir}; review is the wider band")
        if self.duplicate_db is not None and self.review_db is not None and self.review_db > self.duplicate_db:
            raise InvalidInput(
                f"review_db {self.review_db} is above duplicate_db {self.duplicate_db}; review is the wider band"
            )
        floor_db = self.duplicate_floor_db
        if not (_is_number(floor_db) and isfinite(floor_db) and floor_db >= 0):
            raise InvalidInput(f"duplicate_floor_db is {floor_db}, wanted a finite number of decibels from 0 on")

    def thresholds_db(self, gallery_size: int) -> tuple[float, float]:
        """(duplicate, review) thresholds in dB for a gallery of this many subjects."""
        size = max(gallery_size, 1)
        duplicate = max(self.link_db(size), self.duplicate_floor_db)
        review = self.review_db if self.review_db is not None else 10 * log10(size / self.review_fpir)
        return duplicate, min(review, duplicate)

    def link_db(self, gallery_size: int) -> float:
        """The score from which a join links two subjects: the duplicate threshold without its floor. A link alone decides nothing."""
        return self.duplicate_db if self.duplicate_db is not None else 10 * log10(max(gallery_size, 1) / self.fpir)


@dataclass(frozen=True)
class SearchConfig:
    """How many rows a search compares, and which risk of a miss it takes."""

    candidates: int = 100
    """Rows per probe that the scan of embeddings passes on to the comparison of all captures. More find more mates of poor captures, and
    take longer."""
    finger_rows_max: int = 5_000
    """Rows per probe that have only minutiae in common with it and are compared one by one. If there are more, the search is incomplete."""
    returned: int = 10
    """Candidates that a decision keeps: those that resemble the probe, and then the first by their embeddings. Where the probe and the
    gallery share one embedding alone, such as a face, only those that reach the review threshold are looked for. Where minutiae add to
    embeddings, others than those that resemble the probe are kept only up to five candidates in all."""
    miss_risk: float = 1e-3
    """Greatest probability that the scan of a column, which estimates similarities first, loses a row that an exact comparison would find;
    and that a candidate of the scan is left out that would resemble the probe by its minutiae. At least 0, below 0.5. Below 0.001 all
    minutiae of the candidates are compared, and with 0 every row exactly; both take longer. A single finger that agrees although all other
    captures do not, such as an operator's own, is left out in about 5 of 1,000 cases, whatever this risk from 0.001 on, and in more where rows
    are compared in several columns at once: `engine.plan(columns)` states it."""
    capture_correlation: float = 0.3
    """Assumed correlation, from 0 to below 1, of how well two captures of a subject match their mates (rank correlation on a normal
    scale): a subject with one poor finger often has several. The search over several columns is planned with it."""
    across_positions: bool = False
    """Whether each finger is compared with fingers of all positions, so that a wrong label hides no mate. Costs m x n comparisons a row for
    m fingers of a probe and n of the gallery, in n passes; ten by ten take about twice as long as ten. A call may override it; a join
    cannot."""
    scanned: tuple[str, ...] = ()
    """Columns of embeddings whose every row a search scans, such as `("face", "right_index", "left_index")`; () scans all columns that a probe
    has. The other columns are compared for the candidates alone, so that a search reads less memory and may miss more: `engine.plan(columns)`
    states how much. Rows that share no scanned column with a probe are searched in all its columns. A join scans all columns."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_scanned()
        for name in ("candidates", "finger_rows_max", "returned"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 1")
        if not 0 <= self.miss_risk < 0.5:
            raise InvalidInput(f"miss_risk is {self.miss_risk}, wanted a probability of at least 0 and less than 0.5")
        if not 0 <= self.capture_correlation < 1:
            raise InvalidInput(f"capture_correlation is {self.capture_correlation}, wanted at least 0 and less than 1")

    def _check_scanned(self) -> None:
        unknown = [column for column in self.scanned if column not in COLUMNS]
        if unknown:
            raise InvalidInput(f"scanned names {unknown[0]!r}, which is no column; use {', '.join(COLUMNS)}")
        if len(set(self.scanned)) < len(self.scanned):
            raise InvalidInput(f"scanned is {self.scanned}, wanted each column once")
        if self.scanned and self.miss_risk <= 0:
            raise InvalidInput(
                "scanned leaves columns out, got miss_risk=0, which allows no miss; leave scanned out, or allow a risk such as 0.001"
            )


@dataclass(frozen=True)
class GalleryConfig:
    """When rows move from the journal to sealed segments, when segments are merged, and how many rows a subject keeps."""

    seal_rows: int = 16_384
    """Rows and encounters in the journal, and exact in memory, that are sealed together into a segment."""
    merge_fan: int = 8
    """Neighbouring segments of one size that are merged into one of the next size."""
    background: bool = True
    """Whether a thread of the engine seals and merges. False: only `compact`, `maintain` and bulk loads do."""
    segment_rows: int = 1 << 24
    """Rows from which a segment is not merged further. Bounds the disk space and the time that a merge needs."""
    encounters_max: int = 3
    """Rows (encounters) that a subject keeps, chosen by quality and spread over time. It keeps more if each has a column of its own."""
    index: str | dict[str, str] | None = None
    """The index engine of a gallery that is created: `native`, or `faiss:FACTORY` with a factory string of FAISS, such as
    `faiss:IVF2048,PQ64x4fs`; `,nprobe=N` at its end reads only N inverted lists. A dict names one a column, `*` for all others. None: the
    engine that the gallery stores, `native` in a new one. An existing gallery keeps its engine until `Engine.reindex` changes it; opening
    it with another one raises IndexMismatch."""
    renewable: bool = False
    """Whether a gallery that is created stores embeddings turned by a secret orthogonal transform, which `biodedup key rekey` replaces
    (renewable templates, ISO/IEC 24745). Scores stay. Needs `Config.keys`. An existing gallery stays as it is: with True, opening one that
    has no transform for writing raises InvalidInput."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.index is not None:
            parse_specs(self.index)
        for name, minimum in (("seal_rows", 1), ("merge_fan", 2), ("segment_rows", 1), ("encounters_max", 1)):
            if getattr(self, name) < minimum:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least {minimum}")


@dataclass(frozen=True)
class ClusterConfig:
    """A register on several machines: `Engine.open("postgresql://user@host/database?gallery=register", Config(cluster=ClusterConfig(...)))`."""

    segments: str = ""
    """Where the sealed segments are, for all machines: `file:///folder` (such as NFS) or `s3://bucket/folder`."""
    cache: Path | None = None
    """Folder of this machine's copies of the segments; several front-ends may share it. None: a temporary folder, removed at the end."""
    cache_bytes_max: int = 1 << 40
    """Greatest size of these copies, in bytes. A front-end searches its own copies: all segments have to fit."""
    deadline_ms: int = 10_000
    """For how long a front-end waits to connect to PostgreSQL, and for the other front-ends' commits, before it raises a RetryableError."""
    transaction_ms_max: int = 60_000
    """After which time without a statement PostgreSQL ends a front-end's transaction, so that a stopped process does not hold the others up."""
    poll_ms: int = 100
    """How often a front-end reads what the others committed. Its own commits always do."""
    stale_ms_max: int = 5_000
    """After which time without news from PostgreSQL a search raises a RetryableError, as it may miss people enrolled meanwhile."""
    garbage_grace_s: float = 86_400.0
    """For how long the segment store keeps files that no manifest names any more. Longer than any search, merge or start takes."""

    ray_address: str | None = None
    """Ray cluster whose actors search the sealed segments: `host:port`, `auto` for the one that this machine belongs to, `local` for a new one
    of this process. None: each front-end searches all segments itself."""
    replicas: int = 2
    """How many actors hold each group of segments, on different nodes where there are so many."""
    shard_groups: int = 1
    """How many groups the segments are divided into. All front-ends of a register use the same number."""
    shard_deadline_ms: int = 5_000
    """For how long a front-end waits for one replica's part of a search, before it asks the next one."""
    node_bytes_max: int | None = None
    """How many bytes of what scans read the actors of this register may hold on one node. None, and where a node states less: the memory that
    the node states to Ray (`biodedup cluster up shards --memory`, `ray start --memory`). All front-ends of a register use the same number."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.segments:
            raise InvalidInput("segments is empty, wanted where the segments are: file:///folder or s3://bucket/folder")
        _check(self, 1, inf, "cache_bytes_max", "deadline_ms", "transaction_ms_max", "poll_ms", "stale_ms_max")
        _check(self, 1, inf, "replicas", "shard_groups", "shard_deadline_ms")
        _check(self, 0, inf, "garbage_grace_s")
        if self.node_bytes_max is not None:
            _check(self, 1, inf, "node_bytes_max")


_LABEL_LENGTH_MAX = 40


@dataclass(frozen=True)
class LabelConfig:
    """The register's own words for the four outcomes, in printed lines, pages, and the column `label` of tables. JSON and the column
    `outcome` keep the library's words. Empty: the library's word."""

    unique: str = ""
    """The subject is enrolled."""
    duplicate: str = ""
    """The same person is enrolled under another id."""
    review: str = ""
    """A case waits for a person's verdict."""
    refused: str = ""
    """Captures are missing or cannot be used."""

    def __post_init__(self) -> None:
        check_fields(self)
        for outcome in MEANINGS:
            word = getattr(self, outcome)
            check_text(word, f"label {outcome}", _LABEL_LENGTH_MAX)
            if "\n" in word or word != word.strip():
                raise InvalidInput(f"label {outcome} is {word!r}, wanted one line without spaces around it")
        words = [self.of(outcome) for outcome in MEANINGS]
        if len(set(words)) < len(words):
            raise InvalidInput(
                f"unique, duplicate, review, refused are {', '.join(words)}, wanted four different words"
            )

    def of(self, outcome: str) -> str:
        """The word for an outcome, or for an older status of it (`enrolled`, `adjudicate`); a status of another kind stays as it is."""
        known = outcome_of(outcome)
        return outcome if known is None else getattr(self, known) or known


@dataclass(frozen=True)
class LogConfig:
    """What the loggers `biodedup.*` write; docs/reference/logging.md lists their messages. No setting turns biometric data on."""

    ids: bool = False
    """Whether messages of decisions, verdicts and removals name the encounter_id and subject_id."""
    slow_search_ms: float = 5_000.0
    """A search that takes longer, in milliseconds, with its wait for other searches, is a warning of `biodedup.search`."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self, 0, inf, "slow_search_ms")


@dataclass(frozen=True)
class Config:
    """All settings. See each class for its fields."""

    face: FaceConfig = field(default_factory=FaceConfig)
    finger: FingerConfig = field(default_factory=FingerConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    policy: Policy | None = None
    """The policy of a gallery that is created; None: the default policy. An existing gallery decides by the policy that it stores, and
    opening it with another one raises PolicyMismatch (`Engine.open`)."""
    search: SearchConfig = field(default_factory=SearchConfig)
    gallery: GalleryConfig = field(default_factory=GalleryConfig)
    log: LogConfig = field(default_factory=LogConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    threads: int = 2
    """Threads of extraction, and threads of search. Never guessed from the machine: set it to the number of cores to use."""
    batch_size: int = 32
    """Captures that are embedded together, and encounters that `enroll_many` commits together."""
    isolation: IsolationConfig | None = None
    """None: captures are decoded in this process, within the limits of `capture`. Otherwise they are decoded in `threads` worker processes
    with limits of their own, as jobs and the command line do. A program that sets it guards its main module by
    `if __name__ == "__main__"`."""
    cluster: ClusterConfig | None = None
    """Of a register in PostgreSQL. None: a gallery in a folder. It is not stored with the gallery."""
    keys: KeyProvider | Callable[[], bytes] | None = None
    """Where the register's key comes from, or a function that returns it: 32 bytes. With it a new gallery is encrypted; one that is
    encrypted opens with its key alone, and one that is not opens without a key alone (`KeyMismatch`). Needs the extra `encryption`."""

    subject_keys: Path | None = None
    """Folder outside the gallery and its backups. With it, minutiae that are enrolled from now on are sealed by a key of their row, which is in
    this folder and is destroyed on removal, so that no backup yields them any more. A gallery that has begun so opens with this folder
    alone (`KeyMismatch`). For a gallery in a folder; embeddings are not sealed by it. It is not stored with the gallery. Needs the
    extra `encryption`."""

    identities: dict[str, str] | None = None
    """name -> its roles, separated by spaces (`biodedup.principals.ROLES`), and its public keys, `ed25519:HEX`, which then sign its approvals.
    With it, `by` of verdicts and policies, and `--by`, must be one of
    these names with the role, and `Engine.as_principal` takes these alone. None: `by` is any name. It is not stored with the gallery."""
    audit: str | None = None
    """Which calls the gallery's audit log records, with time, principal, purpose, kind, ids and outcome; nothing biometric, and no scores.
      `none`      none;
      `changes`   calls that change the gallery, in the commit that carries them out;
      `all`       also searches, verifications, reading, and calls that are refused. These wait in memory for up to a second, or for the
                  next change; a crash loses them.
    None: `all` where `identities` are configured, otherwise `changes`. It is not stored with the gallery."""
    allow_template_export: bool | None = None
    """Whether `Engine.templates`, `encounters`, `subject`, FAISS indexes and exports hand out templates. Each time is logged. None: they do, with
    a warning in the log where `identities` or `keys` are configured; a later release will refuse it there. False: NotAllowed."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 1")
        if self.audit is not None and self.audit not in AUDITS:
            raise InvalidInput(f"audit is {self.audit!r}, wanted one of {', '.join(AUDITS)}, or None")
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
        """The principal of a configured name. Raises NotAllowed for another name, InvalidInput for roles that are not known."""
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
        """name of each identity -> its public keys."""
        return {name: self.identity(name).public_keys for name in self.identities or ()}

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Config:
        """The settings of a TOML file with tables `[face]`, `[search]`, ... and the names of these fields; others have their defaults.

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
        """The policy, or the default policy: what applies without a gallery."""
        return self.policy or Policy()

    def with_policy(self) -> Config:
        """The same settings with the default policy in place of None."""
        return replace(self, policy=self.stated_policy)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy with the policy stated and without `cluster`, `keys` and who may use it, as the gallery stores it."""
        stored = asdict(
            replace(self.with_policy(), cluster=None, keys=None, identities=None),
            dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items},
        )
        for name in ("cluster", "keys", "subject_keys", "identities", "allow_template_export", "audit"):
            del stored[
                name
            ]  # where a program finds the gallery and its key, and who may use it, not what the gallery is
        return stored


def _check(settings: object, minimum: float, maximum: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not minimum <= value <= maximum or value == inf:
            wanted = f"at least {minimum}" if maximum == inf else f"{minimum} to {maximum}"
            raise InvalidInput(f"{name} is {value}, wanted {wanted}")


def _check_text(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name):
            raise InvalidInput(f"{name} is empty, wanted a name")
