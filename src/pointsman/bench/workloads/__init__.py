"""What is asked: sequences of calls that depend on nothing but their parameters and the seed.

A workload is an iterator over calls, endless unless it is a trace; the load (``bench.load``) decides when
each is due. docs/reference/workloads.md lists the families.
"""

from __future__ import annotations

from typing import TypeAlias

from pointsman.bench.workloads.call import Call, Workload
from pointsman.bench.workloads.shared_prefix import SharedPrefix
from pointsman.bench.workloads.unrelated import Unrelated

AnyWorkload: TypeAlias = SharedPrefix | Unrelated
"""One tagged union: in a file, ``kind`` names the family."""

__all__ = ["AnyWorkload", "Call", "SharedPrefix", "Unrelated", "Workload"]
