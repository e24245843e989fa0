"""Rubbish in the streams, by the thousand, between good pairs: the worker takes it all and stays as it is.

benchmarks/soak.py does the same for as long as one likes.
"""

from pathlib import Path

import pytest

from tests.system.soak import MAX_BUFFER_BYTES, Soak

pytestmark = pytest.mark.system
ENTRY_BYTES = 128 * 1024


def test_bad_input_is_buried_with_its_reason_while_every_good_pair_is_stored(tmp_path: Path) -> None:
    with Soak(tmp_path, seed=5) as soak:
        soak.send_odd_keys()
        for number in range(6):
            soak.send_round(with_huge=number % 3 == 1)
            soak.send_flood(400)
        soak.drain()
        soak.check_letters()
        faults = soak.finish()
    assert not faults
    assert soak.num_bad > 3000


def test_memory_does_not_grow_with_the_bad_input_that_passes_through(tmp_path: Path) -> None:
    """Both bounds in terms of the buffer that the worker may hold.

    At most: the buffer, one read (which aims at no more than that), and copies of both while they are sent. At
    rest: what its allocator keeps of that, to which a second, longer flood must add little.
    """
    with Soak(tmp_path, seed=6) as soak:
        soak.send_round(with_huge=False)
        soak.drain()
        start_bytes = soak.resident_bytes()
        soak.send_flood(400, num_bytes=ENTRY_BYTES)
        soak.drain()
        warm_bytes, sent_bytes = soak.resident_bytes(), soak.num_bytes
        soak.send_flood(800, num_bytes=ENTRY_BYTES)
        soak.drain()
        sent_bytes = soak.num_bytes - sent_bytes
        end_bytes, peak_bytes = soak.resident_bytes(), soak.resident_bytes(peak=True)
        faults = soak.finish()
    assert not faults
    assert sent_bytes > 6 * MAX_BUFFER_BYTES, "too little to tell"
    assert peak_bytes - start_bytes < 4 * MAX_BUFFER_BYTES
    assert end_bytes - warm_bytes < 2 * MAX_BUFFER_BYTES
