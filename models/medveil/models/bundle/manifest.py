"""What a bundle says about itself: closed, frozen values, one JSON file.

    Manifest
    +-- taxonomy        class names and the label values they are stored under
    +-- input           what image the graphs take
    +-- recipe          how a site makes the perturbation
    +-- segmentation    for the task segmentation: which generator answers for what, band, tiles
    +-- training_data   what the surrogates learned from
    +-- graphs          each ONNX file: role, architecture, digest, quality, golden vector
    +-- proxy_check     what small victims learned from images protected with this bundle
    +-- segmentation_check   the same for the task segmentation, in overlap with the reference masks

Unknown keys are refused: a site must not run half of what the coordinator meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from statistics import median
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from medveil.models.errors import ConfigurationError
from medveil.models.methods import Hardening, Settings
from medveil.models.methods import get as method_named
from medveil.models.methods.base import Colour, MaskScore
from medveil.models.methods.masked import SegmentationSettings
from medveil.models.methods.masks import Amplitude
from medveil.models.methods.projection import StepRule
from medveil.models.methods.segmentation import get_segmentation
from medveil.models.methods.targets import TargetKind

__all__ = [
    "SCHEMA_VERSION",
    "GeneratorUse",
    "GoldenAnswersEntry",
    "GoldenEntry",
    "GraphEntry",
    "GraphName",
    "GraphStatement",
    "HardeningSettings",
    "InputContract",
    "Manifest",
    "ManifestDraft",
    "MemberTraining",
    "ProxyCheck",
    "ProxyVictim",
    "RecipeSettings",
    "Scores",
    "SegmentationCheck",
    "SegmentationContract",
    "SegmentationVictim",
    "Taxonomy",
    "TaxonomyClass",
    "TrainingData",
    "segmentation_holds",
]

SCHEMA_VERSION: Literal[1] = 1

# Budgets are written in steps of an 8-bit image, as the field does.
_EIGHT_BIT_MAX = 255

GraphName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Line = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Statement = Annotated[str, StringConstraints(max_length=10_000)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0)]


class _Value(BaseModel):
    """Frozen, closed, strict, finite: the common ground of every part of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TaxonomyClass(_Value):
    """One class: its name, and the label value it is stored under in arrays and CSV files."""

    name: _Line
    stored_value: int


class Taxonomy(_Value):
    """The classes, in the order of the graphs' outputs."""

    classes: Annotated[tuple[TaxonomyClass, ...], Field(min_length=2)]

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of the graphs' outputs."""
        return tuple(c.name for c in self.classes)

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        if len({c.name for c in self.classes}) < len(self.classes):
            raise ValueError("two classes share a name")
        if len({c.stored_value for c in self.classes}) < len(self.classes):
            raise ValueError("two classes share a stored value")
        return self


