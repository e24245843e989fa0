"""May a version be served? Candidate against champion, on the same frames, by rules that can be read.

    refuse    it is worse for sure: the whole interval of the difference lies below zero
    hold      it is not shown to be as good, or a site or class fell; a person may promote it, or the next may do
    promote   it got as much right or more, and no site that the champion knew fell by more than allowed

A difference is in points (hundredths of all frames), its 95 % interval a bootstrap over blocks of time, paired:
both models see the same blocks. Pure: it knows neither encoders nor the store.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.core.registry import Verdict
from trainer.head import Block

MIN_BLOCKS = 5
"""With fewer a bootstrap says nothing."""
_MIN_FRAMES_OF_PART = 20
"""Of a site or a class: with fewer its fall is shown, but stops nothing."""
_NUM_DRAWS = 2000
_INTERVAL = (2.5, 97.5)
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judgement:
    """words: what goes into the history. details: the numbers behind them, for the manifest."""

    verdict: Verdict
    why: str
    details: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "why": self.why} | self.details


@dataclass(frozen=True, slots=True)
class Evidence:
    """What two models got right on the same frames.

    what: of what it is a share, for people: "accuracy" or "R@5". basis: where the frames are from, for people.
    ours, theirs: (N,) float64, 1 where right. targets: (N,) int64, None without names. blocks: N, site first.
    """

    what: str
    basis: str
    ours: Array
    theirs: Array
    targets: npt.NDArray[np.int64] | None
    blocks: Sequence[Block]

    @property
    def is_enough(self) -> bool:
        return len(set(self.blocks)) >= MIN_BLOCKS


def judge(
    evidence: Evidence,
    *,
    champion: int,
    old_sites: Collection[str],
    classes: Sequence[str],
    max_fall_points: float,
) -> Judgement:
    """Compare with the version `champion`. old_sites: which of the sites it knew."""
    parts: dict[tuple[str, str], npt.NDArray[np.bool_]] = {("all", ""): np.ones(len(evidence.ours), bool)}
    sites = np.array([site for site, _ in evidence.blocks])
    parts |= {("site", str(site)): sites == site for site in np.unique(sites)}
    if evidence.targets is not None:
        parts |= {
            ("class", name): evidence.targets == i
            for i, name in enumerate(classes)
            if (evidence.targets == i).any()
        }
    gain = evidence.ours - evidence.theirs
    points, draws = _bootstrap(gain, list(parts.values()), evidence.blocks)
    found = {
        part: _Difference(points[i], *_interval(draws[:, i]), int(parts[part].sum()))
        for i, part in enumerate(parts)
    }
    overall = {"all": found["all", ""]}
    of_class = [i for i, (kind, _) in enumerate(parts) if kind == "class"]
    if of_class:
        mean = _Difference(
            float(points[of_class].mean()), *_interval(draws[:, of_class].mean(1)), len(evidence.ours)
        )
        overall["balanced"] = mean
    verdict, reasons = _decide(overall, found, old_sites=old_sites, max_fall_points=max_fall_points)
    num_blocks = len(set(evidence.blocks))
    words = f"{evidence.what} {found['all', '']} points on {len(gain)} frames of {num_blocks} blocks"
    words += f" ({evidence.basis})"
    words += _worst_site(found, old_sites)
    details: dict[str, Any] = {
        "against": champion,
        "what": evidence.what,
        "basis": evidence.basis,
        "num_frames": len(gain),
        "num_blocks": num_blocks,
        "ours": round(float(evidence.ours.mean()), 4),
        "theirs": round(float(evidence.theirs.mean()), 4),
        **{f"{name}_points": difference.row() for name, difference in overall.items()},
        "site_points": {name: row.row() for (kind, name), row in found.items() if kind == "site"},
        "class_points": {name: row.row() for (kind, name), row in found.items() if kind == "class"},
        "sites_not_seen": sorted(set(old_sites) - set(sites.tolist())),
    }
    return Judgement(verdict, "; ".join([words, *reasons]), details)


def judge_first(
    right: Array,
    targets: npt.NDArray[np.int64] | None,
    *,
    chance: float,
    what: str,
    basis: str,
    blocks: Sequence[Block],
    why_no_champion: str,
) -> Judgement:
    """A version that has nothing to be compared with goes live if it surely beats chance, or cannot be tested yet.

    right: (N,) float64; chance: what a blind guess would get. targets: weighs classes alike; None: frames.
    """
    num_blocks = len(set(blocks))
    details = {"what": what, "basis": basis, "num_frames": len(right), "num_blocks": num_blocks}
    if num_blocks < MIN_BLOCKS:
        why = f"{why_no_champion}; {len(right)} frames of {num_blocks} blocks are too few to test it: by rule"
        return Judgement("promote", why, details)
    masks = [np.ones(len(right), bool)] if targets is None else [targets == i for i in np.unique(targets)]
    shares, draws = _bootstrap(right, masks, blocks)
    low, high = _interval(draws.mean(1))
    reached = float(shares.mean())
    verdict: Verdict = "promote" if low > 100 * chance else "hold"
    beats = "beats chance" if verdict == "promote" else "does not clearly beat chance"
    why = (
        f"{why_no_champion}; {what} {reached:.1f} % [{low:.1f}, {high:.1f}] {beats} ({100 * chance:.1f} %)"
        f" on {len(right)} frames of {num_blocks} blocks ({basis})"
    )
    return Judgement(
        verdict,
        why,
        details | {"percent": round(reached, 2), "interval": [round(low, 2), round(high, 2)], "chance": chance},
    )


@dataclass(frozen=True, slots=True)
class _Difference:
    points: float
    low: float
    high: float
    num_frames: int

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:.1f}, {self.high:.1f}]"

    def row(self) -> dict[str, Any]:
        return {
            "points": round(float(self.points), 2),
            "interval": [round(self.low, 2), round(self.high, 2)],
            "frames": self.num_frames,
        }


def _decide(
    overall: dict[str, _Difference],
    found: dict[tuple[str, str], _Difference],
    *,
    old_sites: Collection[str],
    max_fall_points: float,
) -> tuple[Verdict, list[str]]:
    """The rules, strictest first. Each reason is a clause."""
    refused = [
        f"worse for sure{'' if name == 'all' else ', classes weighed alike: ' + str(difference)}"
        for name, difference in overall.items()
        if difference.high < 0
    ]
    fallen = {
        part: difference
        for part, difference in found.items()
        if difference.points < -max_fall_points and difference.num_frames >= _MIN_FRAMES_OF_PART
        if part[0] == "class" or (part[0] == "site" and part[1] in old_sites)
    }
    sure = [(part, row) for part, row in fallen.items() if part[0] == "site" and row.high < 0]
    refused += [f"site {name} fell by more than {max_fall_points:g}: {row}" for (_, name), row in sure]
    if refused:
        return "refuse", refused
    held = [
        f"{kind} {name} may have fallen by more than {max_fall_points:g}: {row}"
        for (kind, name), row in fallen.items()
    ]
    if overall["all"].points < 0:
        held.append("no better")
    return ("hold", held) if held else ("promote", [])


def _worst_site(found: dict[tuple[str, str], _Difference], old_sites: Collection[str]) -> str:
    """ "; street -0.2": the site that fell most, where there are several."""
    rows = {name: row.points for (kind, name), row in found.items() if kind == "site" and name in old_sites}
    if len(rows) < 2:
        return ""
    worst = min(rows, key=lambda name: rows[name])
    return f"; {worst} {rows[worst]:+.1f}"


def _bootstrap(
    values: Array, masks: Sequence[npt.NDArray[np.bool_]], blocks: Sequence[Block]
) -> tuple[Array, Array]:
    """Means of `values` over each mask, times 100: as they are (S,), and in each draw of blocks (draws, S).

    A draw that holds no frame of a mask takes its mean over all.
    """
    numbers = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    at = np.array([numbers[block] for block in blocks])
    sums = np.stack([np.bincount(at, values * mask, len(numbers)) for mask in masks], 1)  # (M, S)
    counts = np.stack([np.bincount(at, mask, len(numbers)) for mask in masks], 1)
    means = 100 * sums.sum(0) / counts.sum(0)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=_NUM_DRAWS)  # (draws, M)
    weight = drawn @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.where(weight > 0, 100 * (drawn @ sums) / weight, means)
    return means, draws


def _interval(draws: Array) -> tuple[float, float]:
    low, high = np.percentile(draws, _INTERVAL)
    return float(low), float(high)
