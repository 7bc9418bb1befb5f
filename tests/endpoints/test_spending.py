"""What endpoints cost: from their own settings, by rule, or read; and what it comes to."""

from __future__ import annotations

import pytest

from pointsman.config import Endpoint as Settings
from pointsman.config import RunningCost
from pointsman.endpoints.metrics.power import PowerReader
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.spending import HOUR_S, KWH_J, WORKING_MEMORY_S
from pointsman.endpoints.target import targets_of
from pointsman.types import Endpoint, Metrics

RULES = (
    RunningCost(labels={"accelerator": "mi325x"}, price_per_hour=3.0),
    RunningCost(labels={"accelerator": "mi325x"}, engine="sglang", price_per_hour=9.0, watts=900.0),
    RunningCost(engine="vllm", watts=500.0),
)


class Rig:
    """A pool of one endpoint, and a clock to turn."""

    def __init__(self, rules: tuple[RunningCost, ...] = (), **settings: object) -> None:
        self.now_s = 1000.0
        self.pool = Pool(lambda: self.now_s, running_costs=rules)
        (target,) = targets_of(Settings(url="http://a:1", name="a", **settings))  # type: ignore[arg-type]
        self.member = self.pool.add(target, "settings")

    @property
    def endpoint(self) -> Endpoint:
        return self.member.endpoint

    def engine(self, name: str) -> None:
        self.pool.learn_metrics("a", name, Metrics(at_s=self.now_s), False)

    def read(self, watts: float, *, requests: int) -> None:
        self.endpoint.load.requests = requests
        self.pool.learn_watts("a", watts)


def test_without_a_word_on_costs_there_are_none() -> None:
    rig = Rig()
    rig.now_s += HOUR_S
    rig.member.spending.advance(rig.now_s)
    assert (rig.endpoint.price_per_hour, rig.endpoint.watts) == (0.0, 0.0)
    assert (rig.member.spending.spent, rig.member.spending.energy_j) == (0.0, 0.0)


def test_each_figure_is_the_first_rules_that_fits_and_has_it() -> None:
    rig = Rig(RULES, labels={"accelerator": "mi325x"})
    assert (rig.endpoint.price_per_hour, rig.endpoint.watts) == (3.0, 0.0)
    rig.engine("sglang")
    assert (rig.endpoint.price_per_hour, rig.endpoint.watts) == (3.0, 900.0)
    rig.engine("vllm")
    assert (rig.endpoint.price_per_hour, rig.endpoint.watts) == (3.0, 500.0)


def test_an_endpoints_own_settings_come_before_the_rules() -> None:
    rig = Rig(RULES, labels={"accelerator": "mi325x"}, price_per_hour=2.5, watts=700.0)
    rig.engine("sglang")
    assert (rig.endpoint.price_per_hour, rig.endpoint.watts) == (2.5, 700.0)


def test_it_costs_and_draws_all_of_the_time() -> None:
    rig = Rig(price_per_hour=4.0, watts=500.0)
    spending = rig.member.spending
    rig.now_s += HOUR_S
    spending.advance(rig.now_s)
    assert (spending.spent, spending.energy_j / KWH_J) == pytest.approx((4.0, 0.5))
    rig.read(1000.0, requests=1)
    rig.now_s += HOUR_S / 2
    spending.advance(rig.now_s)
    assert (spending.spent, spending.energy_j / KWH_J) == pytest.approx((6.0, 1.0))


def test_decisions_see_what_it_draws_at_work_and_not_the_last_reading() -> None:
    rig = Rig()
    rig.read(120.0, requests=0)
    assert rig.endpoint.watts == 120.0, "better than nothing"
    rig.read(600.0, requests=3)
    rig.now_s += WORKING_MEMORY_S / 100
    rig.read(900.0, requests=3)
    assert 600.0 < rig.endpoint.watts < 610.0
    rig.read(120.0, requests=0)
    assert 600.0 < rig.endpoint.watts < 610.0
    assert rig.member.spending.draw == 120.0


def test_a_reading_changes_what_the_scheduler_is_given() -> None:
    rig = Rig()
    assert rig.pool.candidates("")[0].watts == 0.0
    rig.read(300.0, requests=1)
    rig.now_s += 1
    assert rig.pool.candidates("")[0].watts == 300.0


DCGM = b"""\
# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).
# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{gpu="0",modelName="NVIDIA H100 NVL"} 310.5
DCGM_FI_DEV_POWER_USAGE{gpu="1",modelName="NVIDIA H100 NVL"} 95.25
"""
AMD = (
    b'# TYPE gpu_package_power gauge\ngpu_package_power{gpu_id="0"} 748\ngpu_package_power{gpu_id="1"} 751\n'
)
GAUDI = b'# TYPE habanalabs_power_mW gauge\nhabanalabs_power_mW{device="hl0"} 412000\n'


@pytest.mark.parametrize(
    ("page", "metrics", "watts"),
    [
        (DCGM, (), 405.75),
        (DCGM, ("DCGM_FI_DEV_POWER_USAGE{gpu=1}",), 95.25),
        (AMD, (), 1499.0),
        (AMD.replace(b"gpu_package", b"amd_gpu_package"), (), 1499.0),
        (AMD, ('gpu_package_power{gpu_id="0"}', 'gpu_package_power{gpu_id="1"}'), 1499.0),
        (GAUDI, (), 412.0),
        (GAUDI, ("habanalabs_power_mW{device=hl0}",), 412.0),
        (GAUDI, ("habanalabs_power_mW{device=hl1}",), None),
        (b"", (), None),
    ],
)
def test_pages_of_the_exporters_we_know(page: bytes, metrics: tuple[str, ...], watts: float | None) -> None:
    assert PowerReader(metrics).read(page) == (watts if watts is None else pytest.approx(watts))
