"""One call of the main job from end to end: prepare, protect, draw the contact sheet, sum up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medveil.agent.contact_sheet import Marks, write_contact_sheet
from medveil.agent.formats import release_formats
from medveil.agent.imageio import ImageFormat
from medveil.agent.job import Job, Outcome, Watch
from medveil.agent.ledger import Ledger
from medveil.agent.preparation import Prepared, Wishes, engine_options, prepare
from medveil.agent.protect import protect
from medveil.agent.sealing import SiteKey, load_site_key
from medveil.agent.segmentation import MaskedPerturber
from medveil.agent.summary import summary
from medveil.agent.workspace import Workspace, private_beside
from medveil.models.disk import write_atomically
from medveil.models.errors import InputError

if TYPE_CHECKING:
    from medveil.agent.segmentation.site_check import MaskedSiteCheck
    from medveil.agent.victim_check import SiteCheck

__all__ = ["Call", "Release", "ledger_of", "make_release", "recorded_call"]


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked for on the command line.

    Attributes:
        source: the site's images.
        out: the release folder.
        private: the private folder; None puts it beside the release.
        labels_file: labels CSV; None looks for one in the source.
        wishes: bundle, policy, budget, device.
        key_file: key of this release; None takes the site's own.
    """

    source: Path
    out: Path
    private: Path | None
    labels_file: Path | None
    wishes: Wishes
    key_file: Path | None = None

    def recorded(self) -> dict[str, str | float | None]:
        """Return the call as JSON values with absolute paths, so that it can be repeated from anywhere."""
        wishes = self.wishes
        return {
            "source": str(self.source.absolute()),
            "labels_file": None if self.labels_file is None else str(self.labels_file.absolute()),
            "bundle": str(wishes.bundle.absolute()),
            "policy": None if wishes.policy is None else str(wishes.policy.absolute()),
            "epsilon": wishes.epsilon,
            "mask": wishes.mask,
            "device": wishes.device,
            "threads": wishes.threads,
            "noise": wishes.noise,
            "key_file": None if self.key_file is None else str(self.key_file.absolute()),
        }


@dataclass(frozen=True, slots=True)
class Release:
    """What came of a call.

    Attributes:
        summary: everything there is to say, as JSON values.
        key: the site's key; ``created`` if this call made it.
    """

    summary: dict[str, object]
    key: SiteKey


def make_release(
    call: Call,
    watch: Watch | None = None,
    *,
    retry: Callable[[str], bool] = lambda reason: False,
    now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
) -> Release:
    """Protect a source and leave summary and contact sheet in the private folder.

    Args:
        call: what is asked for.
        watch: who looks on.
        retry: for which quarantine reasons another try is made.
        now: clock that says when a new release begins; one that is continued keeps its moment.

    Raises:
        MedveilError: as `prepare` and `protect` do.
    """
    prepared = _prepared(call)
    key = load_site_key(call.key_file, create=True)
    begun = _begun(call) or now()
    formats = release_formats(prepared, key, begun)
    outcome = protect(_job(call, prepared, key, formats, begun), watch, retry=retry)
    report = summary(
        outcome,
        prepared,
        _contact_sheet(call, prepared, outcome, formats),
        _recorded_check(outcome.workspace, masked=prepared.class_map is not None),
    )
    write_atomically(outcome.workspace.summary, json.dumps(report, indent=2).encode(), mode=0o600)
    return Release(report, key)


def _prepared(call: Call) -> Prepared:
    prepared = prepare(call.wishes)
    if not prepared.policy.local_adaptation:
        return prepared
    from medveil.agent.adaptation import with_adapted_surrogates

    return with_adapted_surrogates(
        prepared, call.source, call.out, call.private, call.labels_file, engine_options(call.wishes)
    )


def _recorded_check(workspace: Workspace, *, masked: bool) -> SiteCheck | MaskedSiteCheck | None:
    """Return the site's own check, if it is about the release as it is now."""
    with Ledger(workspace.ledger_path) as ledger:
        if masked:
            from medveil.agent.segmentation.site_check import recorded_masked_check

            return recorded_masked_check(workspace, ledger)
        from medveil.agent.victim_check import recorded_check  # SciPy: only a job that has run waits for it

        return recorded_check(workspace, ledger)


def _begun(call: Call) -> datetime | None:
    workspace = Workspace(call.out, call.private or private_beside(call.out))
    if not workspace.ledger_path.is_file():
        return None
    with Ledger(workspace.ledger_path) as ledger:
        return ledger.begun()


def _job(
    call: Call, prepared: Prepared, key: SiteKey, formats: tuple[ImageFormat, ...], begun: datetime
) -> Job:
    return Job(
        source=call.source,
        release=call.out,
        private=call.private,
        labels_file=call.labels_file,
        formats=formats,
        allows_format=prepared.policy.allows_format,
        taxonomy=prepared.taxonomy,
        perturber=prepared.perturber,
        budget=prepared.budget,
        minimum_psnr_db=prepared.policy.minimum_psnr_db,
        recipients=(key.recipient, *prepared.policy.recipients),
        settings=prepared.settings,
        begun=begun,
        invocation=call.recorded(),
        class_map=prepared.class_map,
    )


def _contact_sheet(
    call: Call, prepared: Prepared, outcome: Outcome, formats: tuple[ImageFormat, ...]
) -> Path | None:
    root = call.source if call.source.is_dir() else call.source.parent
    names, marks = prepared.taxonomy.names, _marks(prepared, outcome)
    with Ledger(outcome.workspace.ledger_path) as ledger:
        drawn = write_contact_sheet(outcome.workspace, ledger, root, formats, names, marks)
    return outcome.workspace.contact_sheet if drawn else None


def _marks(prepared: Prepared, outcome: Outcome) -> Marks | None:
    perturber, annotations = prepared.perturber, outcome.annotations
    if not isinstance(perturber, MaskedPerturber) or annotations is None:
        return None
    return Marks(perturber.marks, lambda item, image: perturber.marked_in(annotations.label_map(item, image)))


def ledger_of(release: Path, private: Path | None) -> Ledger:
    """Open the ledger of an existing job.

    Raises:
        InputError: ``no-private-folder``: there is none.
    """
    workspace = Workspace(release, private or private_beside(release))
    if not workspace.ledger_path.is_file():
        raise InputError(
            "no-private-folder", "There is no ledger there; name the private folder with --private."
        )
    return Ledger(workspace.ledger_path)


def recorded_call(release: Path, private: Path | None) -> Call:
    """Return the last call of an existing job, to be made again.

    Raises:
        InputError: ``no-private-folder``, or ``no-call``: it was never started.
    """
    with ledger_of(release, private) as ledger:
        text = ledger.meta("invocation")
    if text is None:
        raise InputError("no-call", "This job was never started; run `medveil-agent protect`.")
    call: Mapping[str, Any] = json.loads(text)
    return Call(
        source=Path(call["source"]),
        out=release,
        private=private,
        labels_file=_path(call["labels_file"]),
        wishes=Wishes(
            bundle=Path(call["bundle"]),
            policy=_path(call["policy"]),
            epsilon=call["epsilon"],
            mask=call["mask"],
            device=call["device"],
            threads=call["threads"],
            noise=call.get("noise", "optimised"),  # calls recorded before there was a choice
        ),
        key_file=_path(call.get("key_file")),  # likewise
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
