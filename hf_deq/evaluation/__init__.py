"""How good a model is, and what its equilibrium contributes."""

from .held_out import HeldOut, HeldOutText
from .model_folders import (
    check_finite,
    check_length,
    check_positions,
    check_remembers,
    load_model,
    load_tokenizer,
)
from .protocol import Protocol, solver_settings
from .reports import (
    FIGURES,
    METRICS,
    Evaluation,
    by_budget,
    by_tolerance,
    dial_label,
    dial_settings,
    evaluate_dial,
    finite,
    format_table,
    is_by_tolerance,
)
from .scoring import PerplexityReport, evaluate_perplexity, evaluating, in_step, share_of, solve_sums, summed

__all__ = [
    "FIGURES",
    "METRICS",
    "Evaluation",
    "HeldOut",
    "HeldOutText",
    "PerplexityReport",
    "Protocol",
    "by_budget",
    "by_tolerance",
    "check_finite",
    "check_length",
    "check_positions",
    "check_remembers",
    "dial_label",
    "dial_settings",
    "evaluate_dial",
    "evaluate_perplexity",
    "evaluating",
    "finite",
    "format_table",
    "in_step",
    "is_by_tolerance",
    "load_model",
    "load_tokenizer",
    "share_of",
    "solve_sums",
    "solver_settings",
    "summed",
]
