"""Closest first, on bare times: who goes with whom, also while more may come. Pure; it knows no frames.

The closest two of both sides are a pair; take them out and repeat; of equally close ones the earlier go first.
On a line, the closest two of what is left are always neighbours. So it is enough to weigh neighbours, and to weigh
those that become neighbours when what was between them is gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise

NOBODY = -1
OPEN = -2
_MANY = 2**62


def closest_first(ones: Sequence[int], others: Sequence[int], *, window_ns: int, open_from_ns: int) -> list[int]:
    """For each of `ones` the index of its partner in `others`, NOBODY, or OPEN.

    ones, others: times in ns, in order, `others` all before `open_from_ns`. From `open_from_ns` on there are any
    number of further `others`; OPEN is who gets one of them. Of equal times the first in the list goes first.

    More `others` can only be good for `ones`. So this is the best that each of `ones` can still get: NOBODY is
    final, and so is a partner that, seen from the other side, can get no better either.
    """
    partners = [NOBODY] * len(ones)
    groups = _merge(ones, others, open_from_ns)
    gaps = [
        (right.at_ns - left.at_ns, place, place + 1)
        for place, (left, right) in enumerate(pairwise(groups))
        if left.is_one != right.is_one and right.at_ns - left.at_ns <= window_ns
    ]
    heapify(gaps)
    before = list(range(-1, len(groups) - 1))  # each group's neighbours, among those that are left
    after = list(range(1, len(groups) + 1))
    while gaps:
        _, first, second = heappop(gaps)
        if not groups[first].num or not groups[second].num:
            continue
        _pair(groups[first], groups[second], partners)
        for place in (first, second):
            if not groups[place].num:
                left, right = before[place], after[place]
                if right < len(groups):
                    before[right] = left
                if left >= 0:
                    after[left] = right
        left = first if groups[first].num else before[first]
        right = second if groups[second].num else after[second]
        if left >= 0 and right < len(groups) and groups[left].is_one != groups[right].is_one:
            gap_ns = groups[right].at_ns - groups[left].at_ns
            if gap_ns <= window_ns:
                heappush(gaps, (gap_ns, left, right))
    return partners


@dataclass(slots=True)
class _Group:
    """What one side has at one instant, and is left of it. index: of its first."""

    is_one: bool
    at_ns: int
    index: int
    num: int


def _merge(ones: Sequence[int], others: Sequence[int], open_from_ns: int) -> list[_Group]:
    """Both sides in order of time, and what is open at the end."""
    groups: list[_Group] = []
    last: _Group | None = None
    i = j = 0
    num_ones, num_others = len(ones), len(others)
    while i < num_ones or j < num_others:
        if j == num_others or (i < num_ones and ones[i] <= others[j]):
            is_one, at_ns, index = True, ones[i], i
            i += 1
        else:
            is_one, at_ns, index = False, others[j], j
            j += 1
        if last is not None and last.is_one == is_one and last.at_ns == at_ns:
            last.num += 1
        else:
            last = _Group(is_one, at_ns, index, 1)
            groups.append(last)
    groups.append(_Group(False, open_from_ns, OPEN, _MANY))
    return groups


def _pair(left: _Group, right: _Group, partners: list[int]) -> None:
    one, other = (left, right) if left.is_one else (right, left)
    num = min(one.num, other.num)
    for k in range(num):
        partners[one.index + k] = OPEN if other.index == OPEN else other.index + k
    for group in (one, other):
        group.num -= num
        if group.index != OPEN:
            group.index += num
