"""Does a heatmap find its picture? Radar to image and image to radar, among held-out instants.

Instants are thinned in time, so that each query has one right answer; chance is k of how many there are.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.evaluation import plots
from trainer.evaluation.bench import Bench
from trainer.evaluation.dataset import Dataset, Rows
from trainer.evaluation.pretrain import Pretrained, features_of, site_means
from trainer.evaluation.report import EvaluationError, Report
from trainer.evaluation.scores import bootstrap, by_session
from trainer.evaluation.split import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "Does a radar heatmap find the camera image of its instant, and an image its heatmap?"
CUTS = (1, 5, 10)
_MIN_INSTANTS = 4
"""Among fewer, finding the right one says nothing."""
_NUM_SHOWN, _NUM_FOUND = 6, 5


def study(bench: Bench, *, every_s: float = 3.0) -> Report:
    """Recall at 1, 5 and 10, among all sites and within one. every_s: between two instants of a site."""
    splits = bench.splits()
    report = Report("retrieval", QUESTION, bench.protocol(splits) | {"every_s": every_s})
    instants = {
        (split.name, part): _asked(bench, rows, part, every_s=every_s)
        for split in splits
        for part, rows in split.parts.items()
    }
    instants = as_many(bench.dataset, instants)
    for split in splits:
        for part in split.parts:
            asked = instants[split.name, part]
            for encoder in ("untrained", "contrastive"):
                found = [_found(bench, split, encoder, seed) for seed in bench.plan.seeds]
                report.table += _rows(bench, split, part, encoder, asked, found)
    shown_split = splits[0]
    part = list(shown_split.parts)[-1]
    asked = instants[shown_split.name, part]
    learnt = bench.learnt(shown_split.train, bench.plan.seeds[0])
    q, k = embed(bench, shown_split, learnt, asked)
    report.notes = [
        "gallery site: only instants of the query's own site, where knowing the site does not help.",
        "median_rank: of the right one, 1 is the best; frames: instants that were asked for, as many of a site in "
        "every split, since among more it is harder to find one.",
        f"the picture shows {part} instants, {shown_split.name} split, seed {bench.plan.seeds[0]}: query, then "
        "what was found, best first.",
    ]
    report.draw = lambda figure: draw_recall(figure, report)
    report.pictures["retrieval_examples"] = lambda figure: draw_examples(figure, bench.dataset, asked, q @ k.T)
    return report


def _asked(bench: Bench, rows: Rows, part: str, *, every_s: float) -> Rows:
    """Instants to ask for. Raises EvaluationError where there are too few to find one among."""
    with_image = rows[bench.dataset.has_key[rows]]
    asked = thinned(bench.dataset, with_image, every_s=every_s)
    if len(asked) >= _MIN_INSTANTS:
        return asked
    found = f"{len(with_image)} pairs of the part {part!r}, {len(asked)} of them {every_s:g} s apart"
    if len(with_image) < _MIN_INSTANTS:
        remedy = "evaluate on a longer recording"
    else:
        remedy = f"evaluate on a longer recording, or thin less: --every-s {every_s / 4:g}"
    raise EvaluationError(f"{found}, are too few to find one among (at least {_MIN_INSTANTS})", remedy=remedy)


def thinned(dataset: Dataset, rows: Rows, *, every_s: float) -> Rows:
    """Rows of one site at least `every_s` apart."""
    kept: list[int] = []
    last: tuple[int, int] | None = None
    for row in rows.tolist():
        site, at_ns = int(dataset.site[row]), int(dataset.at_ns[row])
        if last is None or last[0] != site or at_ns - last[1] >= every_s * 1e9:
            kept.append(row)
            last = (site, at_ns)
    return np.array(kept, np.int64)


def as_many(dataset: Dataset, instants: dict[tuple[str, str], Rows]) -> dict[tuple[str, str], Rows]:
    """Of each part as many instants of a site in every split: among more it is harder to find one.

    instants: rows by split and part. Of the longer ones those that are left are spread over all.
    """
    fewest: dict[tuple[str, int], int] = {}
    for (_, part), rows in instants.items():
        for site, num in enumerate(np.bincount(dataset.site[rows], minlength=len(dataset.sites)).tolist()):
            fewest[part, site] = min(num, fewest.get((part, site), num))
    found = {}
    for (split, part), rows in instants.items():
        by_site = [(rows[dataset.site[rows] == site], fewest[part, site]) for site in range(len(dataset.sites))]
        kept = [
            of_site[np.linspace(0, len(of_site) - 1, num).round().astype(int)] for of_site, num in by_site if num
        ]
        found[split, part] = np.concatenate([rows[:0], *kept])
    return found


def embed(bench: Bench, split: Split, found: Pretrained, rows: Rows) -> tuple[Tensor, Tensor]:
    """q, k: (n, D) float32, unit L2 norm: radar and image encodings where they meet."""
    dataset = bench.dataset
    q = found.learner.project(features_of(found.learner, dataset, rows))
    k = torch.from_numpy(dataset.key[rows].astype(np.float32))
    if bench.settings.centre_vision:
        k -= torch.from_numpy(site_means(dataset, split.train)[dataset.site[rows]])
    return q, torch.nn.functional.normalize(k, dim=1)


def ranks(similarity: Tensor, site: Rows | None = None) -> npt.NDArray[np.int64]:
    """(n,): how many candidates are better than the right one, on the diagonal. site: (n,): only those within."""
    right = similarity.diagonal()[:, None]
    better = similarity > right
    ties = (similarity == right).float()
    if site is not None:
        same = torch.from_numpy(site)[:, None] == torch.from_numpy(site)[None, :]
        better, ties = better & same, ties * same
    middle = better.sum(1) + ((ties.sum(1) - 1) / 2).floor().long()  # equal ones are not in our favour
    return np.asarray(middle.numpy(), np.int64)


def _found(bench: Bench, split: Split, encoder: str, seed: int) -> Pretrained:
    if encoder == "untrained":
        return bench.untrained(split.train, seed)
    return bench.learnt(split.train, seed, what=split.name)


def _rows(
    bench: Bench, split: Split, part: str, encoder: str, asked: Rows, found: list[Pretrained]
) -> list[dict[str, object]]:
    """A line for each direction and gallery."""
    dataset, site = bench.dataset, bench.dataset.site[asked]
    sizes = np.array([(site == one).sum() for one in site])
    similar = [q @ k.T for q, k in (embed(bench, split, one, asked) for one in found)]
    table: list[dict[str, object]] = []
    turned: dict[str, Callable[[Tensor], Tensor]] = {
        "radar to image": lambda s: s,
        "image to radar": lambda s: s.T,
    }
    for direction, turn in turned.items():
        for gallery, within in (("all", None), ("site", site)):
            per_seed = [ranks(turn(one), within) for one in similar]
            num = np.full(len(asked), len(asked)) if within is None else sizes
            row: dict[str, object] = {
                "split": split.name,
                "part": part,
                "encoder": encoder,
                "direction": direction,
                "gallery": gallery,
                "frames": len(asked),
                "sessions": len(np.unique(dataset.session[asked])),
                "seeds": len(found),
                "candidates": round(float(num.mean()), 1),
                "median_rank": round(float(np.median(1 + np.concatenate(per_seed))), 1),
            }
            for cut in CUTS:
                hits = by_session(dataset, [(asked, rank < cut) for rank in per_seed])
                row[f"recall_at_{cut}"] = bootstrap(*hits).report()
                row[f"chance_at_{cut}"] = round(float(np.minimum(1, cut / num).mean()), 4)
            table.append(row)
    return table


def draw_recall(figure: "Figure", report: Report) -> None:
    """Radar to image: recall against k, and chance. A line of panels a split; parts and galleries across."""
    splits = list(dict.fromkeys(row["split"] for row in report.table))
    columns = list(dict.fromkeys((row["part"], row["gallery"]) for row in report.table))
    cells = plots.panels(figure, len(splits), len(columns), width_in=3.3)
    for split, line in zip(splits, cells, strict=True):
        for (part, gallery), axes in zip(columns, line, strict=True):
            asked = (split, part, gallery, "radar to image")
            rows = [r for r in report.table if (r["split"], r["part"], r["gallery"], r["direction"]) == asked]
            cuts = [cut for cut in CUTS if rows[0][f"chance_at_{cut}"] < 1]
            for number, row in enumerate(rows):
                values = [row[f"recall_at_{cut}"] for cut in cuts]
                plots.curve(axes, cuts, values, label=row["encoder"], number=number)
            axes.plot(cuts, [100 * rows[0][f"chance_at_{cut}"] for cut in cuts], "k--", lw=1, label="chance")
            among = "all instants" if gallery == "all" else "those of its site"
            candidates = f"found among {among}, {rows[0]['candidates']:g}"
            axes.set_title(f"{plots.title(split, part, rows[0])}\n{candidates}", fontsize=8)
            axes.set_xticks(CUTS)
            axes.set_xlabel("k")
            axes.set_ylabel("recall at k, %")
            axes.grid(alpha=0.3)
    plots.finish(figure, report.protocol)


def draw_examples(figure: "Figure", dataset: Dataset, asked: Rows, similarity: Tensor) -> None:
    """Queries, one a line: heatmap, its own image, the images found; the right one has a green frame."""
    spread = np.linspace(0, len(asked) - 1, min(_NUM_SHOWN, len(asked))).astype(int)
    num_columns = 2 + min(_NUM_FOUND, len(asked))
    figure.set_size_inches(1.7 * num_columns, 1.75 * len(spread))
    cells = figure.subplots(len(spread), num_columns, squeeze=False)
    for line, query in zip(cells, spread.tolist(), strict=True):
        for cell in line:
            cell.set_xticks([])
            cell.set_yticks([])
        line[0].imshow(dataset.heatmap[asked[query]][-1].astype(np.float32), aspect="auto", origin="lower")
        line[0].set_ylabel(f"{dataset.sites[dataset.site[asked[query]]]}\nrange", fontsize=7)
        line[1].imshow(image_of(dataset, int(asked[query])))
        best = similarity[query].argsort(descending=True)[: num_columns - 2].tolist()
        for cell, candidate in zip(line[2:], best, strict=True):
            cell.imshow(image_of(dataset, int(asked[candidate])))
            cell.set_xlabel(f"{similarity[query, candidate]:.2f}", fontsize=7)
            for spine in cell.spines.values():
                spine.set_color("limegreen" if candidate == query else "grey")
                spine.set_linewidth(3 if candidate == query else 0.5)
    for cell, title in zip(
        cells[0], ["heatmap, dB", "its image", *(f"found {i}" for i in range(1, num_columns - 1))], strict=True
    ):
        cell.set_title(title, fontsize=8)
    cells[-1][0].set_xlabel("azimuth", fontsize=7)
    figure.suptitle(
        "each heatmap is asked for its image; numbers: cosine; a green frame is the right one", fontsize=8
    )


def image_of(dataset: Dataset, row: int) -> npt.NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB, small; grey where the image is gone."""
    camera = dataset.pairs[row].camera()
    found = None if camera is None else cv2.imdecode(np.frombuffer(camera.image, np.uint8), cv2.IMREAD_COLOR)
    if found is None:
        return np.full((112, 112, 3), 128, np.uint8)
    height, width = found.shape[:2]
    small = cv2.resize(found, (160, max(1, round(160 * height / width))), interpolation=cv2.INTER_AREA)
    return np.asarray(small[..., ::-1], np.uint8)
