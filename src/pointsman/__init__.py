"""Pointsman routes LLM inference requests by prefix cache and load."""

__version__ = "0.1.0"
