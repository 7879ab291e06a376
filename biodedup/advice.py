"""Tells an operator why a capture was refused, and how to repair it.

Owns one sentence for each reason of a `Refusal` that concerns a capture. Never judges a capture.
"""

from __future__ import annotations

from collections.abc import Mapping

ADVICE: Mapping[str, tuple[str, str]] = {
    "truncated": ("the image breaks off or is damaged", "copy it again from where it was captured, or recapture"),
    "missing_file": ("there is no such file", "correct its path"),
    "not_a_file": ("this is no regular file", "name a file"),
    "empty_file": ("the file is empty", "copy it again from where it was captured, or recapture"),
    "unreadable": ("the file cannot be read", "correct its permissions, or copy it again"),
    "not_an_image": ("the file is no image", "name an image, or check its path"),
    "pixel_format": ("the image stores numbers that cannot be read as grey levels or colours", "save it again as PNG"),
    "resolution": ("the ridges do not fit the resolution of the picture", "state the scanner's dpi"),
    "several_pictures": ("the file holds several pictures", "save the right one in a file of its own"),
    "not_in_record": ("the record does not hold this capture", "state a position that it holds"),
    "unsound_record": ("the record is damaged", "write it again, or recapture"),
    "no_face": ("no face was found", "recapture"),
    "several_faces": ("more than one face is in the picture", "recapture with one person alone"),
    "turned_away": ("the face is turned away or tilted", "recapture, looking into the camera"),
    "too_small": ("the picture, or the face in it, is too small", "recapture from a shorter distance"),
    "too_dark": ("the face is too dark", "recapture with more light"),
    "too_bright": ("the face is too bright", "recapture with less light"),
    "blurred": ("the face is out of focus or moved", "recapture, holding still"),
    "eyes_out_of_frame": ("the eyes are outside of the picture", "recapture with the whole face"),
    "negative": ("the face is a negative", "supply the picture itself, or recapture"),
    "noisy": ("the face has too much noise", "recapture with more light, or supply the original file"),
    "pattern": ("lines or dots lie over the face", "supply the picture without watermark or screen, or recapture"),
    "occluded": ("the face is covered", "recapture without mask and dark glasses"),
    "presentation_attack": ("the face is not that of a living person", "capture the person again, under supervision"),
    "untrusted_device": (
        "the verdict of the capture device does not count",
        "capture with a known device, or register its key",
    ),
    "liveness_unproved": (
        "nothing proves that the person is alive",
        "capture with a device that gives a signed verdict",
    ),
    "several_fingers": ("more than one finger is in the picture", "cut the picture into single fingers"),
    "component_limit": ("the picture is too large for NFIQ 2 or the extractor", "crop the picture to the finger"),
    "no_ridges": ("no finger ridges are visible", "clean the scanner, recapture"),
    "too_small_area": ("too little of the finger was on the scanner", "recapture with the whole fingertip"),
    "too_large_area": ("there are more ridges than one finger has", "cut the picture into single fingers"),
    "too_large": ("the finger would be longer than any finger", "state the right dpi"),
    "few_minutiae": ("too few details of the finger are visible", "clean finger and scanner, recapture"),
    "too_few_fingers": ("the encounter has too few fingers", "capture more fingers, or state why they cannot be had"),
    "not_sent": ("a required capture was not sent", "capture it, or state why this is impossible"),
    "low_quality": (
        "the capture is of low quality",
        "recapture: a face in even light, looking into the camera; a finger clean and slightly moist",
    ),
}
"""Reason of a refusal -> (the fault, the remedy)."""


def advice(reason: str, detail: str, measured: float | None, limit: float | None) -> str:
    """A sentence for the operator: the fault, the detail with the measured value and its limit, and the remedy."""
    fault, remedy = ADVICE.get(reason, (reason.replace("_", " "), "see the detail, and recapture"))
    in_detail = measured is not None and detail.startswith(f"{measured:g} ")
    number = "" if measured is None or in_detail else f" {measured:g}" + ("" if limit is None else f", limit {limit:g}")
    explained = f" ({detail}:{number})" if detail and number else f" ({detail})" if detail else ""
    return f"{fault}{explained}; {remedy}"
