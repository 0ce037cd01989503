"""Meters that tests steer: a constant draw, or a script of readings and faults."""

from tuner.trial import MeterError, Reading


class Burner:
    """Draws a constant power by its own clock."""

    name = "burner"
    quality = "measured"
    blind_to = frozenset()
    update_seconds = 0.0

    def __init__(self, clock, watts=100.0):
        self.clock, self.watts = clock, watts

    def domains(self):
        return ("cpu0",)

    def read(self):
        return {"cpu0": Reading.exact(round(self.clock() * self.watts * 1e6))}

    def close(self):
        pass


class Script:
    """Gives the readings of a list, in microjoules, one after the other; an exception in it is raised."""

    name = "script"
    blind_to = frozenset()
    update_seconds = 0.0

    def __init__(self, *readings, quality="measured"):
        self.readings, self.quality = list(readings), quality

    def domains(self):
        return ("cpu0",)

    def read(self):
        reading = self.readings.pop(0)
        if isinstance(reading, str):
            raise MeterError(reading)
        return {"cpu0": Reading.exact(reading)}

    def close(self):
        pass


class Stepper:
    """Draws a constant power, and shows it in steps: each counter moves once in its period, as NVML's does."""

    name = "stepper"
    quality = "measured"
    blind_to = frozenset()

    def __init__(self, clock, watts=100.0, **periods):
        self.clock, self.watts, self.periods = clock, watts, periods or {"gpu0": 0.1}
        self.update_seconds = max(self.periods.values())

    def domains(self):
        return tuple(self.periods)

    def read(self):
        now = self.clock()
        return {
            domain: Reading.exact(round(1e6 * self.watts * period * int(now / period + 1e-9)) if period else 0)
            for domain, period in self.periods.items()
        }

    def close(self):
        pass
