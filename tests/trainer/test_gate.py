"""The gate: clear cases get their verdict, unclear ones wait, and every word has its number."""

import numpy as np
import pytest

from services.core.frames import CLASSES
from trainer.gate import Evidence, Judgement, judge, judge_first

NUM_BLOCKS, PER_BLOCK = 40, 12


def evidence(ours: dict[str, float], theirs: dict[str, float], *, num_blocks: int = NUM_BLOCKS) -> Evidence:
    """Both models right at these shares at each site, frames in blocks; the same luck for both."""
    rng = np.random.default_rng(0)
    right: list[list[float]] = [[], []]
    blocks, targets = [], []
    for site in ours:
        for block in range(num_blocks):
            luck = np.clip(rng.random(PER_BLOCK) + rng.normal(0, 0.05), 0, 1)
            right[0] += list((luck < ours[site]).astype(float))
            right[1] += list((luck < theirs[site]).astype(float))
            blocks += [(site, block)] * PER_BLOCK
            targets += list(np.arange(PER_BLOCK) % 4)
    return Evidence("accuracy", "held out", np.array(right[0]), np.array(right[1]), np.array(targets), blocks)


def judged(found: Evidence, *, old_sites: tuple[str, ...] = ("north", "street")) -> Judgement:
    return judge(found, champion=3, old_sites=old_sites, classes=CLASSES, max_fall_points=5.0)


def test_a_better_version_is_promoted_with_its_gain_in_words() -> None:
    found = judged(evidence({"north": 0.9, "street": 0.9}, {"north": 0.85, "street": 0.85}))
    assert found.verdict == "promote"
    points = found.metrics["all_points"]
    low, high = points["interval"]
    assert low < points["points"] < high
    assert 3 < points["points"] < 7
    assert found.why.startswith(
        f"accuracy {points['points']:+.1f} [{low:.1f}, {high:.1f}] points on 960 frames of 80"
    )
    assert set(found.metrics["class_points"]) == set(CLASSES)


def test_one_that_is_worse_for_sure_is_refused() -> None:
    found = judged(evidence({"north": 0.8}, {"north": 0.9}))
    assert (found.verdict, "worse for sure" in found.why) == ("refuse", True)


def test_one_that_may_be_worse_is_held() -> None:
    """Five frames lost in blocks of their own, three won in others: luck may have done that."""
    of = evidence({"north": 1.0}, {"north": 1.0}, num_blocks=12)
    of.ours[: 5 * PER_BLOCK : PER_BLOCK] = 0.0
    of.theirs[6 * PER_BLOCK : 9 * PER_BLOCK : PER_BLOCK] = 0.0
    found = judged(of)
    assert (found.verdict, "no better" in found.why) == ("hold", True)


def test_equal_answers_are_promoted() -> None:
    """A version that knows a new site answers as before at the old ones."""
    assert judged(evidence({"north": 0.9}, {"north": 0.9})).verdict == "promote"


def test_an_old_site_that_is_forgotten_refuses_what_gains_elsewhere() -> None:
    gains = evidence({"north": 0.95, "street": 0.7}, {"north": 0.6, "street": 0.85})
    found = judged(gains)
    assert found.metrics["all_points"]["points"] > 5
    assert found.verdict == "refuse"
    assert "site street fell by more than 5" in found.why
    assert judged(gains, old_sites=("north",)).verdict == "promote"  # nobody was served there before


def test_a_class_that_falls_waits_for_a_person() -> None:
    found = evidence({"north": 0.9}, {"north": 0.7})
    assert found.targets is not None
    found.ours[(found.targets == 2) & (np.arange(len(found.ours)) % 5 == 0)] = 0.0
    found.theirs[found.targets == 2] = 1.0
    judgement = judged(found)
    assert judgement.verdict == "hold"
    assert "class cyclist may have fallen" in judgement.why


def test_sites_that_nobody_could_look_at_are_named() -> None:
    found = judged(evidence({"north": 0.9}, {"north": 0.9}))
    assert found.metrics["sites_not_seen"] == ["street"]


def test_the_interval_is_wider_when_frames_of_a_block_fail_together() -> None:
    """Frames of one block are not independent: a random split would call this gain sure."""
    rng = np.random.default_rng(0)
    fate = np.repeat(rng.random(10) < 0.6, 100).astype(float)
    blocks = [("north", i // 100) for i in range(1000)]
    together = judged(Evidence("accuracy", "", fate, np.full(1000, 0.5), None, blocks))
    alone = judged(Evidence("accuracy", "", fate, np.full(1000, 0.5), None, [("north", i) for i in range(1000)]))
    width = {
        name: np.diff(of.metrics["all_points"]["interval"])[0] for name, of in (("t", together), ("a", alone))
    }
    assert width["t"] > 5 * width["a"]


@pytest.mark.parametrize(("share", "verdict"), [(0.6, "promote"), (0.25, "hold")])
def test_a_first_version_goes_live_when_it_beats_chance_for_sure(share: float, verdict: str) -> None:
    of = evidence({"north": share}, {"north": share})
    found = judge_first(
        of.ours, of.targets, chance=0.25, what="accuracy", basis="cross-validated", blocks=of.blocks,
        why_no_champion="first version",
    )  # fmt: skip
    assert found.verdict == verdict
    assert "first version; accuracy" in found.why


def test_a_first_version_that_cannot_be_tested_yet_goes_live_and_says_so() -> None:
    of = evidence({"north": 1.0}, {"north": 1.0}, num_blocks=2)
    found = judge_first(of.ours, of.targets, chance=0.25, what="", basis="", blocks=of.blocks, why_no_champion="x")
    assert (found.verdict, "too few to test it: by rule" in found.why) == ("promote", True)
