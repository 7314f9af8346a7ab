"""From a bundle, a policy and the call's wishes to a method that is ready to run, or a refusal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

from medveil.agent.budget import Budget
from medveil.agent.engine import OnnxGenerator, open_generator, open_oracle
from medveil.agent.imageio import Taxonomy
from medveil.agent.perturb import Perturber
from medveil.agent.policy import SitePolicy, load_policy, narrowed
from medveil.agent.segmentation import ClassMap, Generator, MaskedPerturber, Tiles
from medveil.models.bundle import Bundle, SegmentationContract, check_answers, open_bundle
from medveil.models.errors import ConfigurationError
from medveil.models.methods import get as method_named
from medveil.models.methods.base import Method, Need
from medveil.models.methods.generated import NAME as GENERATED
from medveil.models.methods.generated import method_of
from medveil.models.methods.oracle import GradientOracle
from medveil.models.methods.segmentation import get_segmentation

__all__ = [
    "DRAWN_NOISE",
    "Device",
    "EngineOptions",
    "Noise",
    "Prepared",
    "Wishes",
    "available_threads",
    "engine_options",
    "open_trusted_bundle",
    "prepare",
]

Device = Literal["auto", "cpu", "cuda"]

Noise = Literal["optimised", "generated"]
"""Made by the bundle's method with gradients of its surrogates, or in one pass by the bundle's noise generator."""

DRAWN_NOISE: Final = "none needed: the method draws its noise"
"""What there is to say of the surrogates of a bundle without a graph."""

_DISTILLED: Final = "salm"
"""The method whose optimiser a generator is distilled from (`medveil.models.training.generator`)."""

_MEMORY_BUDGET_BYTES: Final = 2**30
"""What the engine may take for its batches. Our choice: it leaves room on a workstation of 8 GB."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the call asks for.

    Attributes:
        bundle: the bundle's file.
        policy: the policy's file; None takes the safe defaults.
        epsilon: budget in 1/255; None takes the bundle's.
        mask: share of pixels that may change; None takes the bundle's.
        device: where the surrogates run.
        threads: CPU threads; None takes all that this process may use.
        noise: how the perturbation is made, where the bundle leaves a choice.
    """

    bundle: Path
    policy: Path | None = None
    epsilon: float | None = None
    mask: float | None = None
    device: Device = "auto"
    threads: int | None = None
    noise: Noise = "optimised"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked bundle, its surrogates in running sessions, and the limits that hold.

    Attributes:
        bundle: intact, and signed by someone that the policy accepts.
        policy: the site's.
        taxonomy: the bundle's classes.
        perturber: method, settings and surrogates, or generators where the task is segmentation.
        budget: what the call, the bundle and the policy agree on.
        class_map: what masks call the classes, where the task is segmentation.
        adapted_sha256: of the surrogates that learned from this site's images; None: they are the bundle's.
    """

    bundle: Bundle
    policy: SitePolicy
    taxonomy: Taxonomy
    perturber: Perturber | MaskedPerturber
    budget: Budget
    class_map: ClassMap | None = None
    adapted_sha256: str | None = None

    @property
    def settings(self) -> Mapping[str, object]:
        """What a release depends on beside its images; no secret and nothing of the site's data."""
        adapted = {} if self.adapted_sha256 is None else {"adapted_sha256": self.adapted_sha256}
        return {
            "bundle_sha256": self.bundle.digest,
            "signer": str(self.bundle.signer),
            "method": self.perturber.method.info.name,
            "method_version": self.perturber.method.info.version,
            "medveil": version("medveil"),
            "epsilon": self.budget.epsilon,
            "mask": self.budget.mask,
            "policy_sha256": self.policy.digest(),
            **adapted,
        }


def available_threads() -> int:
    """Return how many CPU threads this process may use."""
    return len(os.sched_getaffinity(0))


class EngineOptions(TypedDict):
    """What sessions may use: the arguments of that name of `medveil.agent.engine`."""

    device: Device
    threads: int
    memory_budget_bytes: int


def engine_options(wishes: Wishes) -> EngineOptions:
    """Return what the sessions of a call may use."""
    return {
        "device": wishes.device,
        "threads": wishes.threads or available_threads(),
        "memory_budget_bytes": _MEMORY_BUDGET_BYTES,
    }


