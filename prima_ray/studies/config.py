"""What a study is: recipes (stages with their configs), variants (what answers), folds and seeds."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prima_ray.base import InputPath, StrictConfig
from prima_ray.evaluation.baselines import BlockUse, ClassifierKind
from prima_ray.training.config import LocalContextConfig, RayContextConfig

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
Changes = dict[str, Any]
"""Dotted keys of a config -> values, as `--set` would: `{optimizer.lr: 1e-3}`."""


class RecipeConfig(StrictConfig):
    """One stage of a pipeline. Its fold, seed, split, `out` and parents are the study's."""

    stage: Literal["ingest", "corpus", "refine", "align", "finetune", "fuse"]
    config: InputPath
    """The stage's YAML."""
    change: Changes = Field(default={})
    """Keys that differ from it; paths are relative to the working directory."""
    parents: dict[str, str] = Field(default={})
    """Role (`align`, `corpus`, `text_encoder`, ...) -> the recipe that it comes from."""
    vary: bool = True
    """False trains it once, with the first seed, for all seeds of the study."""


class TrainedVariant(StrictConfig):
    """What a recipe's run answers."""

    kind: Literal["trained"] = "trained"
    title: str
    recipe: Name
    """Of finetune or fuse."""
    candidates: tuple[Changes, ...] = Field(default=({},), min_length=1)
    """Changes of the recipe; each is trained, and the best on the validation fold answers."""


class MetadataVariant(StrictConfig):
    """A classifier of the attributes alone, chosen on the validation fold."""

    kind: Literal["metadata"] = "metadata"
    title: str
    model: ClassifierKind = "logistic_regression"
    blocks: BlockUse = "keep"
    refit: bool = True
    """Fitted on the validation fold too once it is chosen, for it stops nowhere; False leaves it as many exams as what
    is trained has."""
    candidates: tuple[Changes, ...] = Field(default=({},), min_length=1)
    """Options of scikit-learn's class: `{C: 0.1}`."""


