"""The file formats that this agent reads and writes, set up for one release or for reading alone."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from medveil.agent.imageio import ImageFormat, raster_formats
from medveil.agent.job import settings_digest
from medveil.agent.policy import WindowSettings
from medveil.agent.preparation import Prepared
from medveil.agent.sealing import SiteKey
from medveil.agent.segmentation import MaskFormat

if TYPE_CHECKING:
    from medveil.agent.imageio import Derivation

__all__ = ["reading_formats", "release_formats"]

_UID_PURPOSE: Final = "medveil DICOM UIDs 1"
_ALONE: Final = "standalone"
"""Stands for the campaign where a site works without a coordinator."""

_DESCRIPTION: Final = "Bounded change of pixel values by medveil against unauthorised training of models"
"""What a protected DICOM object says was done to it."""


def release_formats(prepared: Prepared, key: SiteKey, begun: datetime) -> tuple[ImageFormat, ...]:
    """Return every file format, in the order in which they are asked, to write one release with.

    Args:
        prepared: bundle, policy and budget; all that changes the output goes into the new UIDs.
        key: the site's; without it nobody can link the new UIDs to the old ones.
        begun: when the release was begun, local time.
    """
    from medveil.agent.imageio import Derivation, DerivedUids

    policy = prepared.policy
    uids = DerivedUids(key.secret_for(_UID_PURPOSE), _ALONE, settings_digest(prepared.settings))
    derivation = Derivation(uids, begun, _DESCRIPTION, version("medveil"), name_source=policy.name_source)
    return _formats(derivation, policy.windows)


def reading_formats(windows: WindowSettings | None = None) -> tuple[ImageFormat, ...]:
    """Return every file format, to list, show or restore with; nothing is released with them.

    Args:
        windows: the policy's, where it matters what an image looks like.
    """
    from medveil.agent.imageio import Derivation, DerivedUids

    nobody = Derivation(DerivedUids(bytes(16), "", ""), datetime.min, "", "")
    return _formats(nobody, windows or WindowSettings())


def _formats(derivation: Derivation, windows: WindowSettings) -> tuple[ImageFormat, ...]:
    from medveil.agent.imageio import DicomFormat, NiftiFormat, WindowPolicy
    from medveil.agent.imageio.dicom_window import DEFAULT_PRESETS, Choice

    percentiles = windows.percentiles if windows.may_guess else None
    dicom = WindowPolicy(Choice(windows.choice), {**DEFAULT_PRESETS, **windows.presets}, percentiles)
    # DICOM first: the preamble of a slide may be the head of a TIFF that shares its pixels (PS3.10 7.1).
    return (
        DicomFormat(derivation, dicom),
        NiftiFormat(windows.nifti, percentiles),
        *raster_formats(),
        MaskFormat(),
    )