class InputContract(_Value):
    """The image that the graphs take: ``(batch, channels, rows, columns)``, float32, in ``value_range``.

    With ``slices`` it is a volume, ``(batch, channels, slices, rows, columns)``. For the task segmentation it is one
    tile of an image.
    """

    channels: Literal[1, 3]
    rows: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]
    channel_meaning: Literal["grey", "rgb"]
    value_range: tuple[float, float] = (0.0, 1.0)
    slices: Annotated[int, Field(ge=1)] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(channels, rows, columns)`` or ``(channels, slices, rows, columns)``."""
        depth = () if self.slices is None else (self.slices,)
        return (self.channels, *depth, self.rows, self.columns)


class HardeningSettings(_Value):
    """What the noise is made to survive; lengths in pixels of the image, the radius in 1/255."""

    blur_sigmas: tuple[float, ...] = ()
    shifts: tuple[tuple[int, int], ...] = ()
    scales: tuple[float, ...] = ()
    flip: bool = False
    adversary_radius_255: Annotated[float, Field(ge=0)] = 0.0
    adversary_steps: Annotated[int, Field(ge=1)] = 3


class RecipeSettings(_Value):
    """How a site makes the perturbation; the site's policy may only narrow it.

    Attributes:
        method: name in the method registry.
        objective: what the noise pushes a model towards (`medveil.models.methods.targets`).
        label_permutation: class index that each class is pushed towards; the same at every site, or the noise
            of the sites cancels. None: the next class.
        epsilon_255: default budget: largest change of a pixel in 1/255 of the release window.
        mask_ratio: default share of an image's pixels that may change.
        step_size: length of a step as a fraction of epsilon.

    The other names are those of the method's settings class.
    """

    method: _Line = "salm"
    objective: TargetKind = "permuted"
    label_permutation: tuple[int, ...] | None = None
    confidence: Annotated[float, Field(gt=0, le=1)] = 1.0
    epsilon_255: Annotated[float, Field(gt=0, lt=_EIGHT_BIT_MAX)] = 8.0
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.3
    mask_score: MaskScore | None = None
    amplitude: Amplitude = "even"
    colour: Colour = "luma"
    steps: Annotated[int, Field(ge=1)] = 20
    step_size: Annotated[float, Field(gt=0, le=2)] = 0.1
    step_rule: StepRule = "sign"
    warmup_steps: Annotated[int, Field(ge=1)] = 8
    psnr_floor_db: float | None = None
    hardening: HardeningSettings = HardeningSettings()
    seed: Annotated[int, Field(ge=0)] = 0

    def method_settings(
        self, *, epsilon_255: float | None = None, mask_ratio: float | None = None
    ) -> Settings:
        """Return the settings value that the method takes; what the method has no word for is left out.

        Args:
            epsilon_255: another budget than the default.
            mask_ratio: another mask than the default.

        Raises:
            ConfigurationError: the method is unknown, or refuses a setting.
        """
        hardening = self.hardening
        known: dict[str, object] = self.model_dump(
            exclude={"method", "objective", "label_permutation", "epsilon_255", "mask_ratio", "hardening"}
        )
        known |= {
            "epsilon": (self.epsilon_255 if epsilon_255 is None else epsilon_255) / _EIGHT_BIT_MAX,
            "mask_ratio": self.mask_ratio if mask_ratio is None else mask_ratio,
            "target": self.objective,
            "permutation": self.label_permutation,
            "hardening": Hardening(
                blur_sigmas=hardening.blur_sigmas,
                shifts=hardening.shifts,
                scales=hardening.scales,
                flip=hardening.flip,
                adversary_radius=hardening.adversary_radius_255 / _EIGHT_BIT_MAX,
                adversary_steps=hardening.adversary_steps,
            ),
        }
        wanted = method_named(self.method).settings
        names = {field.name for field in dataclasses.fields(wanted)}
        settings: Settings = wanted(**{name: value for name, value in known.items() if name in names})
        return settings


class GeneratorUse(_Value):
    """Which graph answers for which part of a segmentation method."""

    part: Literal["contour", "texture", "roi"]
    graph: GraphName


class SegmentationContract(_Value):
    """How a site makes the noise of a segmentation bundle: by its generators, or drawn by the method itself.

    Generators are convolutions and batch norm with zero padding inside: where tiles begin on multiples of
    ``alignment`` and ``halo`` pixels are dropped at each border that is not the image's own, tiles join without a
    seam.

    Attributes:
        generators: one per part of the method; each maps a tile to answers in [-1, 1] of the tile's shape. None where
            the method draws its noise.
        band_radius: of the contour band, in pixels of the image; of a grating, how far it goes beyond its class.
        texture_bound: limit the noise inside by the local texture.
        target: what the generators were trained to make a surrogate see; for the record. None: there are none.
        halo: pixels at a tile's inner border whose answers the neighbouring tile knows better.
        alignment: of the tiles' first pixels along each axis.
    """

    generators: tuple[GeneratorUse, ...]
    band_radius: _Count
    texture_bound: bool
    target: Literal["labels", "foreground", "permuted"] | None
    halo: _Count
    alignment: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        if len({use.part for use in self.generators}) < len(self.generators):
            raise ValueError("two generators answer for one part")
        if bool(self.generators) != (self.target is not None):
            raise ValueError("generators, and only they, were trained towards a target")
        return self

    def method_settings(self, *, epsilon_255: float, seed: int = 0) -> SegmentationSettings:
        """Return the settings value that the method takes, at a budget in 1/255.

        Raises:
            ConfigurationError: "setting".
        """
        return SegmentationSettings(
            epsilon=epsilon_255 / _EIGHT_BIT_MAX,
            band_radius=self.band_radius,
            texture_bound=self.texture_bound,
            seed=seed,
        )


class TrainingData(_Value):
    """The public data that the surrogates learned from, as the coordinator states it.

    Attributes:
        sha256: digest of the images and labels as they were read.
        source_statement: where the data comes from and under which licence, in the coordinator's words.
        train_counts: images per class that were learned from, in the order of the taxonomy.
        hold_out_counts: images per class that quality was measured on.
    """

    name: _Line
    source_statement: _Statement
    sha256: _Sha256
    train_counts: tuple[_Count, ...]
    hold_out_counts: tuple[_Count, ...]


class Scores(_Value):
    """Quality on clean images that were not learned from; AUC is the mean of one class against the rest."""

    accuracy: _Share
    balanced_accuracy: _Share
    auc: _Share


class MemberTraining(_Value):
    """How one graph was trained; enough to do it again."""

    seed: int
    epochs: Annotated[int, Field(ge=1)]
    attempts: Annotated[int, Field(ge=1)]
    augmentation: tuple[_Line, ...] = ()
    label_smoothing: _Share = 0.0
    adversarial_255: Annotated[float, Field(ge=0)] = 0.0
    adversarial_steps: _Count = 0


class GraphStatement(_Value):
    """What the trainer knows about one graph before it is packed.

    Attributes:
        role: "surrogate": image to logits; "generator": image (and target) to perturbation.
        hold_out: a surrogate's quality on images that it did not learn from; a generator has none.
    """

    name: GraphName
    role: Literal["surrogate", "generator"]
    architecture: _Line
    parameters: Annotated[int, Field(ge=1)]
    hold_out: Scores | None
    training: MemberTraining

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.role == "surrogate" and self.hold_out is None:
            raise ValueError("a surrogate needs its quality on held-out images")
        return self


class GoldenEntry(_Value):
    """Digests of a golden vector's four arrays, and the relative L2 distance a session may be off."""

    rtol: Annotated[float, Field(gt=0, lt=1)]
    images_sha256: _Sha256
    targets_sha256: _Sha256
    losses_sha256: _Sha256
    gradients_sha256: _Sha256


