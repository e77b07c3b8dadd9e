# Copyright 2026 The hf_deq authors. Licensed under the Apache License, Version 2.0.
"""The configuration that all deep equilibrium models share: how they are solved and differentiated."""

from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .fixed_point import SOLVERS

SOLVER_SCOPES = ("causal", "sequence")
GRADIENTS = ("implicit", "phantom", "unrolled")
OWN_PREFIXES = ("solver_", "backward_", "phantom_", "jacobian_")


@strict
class DEQConfig(PreTrainedConfig):
    """Base configuration; `DEQTransformerConfig` and others add their architecture.

    Args:
        solver: how the equilibrium is found: `"anderson"`, `"broyden"` or `"picard"`.
        solver_scope: `"causal"` (default; the output at t depends on tokens <= t at any tolerance and
            budget) or `"sequence"` (the literature's sequence-wide inner products; leaks from later
            tokens until converged and must not be used with a cache).
        solver_tolerance: relative residual `||f(z) - z|| / ||f(z)||` at which a position is solved.
        solver_max_evaluations: budget of calls of f per solve (gradients need one more, with a graph);
            with `gradient="unrolled"` the number of applications.
        solver_history: past iterates that Anderson or Broyden remember.
        solver_damping: fraction of each solver step that is taken, in (0, 1].
        gradient: `"implicit"` (exact), `"phantom"` (through the last steps) or `"unrolled"` (an
            explicit weight-tied stack; it has no equilibrium to cache, so it generates without cache).
        backward_solver, backward_tolerance, backward_max_evaluations: the same for the linear
            solve of the implicit gradient; evaluations are vector-Jacobian products.
        phantom_steps, phantom_damping: length and damping of the phantom gradient's path.
        jacobian_loss_weight: weight of the Jacobian regularization in the training loss; 0 is off.
        jacobian_loss_frequency: fraction of training steps that apply it, in (0, 1].

    Raises:
        ValueError: a field is out of range, or an unknown key looks like one of these.
    """

    # The solver's reports are about the solve, not predictions: a Trainer should not gather them.
    keys_to_ignore_at_inference = [
        "cache",
        "residual",
        "num_evaluations",
        "converged",
        "jacobian_loss",
        "memory",
    ]

    # Fields that earlier versions saved, and what to write instead.
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
    jacobian_loss_weight: int | float = 0.0
    jacobian_loss_frequency: int | float = 1.0

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in Transformers. Fields of earlier versions become those of today."""
        return super().from_dict(cls.upgrade(config_dict), **kwargs)

    @classmethod
    def upgrade(cls, fields: dict) -> dict:
        """Turn the fields that an earlier version saved into those of today."""
        return {name: value for name, value in fields.items() if name not in cls.former_fields}

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)
        if (self.gradient == "unrolled" or self.solver_scope == "sequence") and getattr(self, "use_cache", False):
            self.use_cache = False  # neither has a final state for a prefix

    def _refuse_misspelt(self, unknown: dict) -> None:
        """PreTrainedConfig keeps unknown keys as attributes; ours among them would be silently ignored."""
        own = [field.name for field in fields(self) if field.name not in PreTrainedConfig.__dataclass_fields__]
        for key in unknown:
            if key in self.former_fields:
                raise ValueError(f"{type(self).__name__} has no field {key!r}: {self.former_fields[key]}.")
            similar = get_close_matches(key, own, n=1, cutoff=0.8)
            if key.startswith(OWN_PREFIXES) or similar:
                ours = key.startswith(OWN_PREFIXES)
                hint = max(own, key=lambda name: _shared_start(name, key)) if ours else similar[0]
                raise ValueError(f"{type(self).__name__} has no field {key!r}; did you mean {hint!r}?")

    def validate_equilibrium(self):
        """Ranges of the shared fields; called by `@strict` after construction."""
        require_one_of("solver", self.solver, SOLVERS)
        require_one_of("backward_solver", self.backward_solver, SOLVERS)
        require_one_of("solver_scope", self.solver_scope, SOLVER_SCOPES)
        require_one_of("gradient", self.gradient, GRADIENTS)
        self.require_at_least(0, "solver_tolerance", "backward_tolerance", "jacobian_loss_weight")
        self.require_at_least(
            1, "solver_max_evaluations", "backward_max_evaluations", "solver_history", "phantom_steps"
        )
        for name in ("solver_damping", "phantom_damping", "jacobian_loss_frequency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")

    def require_at_least(self, smallest: int, *names: str) -> None:
        """Refuse fields below a number, infinite ones, and what is not a number.

        Raises:
            ValueError: the first of these fields that is one of them.
        """
        for name in names:
            value = getattr(self, name)
            if not value >= smallest:  # also where it is not a number
                what = "zero or positive" if smallest == 0 else f"at least {smallest}"
                raise ValueError(f"{name} must be {what}, got {value}.")
            if value == float("inf"):
                raise ValueError(f"{name} must be finite, got {value}.")

    def require_positive(self, *names: str) -> None:
        """Refuse fields that are not positive and finite.

        Raises:
            ValueError: the first of these fields that is not.
        """
        for name in names:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")

    def require_probabilities(self, *names: str) -> None:
        """Refuse dropout fields that are not probabilities below one.

        Raises:
            ValueError: the first of these fields that lies outside of [0, 1).
        """
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")

    def require_cutoffs(self) -> None:
        """Refuse `cutoffs` that do not cut the vocabulary.

        Raises:
            ValueError: they do not rise strictly between 0 and `vocab_size`, or there are none in the list.
        """
        if self.cutoffs is None:
            return
        ends = [0, *self.cutoffs, self.vocab_size]
        if not self.cutoffs or any(start >= end for start, end in pairwise(ends)):
            raise ValueError(
                f"cutoffs must rise strictly between 0 and vocab_size={self.vocab_size}, got {self.cutoffs}."
            )


def _shared_start(one: str, other: str) -> int:
    """How many characters two names start with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def require_one_of(name: str, value: str, allowed) -> None:
    """Refuse a value that is not one of the names allowed.

    Raises:
        ValueError: naming the field and the choice.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {sorted(allowed)}, got {value!r}.")