def open_trusted_bundle(path: Path, policy: SitePolicy) -> Bundle:
    """Open a bundle that this site's policy accepts.

    Raises:
        SignatureError: it was changed, or its signer is not trusted.
        InputError: there is no such file.
        ConfigurationError: the policy doesn't allow its method, or refuses noise that is not proven.
    """
    bundle = open_bundle(path, trusted=policy.trusted_signers)
    policy.check_method(bundle.manifest.recipe.method)
    if bundle.manifest.segmentation is not None and policy.segmentation.unproven == "refuse":
        check = bundle.manifest.segmentation_check
        if check is None or not check.effective:
            raise ConfigurationError(
                "unproven",
                "By the coordinator's own check this bundle's noise does not keep models from learning, and this "
                "site's policy refuses such noise; ask the coordinator for another bundle.",
            )
    return bundle


def prepare(wishes: Wishes) -> Prepared:
    """Read the policy, check the bundle, settle the budget and open the surrogates or generators.

    Raises:
        ConfigurationError: the call or the policy is wrong.
        RefusedError: bundle, graph or session cannot be trusted.
    """
    policy = load_policy(wishes.policy)
    bundle = open_trusted_bundle(wishes.bundle, policy)
    recipe = bundle.manifest.recipe
    budget = Budget(
        epsilon=narrowed("epsilon", wishes.epsilon, recipe.epsilon_255, policy.maximum_epsilon),
        mask=narrowed("mask", wishes.mask, recipe.mask_ratio, policy.maximum_mask),
    )
    classes = bundle.manifest.taxonomy.classes
    taxonomy = Taxonomy(
        tuple(c.name for c in classes), tuple(c.stored_value for c in classes), policy.classes
    )
    if bundle.manifest.segmentation is not None:
        class_map = ClassMap(taxonomy, policy.segmentation.aliases)
        masked = _masked_perturber(bundle, bundle.manifest.segmentation, budget, wishes)
        return Prepared(bundle, policy, taxonomy, masked, budget, class_map)
    if wishes.noise == "generated":
        method: Method[Any] = method_of(_generator(bundle, policy, wishes), len(classes))
    else:
        method = method_named(recipe.method)
    settings = recipe.method_settings(epsilon_255=budget.epsilon, mask_ratio=budget.mask)
    oracle = None if Need.NOTHING in method.needs else _open(bundle, wishes)
    return Prepared(bundle, policy, taxonomy, Perturber(method, settings, oracle), budget)


def _masked_perturber(
    bundle: Bundle, contract: SegmentationContract, budget: Budget, wishes: Wishes
) -> MaskedPerturber:
    channels, *tile = bundle.manifest.input.shape
    generators: dict[str, Generator] = {}
    for use in contract.generators:
        generator = open_generator(
            bundle.graph(use.graph),
            device=wishes.device,
            threads=wishes.threads or available_threads(),
            memory_budget_bytes=_MEMORY_BUDGET_BYTES // len(contract.generators),
        )
        golden = bundle.golden_answers(use.graph)
        if golden is not None:  # bundles made before generators had them hold none
            check_answers(generator, golden, name=use.graph)
        generators[use.part] = generator
    return MaskedPerturber(
        method=get_segmentation(bundle.manifest.recipe.method),
        settings=contract.method_settings(epsilon_255=budget.epsilon),
        generators=generators,
        channels=channels,
        tiles=Tiles(tuple(tile), contract.halo, contract.alignment),
    )


def _generator(bundle: Bundle, policy: SitePolicy, wishes: Wishes) -> OnnxGenerator:
    """Open the generator that stands in for the recipe's optimiser; nobody gets it without asking for it."""
    if GENERATED not in policy.allowed_methods:
        raise ConfigurationError(
            "method-not-allowed",
            f"Noise by a generator needs {GENERATED!r} among the allowed_methods of this site's policy.",
        )
    names = [entry.name for entry in bundle.manifest.graphs if entry.role == "generator"]
    if len(names) != 1 or bundle.manifest.recipe.method != _DISTILLED:
        raise ConfigurationError(
            "no-generator", "This bundle has no noise generator for its method; use the optimised noise."
        )
    return open_generator(bundle.graph(names[0]), **engine_options(wishes))


def _open(bundle: Bundle, wishes: Wishes) -> GradientOracle:
    names = [entry.name for entry in bundle.manifest.surrogates]
    if not names:
        raise ConfigurationError(
            "no-surrogate", "The bundle's method needs a surrogate and the bundle has none."
        )
    graphs = [(name, bundle.graph(name), bundle.golden(name)) for name in names]
    return open_oracle(graphs, **engine_options(wishes))
