"""Time limits of a process that may be suspended: by scontrol, docker pause, Ctrl-Z, or a laptop that is closed."""

import time


class AwakeClock:
    """Seconds that this process has run, as told by whoever looks often: between two looks `longest_s` pass at most. A
    process that stood still all the while was not late."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s, self._seconds, self._looked = longest_s, 0.0, time.monotonic()

    def now(self) -> float:
        """Like `time.monotonic`, but for the time that was slept away."""
        looked = time.monotonic()
        self._seconds += min(looked - self._looked, self._longest_s)
        self._looked = looked
        return self._seconds