class GoldenAnswersEntry(_Value):
    """Digests of a generator's golden images and answers, and the relative L2 distance a session may be off."""

    rtol: Annotated[float, Field(gt=0, lt=1)]
    images_sha256: _Sha256
    answers_sha256: _Sha256


class GraphEntry(GraphStatement):
    """One ONNX file of the bundle.

    Attributes:
        golden: a surrogate's losses and gradients; None for a generator.
        answers: a generator's answers; None for a surrogate, for a generator that needs more than the image, and in
            bundles made before generators had them.
    """

    sha256: _Sha256
    size_bytes: Annotated[int, Field(ge=1)]
    golden: GoldenEntry | None
    answers: GoldenAnswersEntry | None = None

    @model_validator(mode="after")
    def _proved_in_its_role(self) -> Self:
        if self.answers is not None and self.role != "generator":
            raise ValueError("only a generator has golden answers")
        return self


class ProxyVictim(_Value):
    """One small victim, trained on clean images and on protected ones, tested on clean images.

    Attributes:
        clean: trained on the images as they are.
        protected: trained on the same images, protected; at the end of training.
        protected_peak_auc: the best epoch, for whoever stops early.
        protected_peak_balanced_accuracy: likewise; None in bundles made before it was recorded.
        recoverable_accuracy: best balanced accuracy, after relabelling or refitting the victim's outputs on a
            few clean images: a consistent mix-up can be undone.
        recoverable_auc: best AUC, likewise.
        recoverable_peak_accuracy, recoverable_peak_auc: the best epochs of the two; None as above.
    """

    architecture: _Line
    seed: int
    clean: Scores
    protected: Scores
    protected_peak_auc: _Share
    recoverable_accuracy: _Share
    recoverable_auc: _Share
    protected_peak_balanced_accuracy: _Share | None = None
    recoverable_peak_accuracy: _Share | None = None
    recoverable_peak_auc: _Share | None = None


