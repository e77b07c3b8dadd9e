"""Ranges of arguments, checked with the name of the argument in the message."""

from numbers import Real


def check_at_least(smallest: int, **arguments) -> None:
    """Refuse what is no number, NaN, and numbers that are too small or infinite.

    Args:
        smallest: of all these arguments.
        arguments: by name, a number, a list of numbers, or `None`, which is not checked.

    Raises:
        ValueError: if there is such a number. The message names the argument.
    """
    for name, given in arguments.items():
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not isinstance(value, Real):
                raise ValueError(f"{name} must be a number, got {value!r}.")
            if value < smallest or value != value:  # NaN is not equal to itself
                bound = "must not be negative" if smallest == 0 else f"must be at least {smallest}"
                raise ValueError(f"{name} {bound}, got {value}.")
            if value == float("inf"):
                raise ValueError(f"{name} must be finite, got {value}.")
