"""The families that make prompts themselves; others dress the calls of one of these."""

from __future__ import annotations

from typing import TypeAlias

from pointsman.bench.workloads.agents import Agents
from pointsman.bench.workloads.conversations import Conversations
from pointsman.bench.workloads.decode_heavy import DecodeHeavy
from pointsman.bench.workloads.mixed_lengths import MixedLengths
from pointsman.bench.workloads.shared_prefix import SharedPrefix
from pointsman.bench.workloads.trace import Trace
from pointsman.bench.workloads.unrelated import Unrelated

Prompts: TypeAlias = SharedPrefix | Unrelated | Conversations | Agents | DecodeHeavy | MixedLengths | Trace
