"""What is asked: sequences of calls that depend on nothing but their parameters and the seed.

A workload is an iterator over calls, endless unless it is a trace; the load (``bench.load``) decides when
each is due. docs/reference/workloads.md lists the families; a file names one by its ``kind``.
"""

from __future__ import annotations

from typing import TypeAlias

from pointsman.bench.workloads.adapters import Adapters
from pointsman.bench.workloads.agents import Agents
from pointsman.bench.workloads.call import Call, Workload
from pointsman.bench.workloads.conversations import Conversations
from pointsman.bench.workloads.decode_heavy import DecodeHeavy
from pointsman.bench.workloads.families import Prompts
from pointsman.bench.workloads.mixed_lengths import MixedLengths
from pointsman.bench.workloads.shared_prefix import SharedPrefix
from pointsman.bench.workloads.slo_classes import Part, SloClasses
from pointsman.bench.workloads.tenants import Tenants
from pointsman.bench.workloads.trace import Trace
from pointsman.bench.workloads.unrelated import Unrelated

AnyWorkload: TypeAlias = Prompts | Adapters | Tenants | SloClasses

__all__ = [
    "AnyWorkload",
    "Workload",
    "Call",
    "SharedPrefix",
    "Unrelated",
    "Conversations",
    "Agents",
    "DecodeHeavy",
    "MixedLengths",
    "Trace",
    "Adapters",
    "Tenants",
    "SloClasses",
    "Part",
]
