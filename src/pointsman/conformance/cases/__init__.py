"""The cases, a file for each part of the protocol."""

from importlib import import_module

FILES = (
    "placement",
    "request",
    "refusals",
    "subset",
    "bodies",
    "headers",
    "rewrite",
    "response",
    "streams",
    "in_flight",
    "affinity",
    "pool",
    "service",
    "needs_more",
)
"""In the order in which they are listed."""


def load_cases() -> None:
    """Import every file, so that ``case.CASES`` is whole."""
    for name in FILES:
        import_module(f"{__name__}.{name}")
