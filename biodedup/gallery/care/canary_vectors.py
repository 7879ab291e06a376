"""Stores the probes of canaries with the gallery's transform (renewable templates).

Owns this change of their file (jobs/health/canary_file.py). Never makes a canary.
"""

from __future__ import annotations

from pathlib import Path

from biodedup.errors import GalleryDamaged
from biodedup.gallery.files.column_file import Stream, open_column_file, write_column_file
from biodedup.gallery.files.encryption.transform import Transform, transform_id_of
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.names import CANARIES_NAME

VECTOR = ".vector"
"""The end of the names of arrays that hold probes; before it stands the column."""


def rekey_canaries(storage: Storage, folder: Path, transform: Transform | None) -> None:
    """Turns them back by the transform that the file names, and by this one. Damaged ones are removed: `doctor --canaries` makes others."""
    if CANARIES_NAME not in (storage.list_names(folder) or ()):
        return
    path = folder / CANARIES_NAME
    try:
        file = open_column_file(storage, path)
        before = str(file.about.get("turn", ""))
        if before == transform_id_of(transform):
            return
        known = storage.transform(path, before) if before else None
        arrays = {name: file.read(name).copy() for name in file.names}
    except GalleryDamaged:
        storage.remove(path)
        storage.sync_folder(folder)
        return
    for name in arrays:
        if name.endswith(VECTOR):
            column = name.removesuffix(VECTOR)
            vectors = arrays[name] if known is None else known.of(column).invert(arrays[name])
            arrays[name] = vectors if transform is None else transform.of(column).apply(vectors)
    about = {key: value for key, value in file.about.items() if key != "turn"}
    about |= {} if transform is None else {"turn": transform.transform_id}
    streams = [Stream(name, array.dtype.str, array.shape, [array]) for name, array in arrays.items()]
    file.close()
    write_column_file(storage, path, about, streams, replaces=True)
    storage.sync_folder(folder)
