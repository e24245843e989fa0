"""Every study end to end on a tiny store: it learns, asks, and leaves its files with what they promise."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from matplotlib.figure import Figure

from services.core.errors import SettingsError
from services.core.frames import CLASSES
from trainer.evaluation import efficiency, embedding, ksweep, linear, reproduce, retrieval, temporal
from trainer.evaluation.bench import Bench
from trainer.evaluation.classifier import Recipe, train_classifier, tune
from trainer.evaluation.dataset import UNLABELLED
from trainer.evaluation.efficiency import Budget
from trainer.evaluation.report import EvaluationError, Report
from trainer.evaluation.retrieval import ranks

QUICK = Budget(is_tuned=False, max_steps=4)


def written(report: Report, out_dir: Path) -> tuple[dict, list[dict[str, str]]]:
    """JSON and CSV as they were written; every picture is a PNG, and every axis of the figure says what it is."""
    paths = report.write(out_dir)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in paths} == {".json", ".csv", ".png"}
    found = orjson.loads((out_dir / f"{report.name}.json").read_bytes())
    assert found["study"] == report.name
    assert found["protocol"]["data"]["fingerprint"]
    assert found["protocol"]["settings"]["queue_size"]
    with (out_dir / f"{report.name}.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found["table"]) > 0
    for row in table:
        assert int(row["frames"]) > 0
        assert int(row["sessions"]) > 0
        assert int(row["seeds"]) == len(found["protocol"]["seeds"])
    assert_legible(report)
    return found, table


def assert_legible(report: Report) -> None:
    """A figure fits a page, names its axes, tells its lines apart, and says what its intervals rest on."""
    assert report.draw is not None
    figure = Figure(layout="constrained")
    report.draw(figure)
    assert max(figure.get_size_inches()) <= 15
    figure.draw_without_rendering()
    (legend,) = figure.legends
    inside = figure.bbox.padded(1)
    assert all(inside.contains(*corner) for corner in legend.get_window_extent().corners())
    assert "seed" in figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_title()
        if axes.get_subplotspec().is_last_row():
            assert axes.get_xlabel()
        if axes.get_subplotspec().is_first_col():
            assert axes.get_ylabel()


def test_linear_asks_test_unseen_and_generic_with_all_and_few_labels(bench: Bench, tmp_path: Path) -> None:
    found, table = written(linear.study(bench), tmp_path / "out")
    assert {row["split"] for row in table} == {"sessions", "random"}
    assert {row["part"] for row in table} == {"test", "unseen", "unseen, generic"}
    assert {row["labels"] for row in table} == {"all", "1 %", "40 in all"}
    assert {row["encoder"] for row in table} == {"untrained", "contrastive", "camera"}
    assert all(0 <= float(row["accuracy_low"]) <= float(row["accuracy_high"]) <= 1 for row in table)
    split = found["protocol"]["splits"][0]
    of_all = {row["num_labels"] for row in table if (row["split"], row["labels"]) == ("sessions", "all")}
    assert of_all == {str(sum(split["labels"]["train"].values()))}
    details = found["details"]["sessions/contrastive/all/test"]
    assert np.sum(details["confusion"]["counts"]) == 2 * details["frames"]
    assert len(details["per_seed"]) == 2
    assert found["details"]["curves"]["sessions/seed 0"][-1]["step"] == 5
    assert float(next(row["learning_cpu_s"] for row in table if row["encoder"] == "contrastive")) >= 0


def test_what_was_learnt_is_kept_and_gives_the_same_answers(bench: Bench) -> None:
    bench.plan = replace(bench.plan, split="sessions", seeds=(0,))
    rows = bench.main_split().train
    first = bench.features(bench.learnt(rows, 0).learner, rows)
    again = Bench(bench.dataset, bench.settings, bench.plan, bench.bars, bench.encoders_dir)
    found = again.learnt(rows, 0)
    torch.testing.assert_close(again.features(found.learner, rows), first)
    torch.testing.assert_close(found.learner.project(first), bench.learnt(rows, 0).learner.project(first))
    assert found.cost.steps == 6
    assert len(list(bench.encoders_dir.glob("*.pt"))) == 1
    other = bench.learnt(bench.main_split().train, 0, queue_size=24)
    assert other.learner.settings.queue_size == 24
    assert len(list(bench.encoders_dir.glob("*.pt"))) == 2


def test_efficiency_compares_three_methods_on_the_same_labels(bench: Bench, tmp_path: Path) -> None:
    bench.plan = replace(bench.plan, split="sessions")
    found, table = written(efficiency.study(bench, shares=(0.25, 1.0), budget=QUICK), tmp_path)
    assert {row["method"] for row in table} == {"linear", "finetune", "supervised"}
    assert {row["labels_percent"] for row in table} == {"25.0", "100.0"}
    assert all(row["gain"] for row in table if row["method"] != "supervised")
    assert found["details"]["sessions/finetune/1.0/test"]["recipe"]["encoder_rate"] < 1e-3
    assert any("by the grid's first recipe with 4 steps: it was not tuned" in note for note in found["notes"])
    per_share = {(row["labels_percent"], row["labels"]) for row in table}
    assert len(per_share) == 2


def test_few_labels_are_shown_as_many_as_were_drawn(bench: Bench) -> None:
    """One percent of 60 labels is none: a block of each class is drawn, as it is for five percent."""
    bench.plan = replace(bench.plan, split="both", seeds=(0,))
    report = efficiency.study(bench, methods=("supervised",), shares=(0.01, 0.05, 1.0), budget=QUICK)
    drawn = {(row["split"], row["labels_percent"]): row["labels"] for row in report.table}
    assert drawn["sessions", 1] == drawn["sessions", 5] < drawn["sessions", 100]
    assert any(
        f"sessions split: 1/5 % of the labels are the same {drawn['sessions', 1]}" in n for n in report.notes
    )
    figure = Figure()
    report.draw(figure)
    for axes in figure.axes:
        split = "sessions" if "sessions held out" in axes.get_title() else "random"
        few, most = drawn[split, 1], drawn[split, 100]
        assert axes.get_xticks().tolist() == [few, most]
        assert [text.get_text() for text in axes.get_xticklabels()] == [f"{few}\n1/5 %", f"{most}\n100 %"]
        assert axes.xaxis.get_tick_params()["labelbottom"]  # the splits have other numbers
        assert axes.lines[0].get_xdata().tolist() == [few, few, most]


def test_supervised_baseline_is_tuned_on_its_own_labels(bench: Bench) -> None:
    bench.plan = replace(bench.plan, split="sessions", seeds=(0,))
    report = efficiency.study(
        bench, name="supervised", methods=("supervised",), shares=(1.0,), budget=Budget(max_steps=2)
    )
    assert any("its recipe was chosen on a validation part" in note for note in report.notes)
    tried = report.details["tuning/sessions/supervised/1"]
    assert len(tried) >= 6
    assert {one["encoder_rate"] for one in tried} == {3e-4, 1e-3, 3e-3}
    assert {one["is_augmented"] for one in tried} == {True, False}
    best = max(tried, key=lambda one: (one["accuracy"], -one["loss"]))
    chosen = report.details["sessions/supervised/1.0/test"]["recipe"]
    assert {name: best[name] for name in chosen} == chosen


def test_coordinate_search_keeps_what_was_better() -> None:
    start = Recipe(1e-3, 1e-3, steps=10)
    axes = [[start], [replace(start, steps=20), replace(start, steps=5)], [replace(start, is_augmented=False)]]
    best, tried = tune(
        lambda recipe: recipe,  # type: ignore[arg-type,return-value]
        lambda recipe: {"accuracy": recipe.steps / 100, "loss": float(recipe.is_augmented)},  # type: ignore[attr-defined]
        axes,
    )
    assert (best.steps, best.is_augmented) == (20, False)
    assert len(tried) == 4


def test_classifier_learns_what_can_be_learnt(bench: Bench) -> None:
    split = bench.main_split()
    recipe = Recipe(1e-3, 1e-3, steps=40, is_augmented=False)
    rows, asked = split.train, split.test
    found = train_classifier(
        bench.untrained(split.train, 0).learner, bench.dataset, rows, recipe, seed=0, watch=asked, watch_every=20
    )
    assert [point.step for point in found.curve] == [0, 20, 40]
    assert found.curve[-1].is_right.mean() > 0.9
    assert found.curve[-1].loss.mean() < found.curve[0].loss.mean()
    assert found.penultimate(bench.dataset, asked).shape == (len(asked), 128)


def test_ksweep_learns_once_for_each_k(bench: Bench, tmp_path: Path) -> None:
    bench.plan = replace(bench.plan, split="sessions")
    found, table = written(ksweep.study(bench, sweep=((8, 16), (16, 16))), tmp_path)
    assert {(row["batch"], row["K"]) for row in table} == {("8", "16"), ("16", "16")}
    assert found["protocol"]["in_batch_negatives"] is False
    assert any("all took 6 steps: a larger batch has seen more pairs" in note for note in found["notes"])
    assert all(row["gain"] is None for row in found["table"])  # the first K of its batch size
    more = ksweep.study(bench, sweep=((8, 16), (8, 24))).table
    of_k16, of_k24 = (next(row for row in more if (row["K"], row["part"]) == (k, "test")) for k in (16, 24))
    assert of_k24["gain"]["mean"] == pytest.approx(
        of_k24["accuracy"]["mean"] - of_k16["accuracy"]["mean"], abs=2e-4
    )
    assert len(bench.known) == 6
    assert [float(row["chance"]) for row in table if row["part"] == "test"] == pytest.approx(
        [np.log(17)] * 2, 1e-3
    )


def test_tsne_has_three_panels_and_the_paper_has_two(bench: Bench, tmp_path: Path) -> None:
    found, table = written(embedding.study(bench, max_points=24, budget=QUICK), tmp_path)
    assert [row["panel"] for row in table[:3]] == ["random weights, frozen", "contrastive, frozen", "fine-tuned"]
    assert {row["split"] for row in table} == {"sessions", "random"}
    points = found["details"]["points"]["sessions/test/contrastive, frozen"]
    assert np.array(points["xy"]).shape == (len(points["label"]), 2)
    assert all(0 <= float(row["knn_low"]) <= float(row["knn"]) <= float(row["knn_high"]) <= 1 for row in table)
    assert len(found["details"]["random/test/fine-tuned"]["per_seed"]) == 2


def test_neighbours_say_what_most_of_them_are_and_not_what_a_frame_itself_is() -> None:
    x = np.concatenate([np.zeros((12, 3)), np.ones((12, 3))]) + np.linspace(0, 1e-3, 24)[:, None]
    labels = np.repeat([1, 3], 12)
    labels[0] = 3  # alone among others: what they say counts
    assert embedding._neighbours_say(x, labels).tolist() == [1] * 12 + [3] * 12


def test_retrieval_reports_both_directions_against_chance(bench: Bench, tmp_path: Path) -> None:
    _, table = written(retrieval.study(bench, every_s=1.0), tmp_path)
    assert (tmp_path / "retrieval_examples.png").exists()
    assert {row["direction"] for row in table} == {"radar to image", "image to radar"}
    assert {row["gallery"] for row in table} == {"all", "site"}
    assert all(1 <= float(row["median_rank"]) <= float(row["candidates"]) for row in table)
    row = table[0]
    assert float(row["chance_at_1"]) == pytest.approx(1 / float(row["candidates"]), rel=0.01)


def test_splits_are_asked_among_as_many_candidates(bench: Bench) -> None:
    few, many = np.array([0, 9, 50]), np.arange(0, 96, 5)
    found = retrieval.as_many(bench.dataset, {("sessions", "test"): few, ("random", "test"): many})
    site = bench.dataset.site
    assert found["sessions", "test"].tolist() == few.tolist()
    kept = found["random", "test"]
    assert np.bincount(site[kept], minlength=3).tolist() == np.bincount(site[few], minlength=3).tolist()
    assert set(kept) <= set(many)
    assert len(set(kept)) == len(kept)


def test_retrieval_among_too_few_instants_refuses_and_says_what_to_do(bench: Bench) -> None:
    with pytest.raises(EvaluationError, match=r"--every-s 250"):
        retrieval.study(bench, every_s=1000.0)
    bench.dataset.has_key[:] = False
    with pytest.raises(EvaluationError, match=r"longer recording$"):
        retrieval.study(bench, every_s=0.1)


def test_encodings_that_know_nothing_find_their_image_by_chance() -> None:
    torch.manual_seed(0)
    similarity = torch.randn(400, 400)
    rank = ranks(similarity)
    assert (rank < 40).mean() == pytest.approx(0.1, abs=0.05)
    assert (ranks(torch.zeros(101, 101)) == 50).all()  # all equal: in the middle, not first
    assert (ranks(torch.eye(5)) == 0).all()
    assert ranks(torch.ones(4, 4) - torch.eye(4), np.array([0, 0, 1, 1])).tolist() == [1, 1, 1, 1]


def test_untrained_encoder_is_at_chance_in_retrieval(bench: Bench) -> None:
    bench.plan = replace(bench.plan, split="sessions", seeds=(0, 1, 2), steps=1)
    report = retrieval.study(bench, every_s=1.0)
    rows = [
        r for r in report.table if r["encoder"] == "untrained" and r["gallery"] == "all" and r["part"] == "unseen"
    ]
    for row in rows:
        assert row["recall_at_5"]["mean"] == pytest.approx(row["chance_at_5"], abs=0.15)


def test_temporal_tests_before_it_learns(bench: Bench, tmp_path: Path) -> None:
    bench.plan = replace(bench.plan, seeds=(0,))
    _, table = written(temporal.study(bench, num_chunks=3), tmp_path)
    stream = [row for row in table if row["curve"] == "prequential" and row["part"] == "next chunk"]
    assert {(row["model"], row["chunk"]) for row in stream} == {
        (model, chunk) for model in ("learning on", "frozen") for chunk in ("1", "2")
    }
    after = [float(row["hours"]) for row in table if row["curve"] == "past and future"]
    assert after == sorted(after)
    assert min(after) > 0


def test_more_chunks_than_frames_are_refused(bench: Bench) -> None:
    with pytest.raises(EvaluationError, match=r"96 frames cannot be cut into 97 chunks.*--chunks 4"):
        temporal.study(bench, num_chunks=97)


def test_stream_is_not_asked_for_what_it_has_just_learnt(bench: Bench) -> None:
    dataset = bench.dataset
    rows = np.flatnonzero(dataset.site == 0)
    known, following = rows[:20], rows[20:30]
    asked = temporal._after(dataset, known, following, guard_s=5.0)
    since_s = (dataset.at_ns[asked] - dataset.at_ns[known[-1]]) / 1e9
    assert since_s.min() > 5
    assert set(following) - set(asked) == set(following[:2])  # 2 and 4 s after
    assert set(temporal._after(dataset, known, following, guard_s=0.0)) == set(following)


@pytest.mark.parametrize("figure", ["fig4", "fig5", "fig6", "fig7"])
def test_figure_of_the_paper_by_its_protocol_at_a_scale(
    bench: Bench, figure: reproduce.FigureName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ksweep, "SWEEP", ((16, 16), (16, 32)))
    monkeypatch.setattr(efficiency, "SHARES", (0.5, 1.0))
    bench.plan = replace(bench.plan, split="random", seeds=(0,))
    report = reproduce.study(bench, figure, scale=reproduce.Scale(0.001))
    found, table = written(report, tmp_path)
    assert found["details"]["paper"]["says"]
    assert found["details"]["at_scale_1"]["is_extrapolated"]
    assert found["protocol"]["epochs"]["contrast"] == 1
    if figure == "fig5":
        drawn = Figure()
        report.draw(drawn)
        assert "the paper, all labels: 97 %" in [text.get_text() for text in drawn.legends[0].get_texts()]
    if figure == "fig6":
        assert {row["method"] for row in table} == {"finetune 32", "supervised 128"}
        assert all(0 < float(row["test_loss_low"]) <= float(row["test_loss_high"]) for row in table)
        assert {row["method"] for row in table if float(row["epoch"]) == 0} == {"finetune 32", "supervised 128"}


def test_paper_protocol_without_vgg_weights_says_where_to_put_them(
    settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    paper = settings.model_copy(update={"radar_encoder": "vgg16"})
    with pytest.raises(SettingsError, match="ECHOSIGHT_RADAR_WEIGHTS"):
        reproduce.paper_settings(paper, reproduce.Scale(0.02))
    changes = reproduce.paper_settings(settings, reproduce.Scale(0.02))
    assert changes == {"max_replays": 8.0}


def test_epochs_of_the_paper_are_settings(bench: Bench) -> None:
    """Names, epochs and what is told follow."""
    bench.plan = replace(bench.plan, split="random", seeds=(0,))
    scale = reproduce.Scale(0.5, {**reproduce.EPOCHS, "finetune": 6, "supervised": 32, "contrast": 100})
    assert reproduce.paper_settings(bench.settings, scale) == {"max_replays": 50.0}
    report = reproduce.study(bench, "fig6", scale=scale)
    assert {row["method"] for row in report.table} == {"finetune 6", "supervised 32"}
    last = {row["method"]: row["epoch"] for row in report.table}
    assert last == pytest.approx({"finetune 6": 3, "supervised 32": 16}, abs=0.5)  # of two batches an epoch
    assert report.protocol["epochs"]["finetune"] == 3
    assert "other epochs at scale 1 than the paper's: contrast 100, finetune 6, supervised 32." in report.notes
    drawn = Figure()
    report.draw(drawn)
    named = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert named == {"finetune, 3 epochs (scale 1: 6)", "supervised, 16 epochs (scale 1: 32)"}


def test_without_labels_studies_of_labels_refuse(bench: Bench) -> None:
    bench.dataset.label[:] = UNLABELLED
    bench.plan = replace(bench.plan, split="sessions", seeds=(0,))
    refused: list[Callable[[Bench], Report]] = [
        *(linear.study, efficiency.study, ksweep.study, embedding.study, temporal.study),
        lambda bench: reproduce.study(bench, "fig6", scale=reproduce.Scale(0.001)),
    ]
    for study in refused:
        with pytest.raises(SettingsError, match="no frame has a label"):
            study(bench)
    assert retrieval.study(bench, every_s=1.0).table
    bench.dataset.label[:3] = CLASSES.index("car")
    with pytest.raises(SettingsError, match="all 3 labels say car"):
        linear.study(bench)


def test_what_a_split_cannot_tell_is_said(bench: Bench) -> None:
    assert bench.warnings(bench.splits()) == []
    test = bench.main_split().test
    bench.dataset.label[test[:3]] = CLASSES.index("cyclist")
    bench.plan = replace(bench.plan, split="sessions")
    (said,) = bench.warnings(bench.splits())
    assert "sessions split, test: 3 frames are cyclist" in said
    bench.dataset.session[:] = 0
    bench.plan = replace(bench.plan, split="random")
    assert ["one session" in said for said in bench.warnings(bench.splits())] == [True, True]


def test_confusion_matrices_of_many_cases_fit_a_page(bench: Bench) -> None:
    bench.plan = replace(bench.plan, seeds=(0,))
    report = efficiency.study(bench, shares=(1.0,), budget=QUICK)
    figure = Figure(layout="constrained")
    report.pictures["efficiency_confusion"](figure)
    assert len(figure.axes) == 12
    assert max(figure.get_size_inches()) <= 15
