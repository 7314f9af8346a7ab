"""The site's policy: a small TOML file, or safe defaults without one.

maximum_epsilon = 8.0                      # in 1/255 of the release window
maximum_mask = 1.0                         # share of an image's pixels that may change
allowed_methods = ["salm"]
trusted_signers = ["ed25519:..."]          # without this line any intact signature is shown, not refused
minimum_psnr_db = 28.0
formats = ["png", "jpeg", "tiff", "npz", "dicom", "nifti"]
recipients = ["age1..."]                   # who, beside this site, may open the sealed originals
local_adaptation = false                   # whether surrogates learn from this site's images first
name_source = true                         # whether a protected DICOM object names its source by UID

[windows]                                  # the display windows in which the budget is counted
choice = "declared"                        # what the files declare; or "presets", or "both"
presets = { CT = [[40, 400]] }             # centre and width by DICOM modality, where files declare none
nifti = [-160, 240]                        # lower and upper end for volumes, in scaled units (HU)
may_guess = true                           # false: refuse files for which none of these gives a window
percentiles = [0.5, 99.5]                  # the guess: between these percentiles of the values

[classes]                                  # this site's name of a class, or stored label -> the bundle's class
"healthy" = "NORMAL"

[egress]                                   # what may leave the site; without this table, nothing
minimum_group_size = 10                    # images; a figure over fewer is withheld

[egress.noise]                             # what leaves is blurred (`medveil.agent.reporting_policy`)
epsilon_per_report = 0.5
epsilon_total = 2.0

The tables [coordinator] and [campaigns] are described in `medveil.agent.policy.campaign_policy`, [segmentation] in
`medveil.agent.policy.segmentation_policy`, [pacs] in `medveil.agent.pacs_policy`.
"""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import pyrage
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from medveil.agent.pacs_policy import PacsPolicy
from medveil.agent.policy.campaign_policy import CampaignPolicy, CoordinatorAddresses
from medveil.agent.policy.segmentation_policy import SegmentationPolicy
from medveil.agent.reporting_policy import ReportingPolicy
from medveil.models.bundle import Fingerprint, parse_fingerprint
from medveil.models.errors import ConfigurationError

__all__ = ["SitePolicy", "WindowSettings", "load_policy", "narrowed"]

_CUSTOMARY_EPSILON: Final = 8.0
"""The budget of the literature (8/255); a site that has said nothing allows no more than that."""

_VISIBLE_PSNR_DB: Final = 25.0
"""Below this a reader sees the change at a glance; our choice, 5 dB under full-frame noise of 8/255."""


def _fingerprint(text: object) -> Fingerprint:
    """Return a signer's fingerprint in canonical form, however the steward typed it."""
    try:
        return parse_fingerprint(str(text))
    except ConfigurationError as exc:
        raise ValueError(exc.public) from exc


def _recipient(text: str) -> str:
    """Return an age public key as it is; refuse what is none before anything is sealed for it."""
    try:
        pyrage.x25519.Recipient.from_str(text)
    except pyrage.RecipientError as exc:
        raise ValueError("this is no age public key (age1...)") from exc
    return text


_Width = Annotated[float, Field(ge=1, allow_inf_nan=False)]  # PS3.3 C.11.2.1.2.1: a linear window's smallest
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=100)]


