"""What Prometheus scrapes of ingest: names, labels, and counters that never go back."""

import socket
import urllib.request
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.core.errors import SettingsError
from services.ingest.metrics import IngestMetrics
from services.ingest.site import Tally


def sites(**ours: object) -> SimpleNamespace:
    tally = Tally(num_stored=7, num_evicted=2, num_lost=1)
    tally.frames.update({("radar", "paired"): 7, ("camera", "no_partner"): 3})
    curator = SimpleNamespace(counts={("north", "near_duplicate"): 4})
    return SimpleNamespace(
        ours=ours, tallies={"north": tally}, curator=curator, num_replicas=2, num_evicted=lambda _: 5
    )


def site() -> SimpleNamespace:
    writer = type("Writer", (), {"num_bytes": 1000, "__len__": lambda _: 40})()
    clock = SimpleNamespace(offset_ns=-12_000_000)
    return SimpleNamespace(writer=writer, num_waiting_bytes=10, num_decided_bytes=5, clock=clock)


def scraped(metrics: IngestMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Sample name and label values (in the order of the labels' names) to value, over HTTP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = metrics.serve(host="127.0.0.1", port=port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        stop()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_reason_of_every_site_is_scraped() -> None:
    metrics = IngestMetrics(sites(north=site()), num_trimmed=lambda: {"north": 9})
    metrics.latency.labels("north").observe(0.12)
    found = scraped(metrics)
    assert found["echosight_ingest_frames_total", ("paired", "radar", "north")] == 7
    assert found["echosight_ingest_frames_total", ("no_partner", "camera", "north")] == 3
    assert found["echosight_ingest_stored_pairs_total", ("north",)] == 7
    assert found["echosight_store_evicted_pairs_total", ("north",)] == 5
    assert found["echosight_streams_trimmed_entries_total", ("north",)] == 9
    assert found["echosight_streams_lost_entries_total", ("north",)] == 1
    assert found["echosight_curation_pairs_total", ("near_duplicate", "north")] == 4
    assert found["echosight_store_pairs", ("north",)] == 40
    assert found["echosight_store_bytes", ("north",)] == 1000
    assert found["echosight_ingest_waiting_bytes", ("north",)] == 15
    assert found["echosight_ingest_clock_offset_seconds", ("north",)] == -0.012
    assert found["echosight_ingest_replicas", ()] == 2
    assert found["echosight_ingest_latency_seconds_count", ("north",)] == 1


def test_counters_stay_when_the_site_goes_to_another_replica() -> None:
    found = scraped(IngestMetrics(sites(), num_trimmed=dict))
    assert found["echosight_ingest_frames_total", ("paired", "radar", "north")] == 7
    assert ("echosight_store_pairs", ("north",)) not in found


def test_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"ECHOSIGHT_INGEST_METRICS_PORT is {port}"):
            IngestMetrics(sites(), num_trimmed=dict).serve(host="127.0.0.1", port=port)


def test_port_0_serves_nothing() -> None:
    IngestMetrics(sites(), num_trimmed=dict).serve(host="127.0.0.1", port=0)()
