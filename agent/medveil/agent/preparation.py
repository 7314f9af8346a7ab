"""From a bundle, a policy and the call's wishes to a method that is ready to run, or a refusal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

from medveil.agent.budget import Budget
from medveil.agent.engine import open_oracle
from medveil.agent.imageio import Taxonomy
from medveil.agent.perturb import Perturber
from medveil.agent.policy import SitePolicy, load_policy, narrowed
from medveil.models.bundle import Bundle, open_bundle
from medveil.models.errors import ConfigurationError
from medveil.models.methods import get as method_named
from medveil.models.methods.base import Need
from medveil.models.methods.oracle import GradientOracle

__all__ = ["Device", "Prepared", "Wishes", "available_threads", "open_trusted_bundle", "prepare"]

Device = Literal["auto", "cpu", "cuda"]

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
    """

    bundle: Path
    policy: Path | None = None
    epsilon: float | None = None
    mask: float | None = None
    device: Device = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked bundle, its surrogates in running sessions, and the limits that hold.

    Attributes:
        bundle: intact, and signed by someone that the policy accepts.
        policy: the site's.
        taxonomy: the bundle's classes.
        perturber: method, settings and surrogates.
        budget: what the call, the bundle and the policy agree on.
    """

    bundle: Bundle
    policy: SitePolicy
    taxonomy: Taxonomy
    perturber: Perturber
    budget: Budget

    @property
    def settings(self) -> Mapping[str, object]:
        """What a release depends on beside its images; no secret and nothing of the site's data."""
        return {
            "bundle_sha256": self.bundle.digest,
            "signer": str(self.bundle.signer),
            "method": self.perturber.method.info.name,
            "method_version": self.perturber.method.info.version,
            "medveil": version("medveil"),
            "epsilon": self.budget.epsilon,
            "mask": self.budget.mask,
            "policy_sha256": self.policy.digest(),
        }


def available_threads() -> int:
    """Return how many CPU threads this process may use."""
    return len(os.sched_getaffinity(0))


def open_trusted_bundle(path: Path, policy: SitePolicy) -> Bundle:
    """Open a bundle that this site's policy accepts.

    Raises:
        SignatureError: it was changed, or its signer is not trusted.
        InputError: there is no such file.
        ConfigurationError: the policy doesn't allow its method, or its task is another.
    """
    bundle = open_bundle(path, trusted=policy.trusted_signers)
    policy.check_method(bundle.manifest.recipe.method)
    if bundle.manifest.task != "classification":
        raise ConfigurationError(
            "task", "This bundle is for another task than labelled images; use the right one."
        )
    return bundle


def prepare(wishes: Wishes) -> Prepared:
    """Read the policy, check the bundle, settle the budget and open the surrogates.

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
    method = method_named(recipe.method)
    settings = recipe.method_settings(epsilon_255=budget.epsilon, mask_ratio=budget.mask)
    oracle = None if Need.NOTHING in method.needs else _open(bundle, wishes)
    classes = bundle.manifest.taxonomy.classes
    return Prepared(
        bundle=bundle,
        policy=policy,
        taxonomy=Taxonomy(tuple(c.name for c in classes), tuple(c.stored_value for c in classes)),
        perturber=Perturber(method, settings, oracle),
        budget=budget,
    )


def _open(bundle: Bundle, wishes: Wishes) -> GradientOracle:
    names = [entry.name for entry in bundle.manifest.surrogates]
    if not names:
        raise ConfigurationError(
            "no-surrogate", "The bundle's method needs a surrogate and the bundle has none."
        )
    return open_oracle(
        [(name, bundle.graph(name), bundle.golden(name)) for name in names],
        device=wishes.device,
        threads=wishes.threads or available_threads(),
        memory_budget_bytes=_MEMORY_BUDGET_BYTES,
    )
