"""Cache truth: what we believed endpoints to hold of prompts, against what their engines say they had.

Answers say it (``usage.prompt_tokens_details.cached_tokens``) where the engine puts it in, counters on the
metrics page where not. An index that is off by more than what was merely sent is set aside by itself, and
whatever can be seen of the cause is told once, loudly.
"""
