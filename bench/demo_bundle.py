"""Make the bundle that ``medveil-agent demo`` ships with: two small surrogates of drawn phantoms, really trained.

    python bench/demo_bundle.py [--work DIR]

It runs the use case behind ``medveil-coordinator train`` with an ensemble of two, because the file travels in every
installation. The signing key is made for this one file and not kept: nobody can sign a second bundle with it, and the
demonstration trusts no other. What the noise did to victims stands in the bundle's manifest, as for any other.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.coordinator.train import TrainRequest, train
from medveil.models.bundle import fingerprint
from medveil.models.phantoms import CLASS_NAMES, draw
from medveil.models.training import DEFAULT_PLAN, Member

PACKAGED = Path(__file__).resolve().parents[1] / "agent/medveil/agent/demo"
IMAGES = 2000
SIDE = 32
DRAWING_SEED = 20261121
"""Other than the demonstration's: the surrogates have never seen the images that it protects."""
MEMBERS = (Member(name="resnet", architecture="resnet"), Member(name="vgg", architecture="vgg"))
"""Written out here because the file's size depends on them, whatever the product's plan becomes: 50,000 weights."""
LARGEST_BYTES = 400_000


class Lines:
    """Prints each stage on a line."""

    def stage(self, text: str) -> None:
        """Print what began."""
        print(text, flush=True)

    def advance(self, seconds: float) -> None:
        """Say nothing."""


def make(work: Path) -> Path:
    """Draw, train, sign and install the bundle; return where it lies."""
    images, labels = draw(IMAGES, np.random.default_rng(DRAWING_SEED), size=SIDE)
    data, bundle = work / "phantoms.npz", work / "phantom.medveil"
    np.savez_compressed(data, train_images=images, train_labels=labels[:, None])
    key = Ed25519PrivateKey.generate()
    request = TrainRequest(
        data=data,
        out=bundle,
        created=datetime.now(UTC).replace(microsecond=0),
        class_names=CLASS_NAMES,
        name="drawn phantoms",
        source_statement=f"{IMAGES} images drawn by medveil.models.phantoms, seed {DRAWING_SEED}; no patient data",
    )
    manifest = train(request, key, lambda seconds: Lines(), replace(DEFAULT_PLAN, members=MEMBERS))
    if bundle.stat().st_size > LARGEST_BYTES:
        sys.exit(
            f"The bundle has {bundle.stat().st_size} bytes; {LARGEST_BYTES} may travel in every installation."
        )
    if manifest.proxy_check is None or not manifest.proxy_check.effective:
        sys.exit("The noise was not shown to protect; train on more images before this is shipped.")
    PACKAGED.mkdir(exist_ok=True)
    shutil.copyfile(bundle, PACKAGED / bundle.name)
    (PACKAGED / "phantom.fingerprint").write_text(fingerprint(key.public_key()) + "\n", encoding="ascii")
    return PACKAGED / bundle.name


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="where an interrupted training is continued")
    work = parser.parse_args().work
    with tempfile.TemporaryDirectory() as folder:
        place = work or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        print(make(place))


if __name__ == "__main__":
    main()
