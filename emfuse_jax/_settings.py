"""What configs refuse, in one wording. None passes where it is allowed."""

from typing import Any


def at_least(config: Any, least: int, *names: str) -> None:
    """Refuses fields below ``least``, and NaN; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value}; expected at least {least}")


def positive(config: Any, *names: str) -> None:
    """Refuses fields that are not positive and finite; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"{name}={value}; expected a positive number")


def rates(config: Any, *names: str) -> None:
    """Refuses fields outside (0, 1]."""
    for name in names:
        value = getattr(config, name)
        if not 0.0 < value <= 1.0:
            raise ValueError(
                f"{name}={value}; expected a rate in (0, 1]; 1 keeps nothing of the past"
            )


def decays(config: Any, *names: str) -> None:
    """Refuses lengths of an annealing below 1; None is a constant rate."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 1:
            raise ValueError(
                f"{name}={value}; expected at least 1, or None for a constant rate"
            )


def discounts(config: Any) -> None:
    """Refuses a ``discount`` outside [0, 1]."""
    if not 0.0 <= config.discount <= 1.0:
        raise ValueError(f"discount={config.discount}; expected a number in [0, 1]")


def require_key(key: Any) -> Any:
    """The key of a draw; raises where there is none."""
    if key is None:
        raise ValueError(
            "act(key=None) samples nothing; pass a key or deterministic=True"
        )
    return key