class WindowSettings(BaseModel):
    """In which display windows the budget is counted; frozen, unknown keys refused.

    Attributes:
        choice: ``declared``: every window that a DICOM file declares, the preset where it declares none;
            ``presets``: the preset, the declared ones for modalities without; ``both``: all of them at once.
        presets: centre and width by DICOM modality, in the modality's unit; added to medveil's own
            (CT 40/400), or in place of them.
        nifti: lower and upper end for NIfTI volumes, in scaled units; None takes percentiles.
        may_guess: whether a file for which nothing gives a window is counted between percentiles of its own
            values; otherwise it is quarantined as ``no-window``.
        percentiles: the guess, in [0, 100].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: Literal["declared", "presets", "both"] = "declared"
    presets: dict[str, tuple[tuple[_Finite, _Width], ...]] = Field(default_factory=dict)
    nifti: tuple[_Finite, _Finite] | None = None
    may_guess: bool = True
    percentiles: tuple[_Share, _Share] = (0.5, 99.5)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        for name, ends in (("nifti", self.nifti), ("percentiles", self.percentiles)):
            if ends is not None and not ends[0] < ends[1]:
                raise ValueError(f"{name}: the first number must be below the second")
        return self


class SitePolicy(BaseModel):
    """What the site allows; frozen, unknown keys refused, every default safe.

    Attributes:
        maximum_epsilon: largest budget that a call or a bundle may ask for, in 1/255 of the release window.
        maximum_mask: largest share of an image's pixels that may change.
        allowed_methods: names of the methods that may run.
        trusted_signers: fingerprints of the coordinators whose bundles may be used; None accepts any intact
            signature, and the screen shows whose it is.
        minimum_psnr_db: an image that the change would push below this is not released.
        formats: file formats that are protected; others are quarantined. None: all that medveil reads.
        recipients: further age recipients of the sealed originals (a safe place for a second key).
        windows: in which display windows the budget is counted.
        classes: this site's name of a class, or its stored label as text -> the bundle's class.
        segmentation: names of structures, and what to do with unproven noise.
        local_adaptation: whether a bundle's surrogates learn from this site's images before they make its noise
            (`medveil.agent.adaptation`). Where it was measured, it protected no better.
        name_source: whether a protected DICOM object names its source by UID; off where a release must not be
            linkable to the archive.
        egress: what figures may leave; None: nothing leaves.
        coordinator: whom this site joined; None: it works alone.
        campaigns: over which images campaigns may run; None: over none.
        pacs: the door to the hospital's own PACS; None: it stays shut.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    maximum_epsilon: Annotated[float, Field(gt=0, le=255)] = _CUSTOMARY_EPSILON
    maximum_mask: Annotated[float, Field(gt=0, le=1)] = 1.0
    allowed_methods: tuple[str, ...] = (
        "salm",
        "tap",
        "em",
        "umed",
        "umed-plus",
        "umed-targeted",
        "voxshield",
        "grating",
        "grating-coarse",
        "grating-volume",
    )
    trusted_signers: tuple[Annotated[Fingerprint, BeforeValidator(_fingerprint)], ...] | None = None
    minimum_psnr_db: Annotated[float, Field(ge=0, le=100)] = _VISIBLE_PSNR_DB
    formats: tuple[str, ...] | None = None
    recipients: tuple[Annotated[str, AfterValidator(_recipient)], ...] = ()
    windows: WindowSettings = WindowSettings()
    classes: dict[str, str] = Field(default_factory=dict)
    segmentation: SegmentationPolicy = SegmentationPolicy()
    local_adaptation: bool = False
    name_source: bool = True
    egress: ReportingPolicy | None = None
    coordinator: CoordinatorAddresses | None = None
    campaigns: CampaignPolicy | None = None
    pacs: PacsPolicy | None = None

    @model_validator(mode="after")
    def _noise_covers_each_image(self) -> Self:
        if self.local_adaptation and self.egress is not None and self.egress.noise is not None:
            raise ValueError(
                "with local_adaptation every image changes what becomes of the others, and [egress.noise] covers only"
                " the one; choose one of the two"
            )
        return self

    def digest(self) -> str:
        """Return the SHA-256 of all that shapes a release, as hex; who hears of it and when does not."""
        beside = {"egress", "coordinator", "campaigns", "pacs"}
        return hashlib.sha256(self.model_dump_json(exclude=beside).encode()).hexdigest()

    def check_method(self, name: str) -> None:
        """Refuse a method that the site doesn't allow.

        Raises:
            ConfigurationError: ``method-not-allowed``.
        """
        if name not in self.allowed_methods:
            raise ConfigurationError(
                "method-not-allowed",
                f"The bundle asks for the method {name!r}, which this site's policy does not allow.",
            )

    def allows_format(self, name: str) -> bool:
        """Return whether files of a format may be protected."""
        return self.formats is None or name in self.formats


def load_policy(path: Path | None) -> SitePolicy:
    """Read a policy file; None gives the safe defaults.

    Raises:
        ConfigurationError: ``policy-unreadable`` or ``policy``: the file is refused as a whole, never
            in part.
    """
    if path is None:
        return SitePolicy()
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(
            "policy-unreadable", "The policy file cannot be read as TOML; correct it.", private=str(exc)
        ) from exc
    try:
        return SitePolicy.model_validate(settings)
    except ValidationError as exc:
        faults = "; ".join(map(_fault, exc.errors()))
        raise ConfigurationError("policy", f"The policy file is not valid ({faults}); correct it.") from exc


def _fault(error: ErrorDetails) -> str:
    """Return where a mistake is and what it is; one that concerns several tables has no place of its own."""
    place, what = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    return f"{place}: {what}" if place else what


def narrowed(name: str, asked: float | None, recipe: float, limit: float) -> float:
    """Return the value to use: what the call asks for, else the recipe's, within what the policy allows.

    A call that asks for more than the policy allows is refused, because the steward should know. A
    recipe that does is narrowed: the coordinator's default is a proposal.

    Raises:
        ConfigurationError: ``epsilon`` or ``mask``: the asked value is out of range.
    """
    if asked is None:
        return min(recipe, limit)
    if not 0 < asked <= limit:
        raise ConfigurationError(
            name, f"--{name} must be above 0 and at most {limit:g}, which is what this site's policy allows."
        )
    return asked
