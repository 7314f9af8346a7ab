"""``medveil bundle inspect|verify``: what a bundle says and who signed it, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from medveil.models.autodiff.sandbox import admit_in_child
from medveil.models.bundle import (
    Bundle,
    Fingerprint,
    Manifest,
    ProxyCheck,
    SegmentationCheck,
    fingerprint,
    load_public_key,
    open_bundle,
    overlap_sentences,
    parse_fingerprint,
)
from medveil.models.cli_support import (
    FormatOption,
    OutputFormat,
    VersionOption,
    new_app,
    print_json,
    printable,
    run_command,
    stdout_console,
)
from medveil.models.errors import ExitCode

__all__ = ["Summary", "describe", "main", "print_summary"]

app = new_app("Looks at what medveil's sites and coordinators exchange.")
_bundle = new_app("Bundles: what a coordinator signs and a site runs.")
app.add_typer(_bundle, name="bundle")

_BundleFile = Annotated[Path, typer.Argument(metavar="FILE", help="The bundle.")]
_TrustedKeys = Annotated[
    list[Path] | None,
    typer.Option("--trusted-key", help="Public key (PEM) of a signer to accept. Repeatable."),
]
_TrustedSigners = Annotated[
    list[str] | None,
    typer.Option("--trusted-signer", help="Fingerprint of a signer to accept. Repeatable."),
]

_IN_WORDS = "in_words"
Summary = dict[str, object]
"""What a table and a JSON object show alike: plain values, groups of them, and lists of equal groups."""


@app.callback()
def _options(version: VersionOption = False) -> None:
    """Take the options that belong to no command."""


@_bundle.command("inspect")
def _inspect(
    file: _BundleFile,
    trusted_key: _TrustedKeys = None,
    trusted_signer: _TrustedSigners = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Show what is in a bundle. Its signature must be intact."""
    trusted = _trusted(trusted_key, trusted_signer)
    summary = describe(open_bundle(file, trusted=trusted), signer_trusted=trusted is not None)
    if output is OutputFormat.JSON:
        print_json(summary)
    else:
        print_summary(summary)
    return ExitCode.OK


