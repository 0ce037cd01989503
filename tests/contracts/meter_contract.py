"""What every meter promises, whatever it reads. A meter's tests inherit `MeterContract`."""

import itertools
import re
import typing

import pytest

from tuner.space import Lever
from tuner.trial import QUALITIES, Meter, MeterError


class MeterContract:
    """Subclasses give a `meter` fixture and `use`, which makes `joules` of energy pass in every domain."""

    tolerance = 0.0
    """Relative error of a reading in tests: 0 for a counter that the test sets."""

    coarse = False
    """Whether it is a counter whose own step is large enough to be told with each reading."""

    @pytest.fixture
    def meter(self):
        raise NotImplementedError

    def use(self, joules):
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _close(self, meter):
        yield
        meter.close()

    def test_it_is_a_meter(self, meter):
        assert isinstance(meter, Meter)
        assert meter.quality in QUALITIES
        assert meter.blind_to <= set(typing.get_args(Lever))
        assert meter.update_seconds >= 0

    def test_domains_are_distinct_names_that_fit_a_table(self, meter):
        domains = meter.domains()
        assert domains
        assert len(set(domains)) == len(domains)
        assert all(re.fullmatch(r"(cpu|gpu|dram|soc|ane|wall)[0-9a-z_]*", domain) for domain in domains)

    def test_a_reading_has_every_domain_and_no_other(self, meter):
        assert tuple(meter.read()) == meter.domains()

    def test_energy_arrives_in_microjoules(self, meter):
        before = meter.read()
        self.use(3.0)
        after = meter.read()
        for domain in meter.domains():
            used = after[domain].microjoules - before[domain].microjoules
            assert used == pytest.approx(3_000_000, rel=self.tolerance, abs=1)

    def test_readings_never_decrease(self, meter):
        readings = [meter.read()]
        for joules in (0.001, 2.0, 0.0, 5.0):
            self.use(joules)
            readings.append(meter.read())
        for before, after in itertools.pairwise(readings):
            for domain in meter.domains():
                assert before[domain].microjoules <= after[domain].microjoules
                assert before[domain].low <= after[domain].low
                assert before[domain].high <= after[domain].high

    def test_readings_are_whole_numbers_within_their_bounds(self, meter):
        self.use(1.0)
        for reading in meter.read().values():
            assert isinstance(reading.microjoules, int)
            assert reading.low <= reading.microjoules <= reading.high

    def test_a_measured_reading_has_no_range(self, meter):
        self.use(1.0)
        for reading in meter.read().values():
            assert (reading.low == reading.high) == (meter.quality != "estimated" and not self.coarse)

    def test_closing_twice_is_fine(self, meter):
        meter.close()
        meter.close()


class HandleContract(MeterContract):
    """Meters that hold something open."""

    def test_a_closed_meter_gives_no_reading(self, meter):
        meter.close()
        with pytest.raises(MeterError, match="closed"):
            meter.read()
