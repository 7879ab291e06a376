"""`evaluate`: measures error rates on labelled captures or templates, in the terms of ISO/IEC 19795-1.

Owns the job from a labelled source to the result files. `comparisons.py` chooses the pairs, and `figures.py` computes the rates.

1. An *encounter* is the unit of comparison: the captures with one encounter_id of a manifest, or otherwise one file or row.
2. The job writes OUT.json, and the tables OUT.pairs.parquet, OUT.searches.parquet and OUT.encounters.parquet.
3. Every rate is stated twice: for the encounters that could be compared, and with each failure to enrol counted as a miss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biodedup.common.described import Described
from biodedup.common.intervals import CONFIDENCE
from biodedup.config import Config, IsolationConfig
from biodedup.errors import InvalidInput
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.evaluation import plots
from biodedup.jobs.evaluation.comparisons import Comparisons, compare_all
from biodedup.jobs.evaluation.figures import Figures
from biodedup.jobs.evaluation.labelled import Labelled, extracted, read_labelled
from biodedup.jobs.evaluation.rates import Resampling
from biodedup.jobs.evaluation.report import write_report
from biodedup.jobs.evaluation.tables import tables_of
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.output import write_table
from biodedup.jobs.shared.progress import Progress, silent

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Evaluation(Described):
    """The result of an evaluation. document: the content of the JSON file; comparisons: the compared pairs and searches."""

    document: dict[str, Any]
    comparisons: Comparisons

    def to_dict(self) -> dict[str, Any]:
        """The document."""
        return self.document


def evaluate(
    source: Path,
    out: Path,
    config: Config | None = None,
    *,
    report: Path | None = None,
    finger: bool = False,
    dpi: float | None = None,
    model_id: str | Mapping[str, str] | None = None,
    seed: int = 0,
    replicates: int = 1000,
    nonmated_max: int = 2_000_000,
    pictures: int = 12,
    options: TableOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
    clock: Callable[[], float] = time.time,
) -> Evaluation:
    """Measures error rates on labelled data. Writes `out` (.json) and three tables beside it, and optionally an HTML report.

    source: a folder with a subfolder for each subject, a manifest, or a Parquet file of templates. report: path of the report; None writes
    none. finger: the images of a folder are fingers, with a resolution of `dpi`. model_id: the model of the embeddings in a Parquet file, one id
    for all or a mapping by column. seed: of the bootstrap and of the sample of pairs. replicates: bootstrap replicates. nonmated_max: more
    impostor pairs are sampled. pictures: number of the worst pairs in the report. Raises InvalidInput, StorageUnavailable.
    """
    if out.suffix != ".json":
        raise InvalidInput(f"the result cannot be named {out.name}; end the name with .json")
    if report is not None:
        plots.require()
    config = config or Config(isolation=IsolationConfig())
    found, left_out = read_labelled(source, config, finger=finger, dpi=dpi, model_id=model_id, options=options)
    make_private_folder(out.parent)
    found = extracted(found, config, out.with_name(out.name + ".work"), progress)
    result = evaluate_encounters(
        found,
        config,
        source=str(source),
        made_at=clock(),
        seed=seed,
        replicates=replicates,
        nonmated_max=nonmated_max,
        progress=progress,
    )
    result.document["left_out"] = left_out.to_dict()
    for name, table in tables_of(result.comparisons).items():
        write_table(table, out.with_name(f"{out.stem}.{name}.parquet"))
    if report is not None:
        write_report(result.document, result.comparisons.encounters, report, config, pictures)
    write_json(result.document, out)
    return result


def evaluate_encounters(
    encounters: Sequence[Labelled],
    config: Config,
    *,
    source: str,
    made_at: float,
    seed: int = 0,
    replicates: int = 1000,
    nonmated_max: int = 2_000_000,
    progress: Progress = silent,
) -> Evaluation:
    """Compares encounters that have templates, and computes all figures. Writes no file."""
    import biodedup

    rng = np.random.default_rng(seed)
    compared = compare_all(encounters, config, rng, nonmated_max=nonmated_max, progress=progress)
    figures = Figures(compared, config.stated_policy, Resampling(int(compared.subject.max()) + 1, replicates, rng))
    document = {
        "kind": "biodedup-evaluation",
        "schema": SCHEMA,
        "biodedup": biodedup.__version__,
        "made_at": made_at,
        "source": source,
        "settings": {
            "models": dict(compared.models),
            "policy": asdict(config.stated_policy),
            "seed": seed,
            "replicates": replicates,
            "confidence": CONFIDENCE,
            "nonmated_max": nonmated_max,
        },
        "counts": figures.sizes(),
        "failure_to_enrol": figures.failure_to_enrol(),
        "verification": figures.verification(),
        "alone": figures.alone(),
        "calibration": figures.calibration(),
        "identification": figures.identification(),
        "groups": figures.groups(),
        "worst": figures.worst(),
    }
    progress("counting", 1, 1)
    return Evaluation(document, compared)
