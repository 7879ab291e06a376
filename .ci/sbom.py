"""Adds the models to a software bill of materials: sbom.py PACKAGES.json MODELS OUT.json.

Each file of weights is a component of the type machine-learning-model, with the digest, the licence and the source that
its card states. Runs where cyclonedx-bom is installed.
"""

import json
import sys
import tomllib
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator


def component(card: dict) -> dict:
    weights = card["weights"]
    licence, _, copyright_lines = card["licence"].partition(", ")
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{card['model_id']}",
        "name": card["name"],
        "version": card["model_id"],
        "description": f"{card['kind']}: {weights['file']}; source: {card['source']}",
        "hashes": [{"alg": "SHA-256", "content": weights["sha256"]}],
        "licenses": [{"license": {"id": licence}}],
    } | ({"copyright": copyright_lines} if copyright_lines else {})


def main(packages: Path, models: Path, out: Path) -> None:
    bill = json.loads(packages.read_text(encoding="utf-8"))
    cards = [tomllib.loads(card.read_text(encoding="utf-8")) for card in sorted(models.glob("*.toml"))]
    bill["components"] += [component(card) for card in cards if "weights" in card]
    text = json.dumps(bill, indent=1, sort_keys=True) + "\n"
    version = SchemaVersion.from_version(bill["specVersion"])
    error = JsonStrictValidator(version).validate_str(text)
    if error is not None:
        sys.exit(f"the bill of materials is not CycloneDX {bill['specVersion']}: {str(error)[:500]}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{out.name}: {len(bill['components'])} components\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