class ProxyCheck(_Value):
    """What was measured with this bundle's own noise on public images that no surrogate has seen.

    Attributes:
        images: number of protected images the victims were trained on.
        epsilon_255: budget of the noise, 1/255.
        mask_ratio: share of pixels that could change.
        psnr_db: median over the images; None: most of them are unchanged.
        attempts: 1, or more when the recipe had to be strengthened.
        effective: every design of victim, in the median over its seeds, lost at least half of what it learns from
            clean images, counted in recoverable AUC and recoverable accuracy at the end of training. (Bundles made
            before several seeds were tried: the average over the victims, in balanced accuracy.)
        victims: one per design and seed.
    """

    images: Annotated[int, Field(ge=1)]
    epsilon_255: float
    mask_ratio: float
    psnr_db: float | None
    attempts: Annotated[int, Field(ge=1)]
    effective: bool
    victims: Annotated[tuple[ProxyVictim, ...], Field(min_length=1)]


class SegmentationVictim(_Value):
    """One small victim, trained on clean patches and on protected ones, tested on clean patches.

    Attributes:
        clean_dice, clean_iou: trained on the images as they are; mean over images and foreground classes.
        protected_dice, protected_iou: trained on the same images, protected; at the end of training.
        protected_peak_dice: the best epoch, for whoever stops early on clean images.
        clean_recoverable_dice, recoverable_dice: of the two at the end, with the thresholds that serve best on clean
            images (`medveil.models.quality.recoverable_dice`): for whoever has some of them with label maps. None in
            bundles made before it was recorded.
        release_dice: of the one trained on clean images, in other images that are protected: whether models trained
            elsewhere still read a release. None in bundles made before it was recorded.
    """

    architecture: _Line
    seed: int
    clean_dice: _Share
    clean_iou: _Share
    protected_dice: _Share
    protected_iou: _Share
    protected_peak_dice: _Share
    clean_recoverable_dice: _Share | None = None
    recoverable_dice: _Share | None = None
    release_dice: _Share | None = None


def segmentation_holds(victims: Sequence[SegmentationVictim], constant_mask_dice: float) -> bool:
    """Return whether every design of victim lost enough in each of its seeds: who trains again keeps the best.

    What counts is what can be recovered beyond the constant mask (`medveil.models.quality.segmentation.share_lost`),
    beside the median of what clean images teach.
    """
    # Loaded here: it brings SciPy, and no command should wait for that before it reads its own line.
    from medveil.models.quality.segmentation import LEAST_LOSS, share_lost

    for name in {victim.architecture for victim in victims}:
        runs = [victim for victim in victims if victim.architecture == name]
        learned = median(run.clean_dice for run in runs)
        taught = median(run.clean_recoverable_dice or 0.0 for run in runs)
        left = max(1.0 if run.recoverable_dice is None else run.recoverable_dice for run in runs)
        lost = share_lost(learned, taught, left, constant_mask_dice)
        if lost is None or lost < LEAST_LOSS:
            return False
    return True


