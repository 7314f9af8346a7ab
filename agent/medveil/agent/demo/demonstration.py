"""One hospital, its images drawn on the spot or the user's own, through the ordinary job of `protect`.

DIR/phantoms/          the drawn source: a folder per class (not with images of one's own)
DIR/phantom.medveil    the bundle
DIR/policy.toml        a policy that trusts this bundle's signer and nobody else
DIR/key.age            a key of the demonstration's own: the site's key is not touched
DIR/release/           what could be shared
DIR/release.private/   what stays
"""

from __future__ import annotations

import io
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image as PillowImage

from medveil.agent.formats import reading_formats
from medveil.agent.imageio import Item, LabelTable, Taxonomy, folder_label, read_label_table, scan
from medveil.agent.job import Watch
from medveil.agent.preparation import Wishes
from medveil.agent.release_job import Call, Release, make_release
from medveil.agent.workspace import LABELS_NAME
from medveil.models.disk import PART_PREFIX, disk_errors, write_atomically
from medveil.models.errors import ConfigurationError
from medveil.models.phantoms import CLASS_NAMES, draw

__all__ = ["Demonstration", "demonstrate", "shipped", "shipped_classes_only"]

_BUNDLE: Final = "phantom.medveil"
_FINGERPRINT: Final = "phantom.fingerprint"
_IMAGES: Final = 40
_SIDE: Final = 64
"""Pixels of a drawn image; twice the surrogates' own size, so that the resize in the loop takes part."""
_SEED: Final = 1
"""Other than that of the surrogates' training images."""

_NOT_SHOWN: Final = (
    "No model was trained on these copies, so this run does not show that they protect: what the coordinator's "
    "victims learned from other drawn images stands above, and only victims trained on your own release can tell "
    "for your images."
)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What a demonstration did.

    Attributes:
        release: as `protect` reports it.
        source: the images that were protected.
        drawn: whether they were drawn here.
        not_shown: what must not be concluded, in a sentence.
    """

    release: Release
    source: Path
    drawn: bool
    not_shown: str = _NOT_SHOWN

    @property
    def report(self) -> dict[str, Any]:
        """Everything there is to say, as JSON values."""
        return {
            **self.release.summary,
            "source": str(self.source),
            "source_is_drawn": self.drawn,
            "not_shown": self.not_shown,
        }


def demonstrate(
    out: Path, data: Path | None, bundle: Path | None, watch: Watch | None = None
) -> Demonstration:
    """Protect drawn phantoms, or labelled images of the user's, in a folder of the demonstration's own.

    Called again it goes on where it stopped, as `protect` does.

    Args:
        out: folder for everything; made if it isn't there.
        data: the user's images; None draws phantoms.
        bundle: surrogates for the user's classes; None takes those shipped with medveil.
        watch: who looks on.

    Raises:
        ConfigurationError: ``demo-bundle``: the shipped surrogates know nothing of the user's classes.
        MedveilError: as `make_release` does.
    """
    folder = out.absolute()
    if data is not None and bundle is None:
        shipped_classes_only(data)
    with disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "policy.toml"
    if bundle is None:
        bundle = folder / _BUNDLE
        write_atomically(bundle, shipped(_BUNDLE))
        signer = shipped(_FINGERPRINT).decode("ascii").strip()
        write_atomically(policy, f'trusted_signers = ["{signer}"]\n'.encode("ascii"))
    else:
        write_atomically(
            policy, b"# The safe defaults; compare the signer's fingerprint with your coordinator's.\n"
        )
    source = data.absolute() if data is not None else _drawn(folder / "phantoms")
    call = Call(source, folder / "release", None, None, Wishes(bundle, policy), folder / "key.age")
    return Demonstration(make_release(call, watch), source, data is None)


def shipped(name: str) -> bytes:
    """Return a file that comes with medveil."""
    return (files("medveil.agent.demo") / name).read_bytes()


def _drawn(folder: Path) -> Path:
    """Draw the phantoms into a folder per class, unless they are there: all of them or none."""
    if folder.is_dir():
        return folder
    images, labels = draw(_IMAGES, np.random.default_rng(_SEED), size=_SIDE)
    with disk_errors(), tempfile.TemporaryDirectory(dir=folder.parent, prefix=PART_PREFIX) as made:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = Path(made, "phantoms", CLASS_NAMES[label], f"{number:03}.png")
            place.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            PillowImage.fromarray(image).save(buffer, "PNG")
            place.write_bytes(buffer.getvalue())
        shutil.move(Path(made, "phantoms"), folder)
    return folder


def shipped_classes_only(data: Path) -> None:
    """Refuse images of other classes than the shipped bundle's: its surrogates could say nothing about them.

    An NPZ holds numbers instead of names, and that a class is called 0 says nothing about what it is.
    """
    taxonomy = Taxonomy(CLASS_NAMES, tuple(range(len(CLASS_NAMES))))
    labels = data / LABELS_NAME
    table = read_label_table(labels) if labels.is_file() else None
    images = [item for item in scan(data, reading_formats()).items if item.frames]
    if images and not all(_is_known(item, table, taxonomy) for item in images):
        raise ConfigurationError(
            "demo-bundle",
            f"The bundle of this demonstration knows only its own drawn images ({', '.join(CLASS_NAMES)}). "
            "Surrogates for your classes come from a coordinator (`medveil-coordinator train` on public images of "
            "the same kind): get its bundle and name it with --bundle.",
        )


def _is_known(item: Item, table: LabelTable | None, taxonomy: Taxonomy) -> bool:
    if item.splittable:
        return False
    label = folder_label(item.relative, taxonomy) if table is None else table.labels.get(item.relative)
    return isinstance(label, str) and taxonomy.named(label) is not None
