"""The names of ``bench.workloads`` by which older code imports them."""

from pointsman.bench.workloads import Call, SharedPrefix, Unrelated, Workload

__all__ = ["Call", "SharedPrefix", "Unrelated", "Workload"]
