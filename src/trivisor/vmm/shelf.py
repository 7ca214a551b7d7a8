"""The images of a home as its machines' records have to do with them: what is noted there, and what machines need."""

from __future__ import annotations

from trivisor.core.paths import Home
from trivisor.images.catalog import Images
from trivisor.vmm.records import Records


def images(place: Home, records: Records) -> Images:
    """Return the images of the home."""
    return Images(
        place,
        noted=lambda image: records.note("image-imported", f"{image.name} from {image.source}"),
        needs=lambda: {row.digest for row in records.rows()},
    )