class LateFusionVariant(StrictConfig):
    """The weighted sum of other variants' log-probabilities, normalised."""

    kind: Literal["late_fusion"] = "late_fusion"
    title: str
    of: tuple[Name, ...] = Field(min_length=2)
    candidates: tuple[tuple[Annotated[float, Field(ge=0)], ...], ...] = Field(default=(), min_length=0)
    """Weights, one a variant of `of`; none: 1 each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for weights in self.candidates:
            if len(weights) != len(self.of):
                raise ValueError(f"candidates: {list(weights)} are not {len(self.of)} weights, one for each of `of`")
            if not math.fsum(weights):
                raise ValueError("candidates: weights that are all 0 answer nothing")
        return self


VariantConfig = Annotated[TrainedVariant | MetadataVariant | LateFusionVariant, Field(discriminator="kind")]


class StudyInputs(StrictConfig):
    """Parents."""

    shards: InputPath | None = None
    """None: the recipe that `ingest` names makes them."""
    ingest: Name | None = None


class StudyConfig(StrictConfig):
    """See the package."""

    out: str
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    inputs: StudyInputs
    title: str = ""
    cells: str | None = None
    """Where the runs are kept, which studies may share; None: `cells` beside `out`."""
    answers: tuple[InputPath, ...] = ()
    """Files `answers.parquet` of studies: what they know of a run is taken from there, and it is not trained again."""
    split: Literal["patient", "lesion"] = "patient"
    folds: tuple[int, ...] | None = None
    """Test folds; None: all."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    change: Changes = Field(default={})
    """Keys that every recipe that trains has: `{context.kind: local, num_workers: 1}`."""
    recipes: dict[Name, RecipeConfig]
    variants: dict[Name, VariantConfig] = Field(min_length=1)
    ours: Name
    """The variant that all others are held against."""
    only: tuple[Name, ...] | None = None
    """Variants of this sitting, beside ours; the others, and claims about them, wait. None: all."""
    budget: int | None = Field(default=None, gt=0)
    """Candidates that each variant with something to choose has; None: as many as each lists."""
    choose_by: Literal["macro_f1", "balanced_accuracy", "accuracy"] = "macro_f1"
    """On the validation fold."""
    scored_on: Literal["test", "validation"] = "test"
    """`validation`: a search, in which no test fold is looked at; its figures are a little too good."""
    num_resamples: int = Field(default=1000, ge=1)
    claims: tuple[tuple[Name, Name, str], ...] = ()
    """(with, without, what): pairs of variants that differ in one component, told as "does it pay"."""
    cpus_per_cell: float = Field(default=1.0, gt=0)
    """What a run with a local context takes; one with Ray workers claims its own."""
    gpus_per_cell: float = Field(default=0.0, ge=0)
    keep_checkpoints: bool = False
    """False takes a run's checkpoints away once it is finished: several times its model, and read by nothing then."""
    context: Annotated[LocalContextConfig | RayContextConfig, Field(discriminator="kind")] = RayContextConfig()
    """`local` takes one run after the other, in this process."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.inputs.shards is None) == (self.inputs.ingest is None):
            raise ValueError("inputs: give shards, or ingest, and not both")
        self._check_recipes()
        self._check_variants()
        return self

    def sitting(self) -> Self:
        """What `only` leaves: these variants, ours, what late fusion adds up, and claims about them."""
        if self.only is None:
            return self
        kept = {self.ours, *self.only}
        for name in self.only:
            variant = self.variants[name]
            if isinstance(variant, LateFusionVariant):
                kept |= set(variant.of)
        return self.cut_to(kept)

    def cut_to(self, kept: Collection[str]) -> Self:
        """Some variants, and the claims about them."""
        variants = {name: variant for name, variant in self.variants.items() if name in kept}
        claims = tuple(claim for claim in self.claims if claim[0] in kept and claim[1] in kept)
        return self.model_copy(update={"variants": variants, "claims": claims})

    def _check_recipes(self) -> None:
        asked = [(f"inputs.ingest: {self.inputs.ingest}", self.inputs.ingest)] if self.inputs.ingest else []
        for name, recipe in self.recipes.items():
            asked += [(f"recipes.{name}.parents.{role}: {parent}", parent) for role, parent in recipe.parents.items()]
        for where, parent in asked:
            if parent not in self.recipes:
                raise ValueError(f"{where} is no recipe; known: {', '.join(self.recipes)}")
        if self.inputs.ingest and self.recipes[self.inputs.ingest].stage != "ingest":
            raise ValueError(f"inputs.ingest: {self.inputs.ingest} is a recipe of another stage")
        for name in self.recipes:
            self._check_circle(name, ())

    def _check_circle(self, name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ValueError(f"recipes: {' -> '.join([*above, name])} goes in a circle")
        for parent in self.recipes[name].parents.values():
            self._check_circle(parent, (*above, name))

    def _check_variants(self) -> None:
        for key, name in (("ours", self.ours), *(("only", name) for name in self.only or ())):
            if name not in self.variants:
                raise ValueError(f"{key}: {name} is no variant; known: {', '.join(self.variants)}")
        for name, variant in self.variants.items():
            match variant:
                case TrainedVariant():
                    if variant.recipe not in self.recipes:
                        raise ValueError(f"variants.{name}.recipe: {variant.recipe} is no recipe")
                    if self.recipes[variant.recipe].stage not in ("finetune", "fuse"):
                        raise ValueError(f"variants.{name}.recipe: {variant.recipe} is of a stage that does not answer")
                case LateFusionVariant():
                    for other in variant.of:
                        if other not in self.variants or self.variants[other].kind == "late_fusion":
                            raise ValueError(f"variants.{name}.of: {other} is no variant that it could add up")
            count = len(variant.candidates)
            if self.budget is not None and count > 1 and count != self.budget:
                raise ValueError(f"variants.{name} has {count} candidates, the budget of each is {self.budget}")
        for first, second, _ in self.claims:
            absent = {first, second} - set(self.variants)
            if absent:
                raise ValueError(f"claims: {sorted(absent)[0]} is no variant")
