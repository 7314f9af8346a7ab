"""Reading images into one frozen value, and writing changed stored values back, whatever the file format.

The hospital formats are loaded on first use: pydicom and nibabel cost more memory and time than a command that
reads no image should take.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from medveil.agent.imageio.base import Frames, ImageFormat, Item, Quarantined
from medveil.agent.imageio.full_range import FullRange
from medveil.agent.imageio.image import Image, Label, ReleaseWindow, StoredArray, pixel_digest
from medveil.agent.imageio.labels import LabelTable, Taxonomy, folder_label, read_label_table
from medveil.agent.imageio.npz import NpzFormat
from medveil.agent.imageio.raster import JpegFormat, PngFormat
from medveil.agent.imageio.source import Listing, scan
from medveil.agent.imageio.tiff import TiffFormat

if TYPE_CHECKING:
    from medveil.agent.imageio.derived import Derivation
    from medveil.agent.imageio.dicom import DicomFormat
    from medveil.agent.imageio.dicom_window import WindowPolicy
    from medveil.agent.imageio.nifti import NiftiFormat
    from medveil.agent.imageio.uid import DerivedUids

__all__ = [
    "Derivation",
    "DerivedUids",
    "DicomFormat",
    "Frames",
    "FullRange",
    "Image",
    "ImageFormat",
    "Item",
    "JpegFormat",
    "Label",
    "LabelTable",
    "Listing",
    "NiftiFormat",
    "NpzFormat",
    "PngFormat",
    "Quarantined",
    "ReleaseWindow",
    "StoredArray",
    "Taxonomy",
    "TiffFormat",
    "WindowPolicy",
    "folder_label",
    "pixel_digest",
    "raster_formats",
    "read_label_table",
    "scan",
]

_LOADED_ON_USE: Final = {
    "Derivation": "derived",
    "DerivedUids": "uid",
    "DicomFormat": "dicom",
    "NiftiFormat": "nifti",
    "WindowPolicy": "dicom_window",
}


def __getattr__(name: str) -> Any:
    """Load a hospital format when it is first asked for (PEP 562)."""
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LOADED_ON_USE[name]}"), name)


def raster_formats() -> tuple[ImageFormat, ...]:
    """Return the formats that need no settings of the site: PNG, JPEG, TIFF and NPZ."""
    return (PngFormat(), JpegFormat(), TiffFormat(), NpzFormat())
