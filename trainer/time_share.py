"""Whose turn it is, where two kinds of work want the same cores: encoding and learning."""

import math
import time

_MEMORY_S = 60.0


class TimeShare:
    """Gives encoding its share of the time in which both have work; neither starves the other.

    Only that time counts, and what is long ago counts less: whoever had nothing to do gains no claim by it.
    """

    def __init__(self, encode_share: float) -> None:
        self._encode_share = encode_share
        self._encode_s = self._learn_s = 0.0

    def is_encoding_due(self) -> bool:
        return self._encode_s <= self._encode_share * (self._encode_s + self._learn_s)

    def note(self, *, since_s: float, encoded: bool) -> None:
        """since_s: `time.monotonic` when this turn began."""
        took_s = time.monotonic() - since_s
        fade = math.exp(-took_s / _MEMORY_S)
        self._encode_s, self._learn_s = self._encode_s * fade, self._learn_s * fade
        if encoded:
            self._encode_s += took_s
        else:
            self._learn_s += took_s
