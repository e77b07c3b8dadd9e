"""The configuration that all deep equilibrium models share: how they are solved and how they are differentiated."""

from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

from .fixed_point import SOLVERS
from .reversible import most_steps

logger = logging.get_logger(__name__)

SOLVER_SCOPES = ("causal", "sequence")
GRADIENTS = ("implicit", "phantom", "unrolled", "reversible")
LARGEST_NUMBER = 100_000_000  # of any field: more is a slip of the hand
# An unknown field is a misspelt one, if it is so similar to one of ours. Other models have tokens of similar names
# (sep_token_id, eod_token_id). So among token ids, only a letter too many or too few counts.
SIMILAR, SIMILAR_TOKEN = 0.8, 0.93
OWN_PREFIXES = ("solver_", "backward_", "phantom_", "reversible_", "jacobian_")


@strict
class DEQConfig(PreTrainedConfig):
    """Base configuration. `DEQTransformerConfig` and others add the fields of their architecture.

    Args:
        solver: how the equilibrium is found: `"anderson"`, `"broyden"` or `"picard"`.
        solver_scope: `"causal"` (default): the output at t depends on tokens <= t, at any tolerance and budget.
            `"sequence"`: inner products over the whole sequence, as in the literature. Then later tokens influence
            earlier states until convergence, and no cache can be used.
        solver_tolerance: relative residual `||f(z) - z|| / ||f(z)||` at which a position is solved.
        solver_max_evaluations: budget of calls of f per solve. `num_evaluations` can be larger, by one call at the best
            iterate of a solve that did not converge, and with gradients by the calls with a graph: one for the implicit
            gradient, `phantom_steps` for the phantom gradient. With `gradient="unrolled"`: the number of applications
            of f. With `gradient="reversible"`, training has `2 * reversible_steps` calls, whatever the budget.
        solver_history: number of past iterates that Anderson or Broyden remember.
        solver_damping: fraction of each solver step that is taken, in (0, 1].
        gradient: `"implicit"` (exact), `"phantom"` (through a few damped steps at the equilibrium), `"unrolled"` (an
            explicit weight-tied stack; it has no equilibrium to cache, so it generates without a cache) or
            `"reversible"` (through reversible steps, which backward undoes; without gradients, the solver runs).
        backward_solver, backward_tolerance, backward_max_evaluations: solver, tolerance and budget of the linear solve
            for the implicit gradient. Here evaluations are vector-Jacobian products.
        phantom_steps, phantom_damping: number and damping of the steps that the phantom gradient differentiates.
        reversible_steps, reversible_beta: number of reversible steps, with two calls of f each, and the fraction of
            each step that is taken, in (0, 1). A larger fraction allows fewer steps, see `ReversibleGradient`.
        jacobian_loss_weight: weight of the Jacobian regularization in the training loss; 0 turns it off. Calls with
            `unroll_steps` have none.
        jacobian_loss_frequency: fraction of training steps that apply the regularization, in (0, 1].

    Raises:
        ValueError: if an unknown key looks like one of these fields, or is a field of another family.
        StrictDataclassError: if a field is out of range or has a wrong type. This error of huggingface_hub is not a
            ValueError.
    """

    # The solver's reports describe the solve. They are not predictions, so a Trainer should not gather them.
    keys_to_ignore_at_inference = [
        "cache",
        "residual",
        "num_evaluations",
        "converged",
        "jacobian_loss",
        "memory",
    ]

    # TRL reads this name of every configuration whose model class is not one of Transformers. A folder with the code of
    # its model has its own value.
    auto_map: ClassVar[dict[str, str]] = {}

    # Fields of earlier versions, and what the user should write instead.
    former_fields = {
        "shallow_steps": "give it to the training, as in scripts/train.py --shallow_steps",
        "shallow_depth": "give it to the training, as in scripts/train.py --shallow_depth",
    }

    solver: str = "anderson"
    solver_scope: str = "causal"
    solver_tolerance: int | float = 1e-3
    solver_max_evaluations: int = 30
    solver_history: int = 5
    solver_damping: int | float = 1.0
    gradient: str = "implicit"
    backward_solver: str = "anderson"
    backward_tolerance: int | float = 1e-2
    backward_max_evaluations: int = 30
    phantom_steps: int = 5
    phantom_damping: int | float = 0.5
    reversible_steps: int = 8
    reversible_beta: int | float = 0.5
    jacobian_loss_weight: int | float = 0.0
    jacobian_loss_frequency: int | float = 1.0

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Make a configuration as in Transformers, also from the fields that another version saved.

        Fields of an earlier version become those of today. Fields of a later one, or of another family, are left out,
        with a warning. The `auto_map` of a folder with code is left out by a class that is not of this code: a copy
        would not have it.

        Raises:
            ValueError: if a field to override (one of `kwargs`) looks misspelt.
        """
        cls._refuse_misspelt(kwargs)
        config_dict = cls.upgrade(config_dict)
        unknown = sorted(name for name in config_dict if cls._misspelt(name) or cls._of_another_family(name))
        if unknown:
            logger.warning(f"{cls.__name__} leaves out {unknown}: only a later version, or another family, has them.")
        if not cls.__module__.startswith("transformers_modules"):  # where Transformers keeps code from folders
            unknown.append("auto_map")
        return super().from_dict({n: value for n, value in config_dict.items() if n not in unknown}, **kwargs)

    @classmethod
    def upgrade(cls, fields: dict) -> dict:
        """Return the fields that an earlier version saved as fields of this version."""
        return {name: value for name, value in fields.items() if name not in cls.former_fields}

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)

    @property
    def is_cacheable(self) -> bool:
        """Whether a prefix has a final state. It has none with unrolled steps, or in sequence scope."""
        return self.gradient != "unrolled" and self.solver_scope != "sequence"

    @property
    def remembers(self) -> bool:
        """Whether `forward` returns a memory for the next segment of a text."""
        return False

    @classmethod
    def _refuse_misspelt(cls, unknown: dict) -> None:
        """Refuse unknown keys that look like a field of this configuration.

        PreTrainedConfig keeps every unknown key as an attribute. So a misspelt field would be ignored silently.
        """
        for key in unknown:
            if key in cls.former_fields:
                raise ValueError(f"{cls.__name__} has no field {key!r}: {cls.former_fields[key]}.")
            if meant := cls._misspelt(key):
                raise ValueError(f"{cls.__name__} has no field {key!r}; did you mean {meant!r}?")
            if other := cls._of_another_family(key):
                raise ValueError(f"{cls.__name__} has no field {key!r}, which is one of {other}: leave it out.")

    @classmethod
    def _misspelt(cls, key: str) -> str | None:
        """The field that a key seems to mean; `None` if the key is a field, or looks like none."""
        own = [field.name for field in fields(cls) if field.name not in PreTrainedConfig.__dataclass_fields__]
        if key in own or key.endswith("_token"):  # a tokenizer may bring its tokens along
            return None
        if key.startswith(OWN_PREFIXES):
            return max(own, key=lambda name: _shared_start(name, key))
        cutoff = SIMILAR_TOKEN if key.endswith("_token_id") else SIMILAR
        return next(iter(get_close_matches(key, own, n=1, cutoff=cutoff)), None)

    @classmethod
    def _of_another_family(cls, key: str) -> str | None:
        """The configuration that has a field of this name, if this one has none; otherwise `None`."""
        own = key in cls.__dataclass_fields__ or key in cls.attribute_map
        if own or key.endswith("_token_id"):  # a tokenizer may bring its ids along
            return None
        return next((other.__name__ for other in DEQConfig.__subclasses__() if key in other.__dataclass_fields__), None)

    def validate_equilibrium(self):
        """Check the ranges of the shared fields. `@strict` calls this method after construction."""
        require_one_of("solver", self.solver, SOLVERS)
        require_one_of("backward_solver", self.backward_solver, SOLVERS)
        require_one_of("solver_scope", self.solver_scope, SOLVER_SCOPES)
        require_one_of("gradient", self.gradient, GRADIENTS)
        self.require_at_least(0, "solver_tolerance", "backward_tolerance", "jacobian_loss_weight")
        self.require_at_least(
            1, "solver_max_evaluations", "backward_max_evaluations", "phantom_steps", "reversible_steps"
        )
        self.require_at_least(1, "solver_history", largest=100)
        for name in ("solver_damping", "phantom_damping", "jacobian_loss_frequency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        if not 0 < self.reversible_beta < 1:
            raise ValueError(f"reversible_beta must be in (0, 1), got {self.reversible_beta}.")
        if self.reversible_steps > most_steps(self.reversible_beta):
            raise ValueError(
                f"reversible_steps must be at most {most_steps(self.reversible_beta)} with "
                f"reversible_beta={self.reversible_beta}, got {self.reversible_steps}: rounding errors would spoil the "
                "gradient when the steps are undone."
            )

    def require_at_least(self, smallest: int, *names: str, largest: int = LARGEST_NUMBER) -> None:
        """Refuse fields that are below a number or above another one, or not a number.

        Raises:
            ValueError: if there is such a field. The message names the first one.
        """
        for name in names:
            value = getattr(self, name)
            if not value >= smallest:  # also if it is not a number
                what = "zero or positive" if smallest == 0 else f"at least {smallest}"
                raise ValueError(f"{name} must be {what}, got {value}.")
            if value == float("inf"):
                raise ValueError(f"{name} must be finite, got {value}.")
            if value > largest:
                raise ValueError(f"{name} must be at most {largest:,}, got {value:,}.")

    def require_positive(self, *names: str) -> None:
        """Refuse fields that are not positive and finite.

        Raises:
            ValueError: if there is such a field. The message names the first one.
        """
        for name in names:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")

    def require_probabilities(self, *names: str) -> None:
        """Refuse dropout fields that are not probabilities below one.

        Raises:
            ValueError: if a field lies outside of [0, 1). The message names the first one.
        """
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")

    def require_cutoffs(self) -> None:
        """Refuse `cutoffs` that do not cut the vocabulary into clusters.

        Raises:
            ValueError: if they do not rise strictly between 0 and `vocab_size`, or if the list is empty.
        """
        if self.cutoffs is None:
            return
        ends = [0, *self.cutoffs, self.vocab_size]
        if not self.cutoffs or any(start >= end for start, end in pairwise(ends)):
            raise ValueError(
                f"cutoffs must rise strictly between 0 and vocab_size={self.vocab_size}, got {self.cutoffs}."
            )


def _shared_start(one: str, other: str) -> int:
    """Return the length of the common beginning of two names."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def attention_name(config: DEQConfig) -> str:
    """Return the name of the attention function, without the prefix that Transformers gives it for paged rows.

    (Transformers' own "paged|eager" rounds the softmax to single precision.)
    """
    return config._attn_implementation.removeprefix("paged|")


def require_one_of(name: str, value: str, allowed) -> None:
    """Refuse a value that is not one of the allowed names.

    Raises:
        ValueError: if the value is not allowed. The message gives the name of the field and the allowed names.
    """
    if value not in [*allowed]:  # a value from a recipe may be a list, which no dictionary can look up
        raise ValueError(f"{name} must be one of {sorted(allowed)}, got {value!r}.")


# The fields that say how a model is solved and differentiated.
EQUILIBRIUM_FIELDS = {field.name for field in fields(DEQConfig)} - PreTrainedConfig.__dataclass_fields__.keys()


def fits_given_weights(name: str) -> bool:
    """Whether a field can change in a model that has its weights: those of the equilibrium and of dropout can."""
    return name in EQUILIBRIUM_FIELDS or name.endswith(("_dropout", "_pdrop"))  # the second: GPT-2