class SegmentationCheck(_Value):
    """What was measured with this bundle's own noise on public images that no generator has seen.

    Attributes:
        images: number of protected patches the victims were trained on.
        epsilon_255: budget of the noise, 1/255.
        psnr_db: median over the patches.
        roi_psnr_db: the same, over the foreground only.
        attempts: seeds of the generators that were tried, the best one was kept; or budgets of drawn noise, up to
            the one that was kept.
        effective: of what clean images teach beyond the constant mask, every design of victim lost at least half, in
            each of its seeds and by what can be recovered of it. (Earlier bundles: in the median over the seeds;
            before that, half of the Dice.)
        victims: one per design and seed.
        constant_mask_dice: what a mask that is the same for every test image finds, learned from the label maps alone
            (`medveil.models.quality.constant_mask_dice`); mean over images and foreground classes. None in bundles
            made before it was recorded.
        blurred_victims: some of them again, on training and test images that were all blurred before
            (`medveil.models.quality.blurred`), the simplest filter there is. Empty in bundles made before it was
            tried.
    """

    images: Annotated[int, Field(ge=1)]
    epsilon_255: float
    psnr_db: float | None
    roi_psnr_db: float | None
    attempts: Annotated[int, Field(ge=1)]
    effective: bool
    victims: Annotated[tuple[SegmentationVictim, ...], Field(min_length=1)]
    constant_mask_dice: _Share | None = None
    blurred_victims: tuple[SegmentationVictim, ...] = ()

    @property
    def holds_after_blur(self) -> bool | None:
        """Whether the protection outlives a blur, by the rule of `effective`; None where it was not tried."""
        if not self.blurred_victims or self.constant_mask_dice is None:
            return None
        return segmentation_holds(self.blurred_victims, self.constant_mask_dice)


class _Body(_Value):
    """What draft and finished manifest share."""

    task: Literal["classification", "segmentation"]
    created: datetime
    tool_version: _Line
    seed: int
    taxonomy: Taxonomy
    input: InputContract
    recipe: RecipeSettings
    training_data: TrainingData
    proxy_check: ProxyCheck | None = None
    segmentation: SegmentationContract | None = None
    segmentation_check: SegmentationCheck | None = None

    @model_validator(mode="after")
    def _fit_for_segmentation(self) -> Self:
        if (self.task == "segmentation") != (self.segmentation is not None):
            raise ValueError("the task segmentation, and only it, needs a segmentation contract")
        if self.segmentation is not None:
            try:
                method = get_segmentation(self.recipe.method)
            except ConfigurationError as exc:
                raise ValueError("the recipe names no segmentation method") from exc
            if {use.part for use in self.segmentation.generators} != set(method.generators):
                raise ValueError(
                    "the generators must answer for every part of the method, and for nothing else"
                )
            if method.across_slices and self.input.slices is None:
                raise ValueError("the method is made for volumes, and the input has no slices")
        return self

    def _check_graphs(self, count: int) -> None:
        """Refuse a bundle that has no graph though its noise needs one."""
        drawn = self.segmentation is not None and not self.segmentation.generators
        if not count and not drawn:
            raise ValueError("only a method that draws its noise needs no graph")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        classes = len(self.taxonomy.classes)
        counts = (self.training_data.train_counts, self.training_data.hold_out_counts)
        if any(len(c) != classes for c in counts):
            raise ValueError("the training-data statement must count every class")
        permutation = self.recipe.label_permutation
        if permutation is not None and sorted(permutation) != list(range(classes)):
            raise ValueError("the label permutation must rearrange the classes of the taxonomy")
        if self.created.tzinfo is None:
            raise ValueError("the time of creation needs its time zone")
        return self


class ManifestDraft(_Body):
    """A manifest before the graphs are packed and measured."""

    graphs: tuple[GraphStatement, ...]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self._check_graphs(len(self.graphs))
        return self


class Manifest(_Body):
    """The signed statement of a bundle."""

    schema_version: Literal[1] = SCHEMA_VERSION
    graphs: tuple[GraphEntry, ...]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        self._check_graphs(len(self.graphs))
        names = {g.name for g in self.graphs}
        if len(names) < len(self.graphs):
            raise ValueError("two graphs share a name")
        if self.segmentation and not {use.graph for use in self.segmentation.generators} <= names:
            raise ValueError("a part of the method names a graph that is not in the bundle")
        return self

    def entry(self, name: str) -> GraphEntry:
        """Return the entry of one graph.

        Raises:
            KeyError: no graph has this name.
        """
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise KeyError(name)

    @property
    def surrogates(self) -> tuple[GraphEntry, ...]:
        """The graphs that methods take gradients of, in the manifest's order."""
        return tuple(graph for graph in self.graphs if graph.role == "surrogate")
