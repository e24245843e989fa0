"""How far a sensor has come in its own time, and when its clock has been set. Pure; it knows no frames.

Event time is the newest capture time so far. It stands against a frame that is a little old, and it gives way when
the sensor's clock has leapt: more than a minute ahead or back, as soon as two frames in a row say so; less than
that back, but more than the grace and a second, as soon as five in a row say so, each newer than the one before. A
leap ahead of less than a minute is taken as it comes.
"""

NEVER = -(2**63)
ALWAYS = 2**63
FAR_NS = 60 * 10**9
"""Beyond this a frame is not believed alone."""
_NUM_SET_BACK = 5
_MIN_SET_BACK_NS = 10**9


class EventTime:
    """One sensor's. newest_ns: NEVER before its first frame."""

    def __init__(self, *, grace_ns: int) -> None:
        self._grace_ns = grace_ns
        self._set_back_ns = max(grace_ns, _MIN_SET_BACK_NS)
        self._jump_ns = NEVER  # the last frame's time, if it was too far off to be believed alone
        self._back_ns = NEVER  # the last frame's time, if the clock may have been set back
        self._num_back = 0
        self.newest_ns = NEVER

    @property
    def watermark_ns(self) -> int:
        """Nothing up to this time is waited for; NEVER before the first frame."""
        return self.newest_ns - self._grace_ns if self.newest_ns != NEVER else NEVER

    def follow(self, at_ns: int) -> int:
        """Take in the time of one more frame. Returns the size of the leap that it confirms, else 0."""
        if self.newest_ns == NEVER:
            self.newest_ns = at_ns
            return 0
        ahead_ns = at_ns - self.newest_ns
        if abs(ahead_ns) > FAR_NS:
            return self._weigh_jump(at_ns)
        self._jump_ns = NEVER
        if ahead_ns < -self._set_back_ns:
            return self._weigh_set_back(at_ns)
        self._num_back = 0
        if ahead_ns > 0:
            self.newest_ns = at_ns
        return 0

    def is_stray(self, at_ns: int) -> bool:
        """Whether a frame of that time is more than a minute ahead, and the next one can no longer confirm it."""
        return at_ns > self.newest_ns + FAR_NS and at_ns != self._jump_ns

    def shift(self, by_ns: int) -> None:
        """Move everything that is remembered: times are counted from another point now."""
        if self.newest_ns != NEVER:
            self.newest_ns += by_ns
        if self._jump_ns != NEVER:
            self._jump_ns += by_ns
        if self._back_ns != NEVER:
            self._back_ns += by_ns

    def _weigh_jump(self, at_ns: int) -> int:
        self._num_back = 0
        jump_ns, self._jump_ns = self._jump_ns, at_ns
        if jump_ns == NEVER or abs(at_ns - jump_ns) > FAR_NS:
            return 0
        return self._restart(max(jump_ns, at_ns))

    def _weigh_set_back(self, at_ns: int) -> int:
        self._num_back = self._num_back + 1 if self._num_back and at_ns > self._back_ns else 1
        self._back_ns = at_ns
        return self._restart(at_ns) if self._num_back == _NUM_SET_BACK else 0

    def _restart(self, at_ns: int) -> int:
        leap_ns = at_ns - self.newest_ns
        self.newest_ns = at_ns
        self._jump_ns = NEVER
        self._num_back = 0
        return leap_ns