@_bundle.command("verify")
def _verify(
    file: _BundleFile,
    trusted_key: _TrustedKeys = None,
    trusted_signer: _TrustedSigners = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Check a bundle as a site would: signature, digests, golden vectors, and the admission of every graph.

    Exit code 5 when one of them is refused.
    """
    trusted = _trusted(trusted_key, trusted_signer)
    bundle = open_bundle(file, trusted=trusted)
    vectors = [bundle.golden(graph.name) for graph in bundle.manifest.graphs]
    for graph in bundle.manifest.graphs:
        admit_in_child(bundle.graph(graph.name), role=graph.role)
    facts: Summary = {
        "intact": True,
        "signer": bundle.signer,
        "signer_trusted": trusted is not None,
        "digest": bundle.digest,
        "graphs_admitted": len(bundle.manifest.graphs),
        "golden_vectors": sum(vector is not None for vector in vectors),
    }
    if output is OutputFormat.JSON:
        print_json(facts)
    else:
        print_summary(facts)
    return ExitCode.OK


def _trusted(keys: list[Path] | None, signers: list[str] | None) -> frozenset[Fingerprint] | None:
    """Return the signers to accept; None when nobody was named."""
    if not keys and not signers:
        return None
    from_keys = (fingerprint(load_public_key(path)) for path in keys or ())
    return frozenset((*from_keys, *(parse_fingerprint(text) for text in signers or ())))


def describe(bundle: Bundle, *, signer_trusted: bool) -> Summary:
    """Return what a person asks of a bundle first; table and JSON show the same."""
    manifest = bundle.manifest
    return {
        "signer": bundle.signer,
        "signer_trusted": signer_trusted,
        "digest": bundle.digest,
        "task": manifest.task,
        "created": manifest.created.isoformat(timespec="seconds"),
        "tool_version": manifest.tool_version,
        "seed": manifest.seed,
        "classes": {c.name: c.stored_value for c in manifest.taxonomy.classes},
        "input": {
            "channels": manifest.input.channels,
            "rows": manifest.input.rows,
            "columns": manifest.input.columns,
            "channel_meaning": manifest.input.channel_meaning,
        },
        "recipe": manifest.recipe.model_dump(mode="json"),
        "training_data": manifest.training_data.model_dump(mode="json"),
        "graphs": [
            {
                "name": g.name,
                "role": g.role,
                "architecture": g.architecture,
                "parameters": g.parameters,
                "size_bytes": g.size_bytes,
                "balanced_accuracy": None if g.hold_out is None else g.hold_out.balanced_accuracy,
                "auc": None if g.hold_out is None else g.hold_out.auc,
                "golden_vector": g.golden is not None,
            }
            for g in manifest.graphs
        ],
        "graph_sha256": {g.name: g.sha256 for g in manifest.graphs},
        "proxy_check": None if manifest.proxy_check is None else _proxy_facts(manifest.proxy_check),
        **_segmentation_facts(manifest),
    }


def _segmentation_facts(manifest: Manifest) -> Summary:
    contract, check = manifest.segmentation, manifest.segmentation_check
    if contract is None:
        return {}
    return {
        "segmentation": contract.model_dump(mode="json"),
        "segmentation_check": None if check is None else _overlap_facts(check),
    }


def _overlap_facts(check: SegmentationCheck) -> Summary:
    """Return the check without the IoU, which says the same as the Dice and makes the table too wide to read."""
    left_out = {"__all__": {"clean_iou", "protected_iou", "clean_recoverable_dice"}}
    facts = check.model_dump(mode="json", exclude={"victims": left_out, "blurred_victims": left_out})
    return {**facts, "holds_after_blur": check.holds_after_blur, _IN_WORDS: overlap_sentences(check)}


def _proxy_facts(check: ProxyCheck) -> Summary:
    return {
        "images": check.images,
        "epsilon_255": check.epsilon_255,
        "mask_ratio": check.mask_ratio,
        "psnr_db": check.psnr_db,
        "effective": check.effective,
        "victims": [
            {
                "architecture": v.architecture,
                "seed": v.seed,
                "auc_clean": v.clean.auc,
                "auc_protected": v.protected.auc,
                "auc_best_epoch": v.protected_peak_auc,
                "auc_recoverable": v.recoverable_auc,
                "auc_recoverable_best_epoch": v.recoverable_peak_auc,
            }
            for v in check.victims
        ],
    }


def print_summary(facts: Summary) -> None:
    """Print a summary: single facts and small groups first, then each list as a table of its own."""
    console = stdout_console()
    overview = Table(Column(), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    lists: list[Table] = []
    _fill(overview, lists, facts, prefix="")
    console.print(overview)
    for table in lists:
        console.print()
        console.print(table)
    check = facts.get("segmentation_check")
    if isinstance(check, dict):
        for sentence in check[_IN_WORDS]:
            console.print(f"\n{sentence}")
    if facts["signer_trusted"] is False:
        console.print("\nAny signer was accepted: compare the signer's fingerprint with your coordinator.")


def _fill(overview: Table, lists: list[Table], facts: Summary, prefix: str) -> None:
    for name, value in facts.items():
        if name == _IN_WORDS:
            continue  # sentences stand below the tables
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            _fill(overview, lists, value, prefix=f"{label}: ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            columns = (Column(key.replace("_", " "), overflow="fold") for key in value[0])
            table = Table(*columns, title=label, title_justify="left")
            for row in value:
                table.add_row(*(_cell(cell) for cell in row.values()))
            lists.append(table)
        else:
            overview.add_row(Text(printable(label)), _cell(value))


def _cell(value: object) -> Text:
    """Return a value as plain text: a class name in a foreign manifest is no markup."""
    return Text(_words(value))


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value) or "-"
    return "-" if value is None or value == "" else printable(str(value))


def main() -> int:
    """Run the ``medveil`` command; the console script exits with what this returns."""
    return run_command(app, "medveil")
