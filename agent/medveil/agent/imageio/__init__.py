"""Reading images into one frozen value, and writing changed stored values back, whatever the file format."""

from __future__ import annotations

from medveil.agent.imageio.base import Frames, ImageFormat, Item, Quarantined
from medveil.agent.imageio.image import FullRange, Image, Label, ReleaseWindow, StoredArray, pixel_digest
from medveil.agent.imageio.labels import LabelTable, Taxonomy, folder_label, read_label_table
from medveil.agent.imageio.npz import NpzFormat
from medveil.agent.imageio.raster import JpegFormat, PngFormat
from medveil.agent.imageio.source import Listing, scan
from medveil.agent.imageio.tiff import TiffFormat

__all__ = [
    "Frames",
    "FullRange",
    "Image",
    "ImageFormat",
    "Item",
    "JpegFormat",
    "Label",
    "LabelTable",
    "Listing",
    "NpzFormat",
    "PngFormat",
    "Quarantined",
    "ReleaseWindow",
    "StoredArray",
    "Taxonomy",
    "TiffFormat",
    "folder_label",
    "pixel_digest",
    "raster_formats",
    "read_label_table",
    "scan",
]


def raster_formats() -> tuple[ImageFormat, ...]:
    """Return the formats that need no settings of the site: PNG, JPEG, TIFF and NPZ."""
    return (PngFormat(), JpegFormat(), TiffFormat(), NpzFormat())
