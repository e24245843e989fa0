"""What Prometheus scrapes of the trainer: names, labels, base units; nothing that was not read yet."""

import shutil
import subprocess

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from trainer.metrics import TrainerMetrics

COUNTERS = {
    "steps": 120,
    "learnt_pairs": 7680,
    "encoded_images": 900,
    "rollbacks": 2,
    "pairs": 800,
    "pending_pairs": 3,
    "skipped_pairs": 1,
    "checkpoint_age_seconds": 12.5,
}
READINGS = {
    "step": 118,
    "loss": 4.5,
    "chance": 6.2,
    "mi_nats": 1.7,
    "held_out_loss": 4.0,
    "held_out_chance": 5.0,
    "held_out_mi_nats": 1.0,
    "held_out_pairs": 240,
    "r1": 0.1,
    "r5": 0.4,
    "r1_chance": 0.004,
    "r5_chance": 0.02,
    "alignment": 1.1,
    "uniformity": -2.5,
    "rank": 20.5,
    "std": 0.6,
    "probe": {
        "num_trained": 90,
        "num_tested": 12,
        "linear": {"accuracy": 0.8, "recall": {"car": 0.9}},
        "knn": {"accuracy": 0.7, "recall": {"car": 0.6}},
    },
    "sites": {
        "north": {
            "lag_ms": 198.0,
            "lag_low_ms": 150.0,
            "lag_high_ms": 240.0,
            "lag_pairs": 900,
            "levels": {"radar_mean": 0.3},
            "changes": {"radar": 2},
        },
        "south": {"levels": {}, "changes": {}},
    },
    "alarms": ["sync_lag north"],
    "cost_share": 0.012,
}


def text_of(readings: dict) -> str:
    return generate_latest(TrainerMetrics(lambda: COUNTERS, lambda: readings).registry).decode()


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_and_every_gauge_are_scraped_in_base_units() -> None:
    found = samples(text_of(READINGS))
    expected = {
        ("steps_total", ()): 120,
        ("learnt_pairs_total", ()): 7680,
        ("encoded_images_total", ()): 900,
        ("rollbacks_total", ()): 2,
        ("checkpoint_age_seconds", ()): 12.5,
        ("loss_nats", ("learnt",)): 4.5,
        ("chance_nats", ("held_out",)): 5.0,
        ("mutual_information_nats", ("held_out",)): 1.0,
        ("retrieval_ratio", ("5",)): 0.4,
        ("retrieval_chance_ratio", ("1",)): 0.004,
        ("effective_rank", ()): 20.5,
        ("feature_std", ()): 0.6,
        ("alignment", ()): 1.1,
        ("uniformity", ()): -2.5,
        ("probe_accuracy_ratio", ("knn",)): 0.7,
        ("probe_recall_ratio", ("car", "linear")): 0.9,
        ("sync_lag_seconds", ("north",)): 0.198,
        ("drift_changes_total", ("radar", "north")): 2,
        ("level", ("radar_mean", "north")): 0.3,
        ("alarm", ("sync_lag", "north")): 1,
        ("gauges_cost_ratio", ()): 0.012,
    }
    assert {at: found[f"echosight_trainer_{at[0]}", at[1]] for at in expected} == pytest.approx(expected)
    assert ("echosight_trainer_sync_lag_seconds", ("south",)) not in found
    assert any(name == "process_resident_memory_bytes" for name, _ in found)


def test_before_the_first_reading_only_counters_are_there() -> None:
    found = samples(text_of({}))
    assert found["echosight_trainer_steps_total", ()] == 120
    assert not any(name.endswith(("_nats", "_ratio", "_rank")) for name, _ in found)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_complain_about() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text_of(READINGS), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
