"""From store to batches: each image encoded once, ever; odd pairs passed over; replay sampling."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.core.errors import NoPairsError
from services.core.profiles import load_profile
from services.core.segments import Pair
from services.core.store import StoreLimits, StoreWriter
from tests.trainer.conftest import SHAPE, fill, scene
from trainer.encodings import Encoded, EncodingCache
from trainer.feed import Feed
from trainer.feed_settings import FeedSettings


def feed_of(store_dir, vision, *, centre: bool = False, held_out_share: float = 0.0, **changes) -> Feed:
    settings = FeedSettings(**({"mirror_share": 0.0, "sampling": "shuffled"} | changes))
    feed = Feed(store_dir, vision=vision, settings=settings, centre=centre, seed=0, held_out_share=held_out_share)
    feed.refresh()
    return feed


def encode_all(feed: Feed) -> None:
    while feed.num_pending:
        feed.encode(8)


def test_each_image_is_encoded_once_across_restarts(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(20)])
    encode_all(feed_of(store_dir, vision))
    assert vision.net.num_images == 20
    fill(store_dir, [scene(i) for i in range(20, 25)])
    again = feed_of(store_dir, vision)
    assert len(again) == 20
    encode_all(again)
    assert (len(again), vision.net.num_images) == (25, 25)


def test_pairs_of_another_shape_or_with_damaged_images_are_counted_not_learnt(store_dir, vision) -> None:
    odd = scene(3, shape=(4, 4))
    broken = scene(4)
    broken = type(broken)(
        broken.radar, type(broken.camera)("north", 4, 0, image=b"\xff\xd8\xff\xd9", shape=(8, 8, 3))
    )
    fill(store_dir, [scene(0), scene(1), odd, broken])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    assert (len(feed), feed.num_skipped) == (2, 2)
    assert feed.contract is not None
    assert feed.contract.shape == SHAPE
    feed.refresh()
    assert feed.num_pending == 0


def test_clutter_map_is_the_mean_of_the_sites_heatmaps_and_survives(store_dir, vision) -> None:
    pairs = [scene(i) for i in range(10)]
    fill(store_dir, pairs)
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    mean = np.mean([pair.radar.heatmap.astype(np.float32) for pair in pairs], axis=0)
    np.testing.assert_allclose(feed.clutter_table()[1], mean, atol=1e-3)
    np.testing.assert_allclose(feed.clutter_table()[0], mean, atol=1e-3)
    feed.save_profiles()
    profile = load_profile(store_dir, "north")
    assert profile is not None
    assert (profile.num_frames, profile.version) == (10, 1)
    assert np.array_equal(feed_of(store_dir, vision).clutter_table(), feed.clutter_table())


def test_site_whose_store_was_removed_keeps_its_place_and_harms_no_other(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(10)])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    expected = feed.clutter_table()
    feed.sites = ["gone", *feed.sites]  # as a checkpoint remembers them
    np.testing.assert_allclose(feed.clutter_table()[[0, 2]], expected, atol=1e-3)
    feed.save_profiles()
    assert not (store_dir / "gone").exists()


def test_radar_of_the_same_shape_but_another_unit_is_not_learnt(store_dir, vision) -> None:
    odd = scene(1)
    odd = replace(odd, radar=replace(odd.radar, unit="counts"))
    fill(store_dir, [scene(0), odd])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    assert (len(feed), feed.num_skipped) == (1, 1)


def test_lost_profile_is_made_anew_from_stored_pairs(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(10)])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    np.testing.assert_allclose(
        feed_of(store_dir, vision).clutter_table(), feed.clutter_table(), atol=1e-3
    )  # never saved: only the encodings were


def test_mirrored_pairs_have_their_image_encoded_mirrored(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(200)])
    feed = feed_of(store_dir, vision, mirror_share=0.5)
    encode_all(feed)
    batch = feed.batch(200)
    assert 60 < int(batch.mirrored.sum()) < 140
    again = feed_of(store_dir, vision, mirror_share=0.5)
    assert again.num_pending == 0


def test_fresh_share_of_a_batch_comes_from_the_newest_pairs(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(100)])
    feed = feed_of(store_dir, vision, sampling="replay", fresh_share=0.25, fresh_pairs=12, session_s=20.0)
    encode_all(feed)
    batch = feed.batch(40)
    newest = 88 * 2_000_000_000
    assert int((batch.scenes.at_ns >= newest).sum()) >= 10
    assert len(set(batch.scenes.id.tolist())) == 40


def test_centred_encodings_have_no_mean_left_on_each_site(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(20)])
    fill(store_dir, [scene(i, site="south") for i in range(20)], site="south")
    feed = feed_of(store_dir, vision, centre=True)
    encode_all(feed)
    batch = feed.batch(40)
    for site in (1, 2):
        np.testing.assert_allclose(batch.k[batch.site == site].mean(0), 0, atol=1e-2)


@pytest.mark.parametrize("cut", [1, 30, 55])
def test_torn_encodings_file_loses_only_the_torn_row(store_dir, cut) -> None:
    def cache() -> EncodingCache:
        return EncodingCache(store_dir, site="north", encoder_id="e", dim=12)

    ids = [scene(i).id for i in range(3)]
    cache().append([Encoded(frame_id, False, np.full(12, i, np.float16)) for i, frame_id in enumerate(ids)])
    path = store_dir / "north" / "encodings" / "e.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    torn = cache()
    assert len(torn) == 2
    torn.append([Encoded(ids[2], False, np.full(12, 9, np.float16))])
    again = cache().get(ids[2], mirrored=False)
    assert again is not None
    assert again[0] == 9


def test_encodings_of_evicted_pairs_are_let_go(store_dir) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    cache.append([Encoded(scene(i).id, False, np.zeros(12, np.float16)) for i in range(1200)])
    cache.forget(scene(i).id for i in range(1190))
    assert len(EncodingCache(store_dir, site="north", encoder_id="e", dim=12)) == 10


def test_newest_pairs_of_all_sites_are_encoded_first(store_dir, vision) -> None:
    """A site that stopped long ago does not keep live ones waiting, whatever their names."""
    fill(store_dir, [scene(i, site="yard") for i in range(10)], site="yard")
    fill(store_dir, [scene(i, site="demo") for i in range(10, 20)], site="demo")
    feed = feed_of(store_dir, vision)
    feed.encode(8)
    assert feed.sites == ["demo"]
    assert len(feed) == 8


def replayed(pair: Pair, *, by_s: int) -> Pair:
    """The same frames, captured later."""
    by_ns = by_s * 1_000_000_000
    return replace(
        pair,
        radar=replace(pair.radar, captured_at_ns=pair.radar.captured_at_ns + by_ns),
        camera=replace(pair.camera, captured_at_ns=pair.camera.captured_at_ns + by_ns),
    )


def test_recording_that_is_played_again_is_not_encoded_again(store_dir, vision) -> None:
    pairs = [scene(i) for i in range(20)]
    fill(store_dir, pairs)
    encode_all(feed_of(store_dir, vision, mirror_share=0.5))
    fill(store_dir, [replayed(pair, by_s=10_000) for pair in pairs])
    elsewhere = [replace(pair, radar=replace(pair.radar, site="south")) for pair in pairs]
    fill(store_dir, [replace(pair, camera=replace(pair.camera, site="south")) for pair in elsewhere], site="south")
    feed = feed_of(store_dir, vision, mirror_share=0.5)
    encode_all(feed)
    assert (len(feed), feed.num_found, vision.net.num_images) == (60, 40, 20)
    by_image = {}
    for sample in feed.pool:
        by_image.setdefault(sample.pair.id.seq, []).append(sample.vector)
    assert all((vector == same[0]).all() for same in by_image.values() for vector in same)
    assert feed_of(store_dir, vision, mirror_share=0.5).num_pending == 0


def test_images_may_go_once_they_are_encoded_also_those_known_by_content(store_dir, vision) -> None:
    pairs = [scene(i) for i in range(8)]
    fill(store_dir, pairs)
    encode_all(feed_of(store_dir, vision))
    fill(store_dir, [replayed(pair, by_s=10_000) for pair in pairs])
    encode_all(feed_of(store_dir, vision))
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    assert writer.drop_encoded_images() == 16
    writer.close()
    feed = feed_of(store_dir, vision)
    assert (len(feed), feed.num_pending) == (16, 0)
    assert len(feed.batch(16).k) == 16


def test_other_share_of_mirrored_pairs_encodes_only_what_changed(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(40)])
    encode_all(feed_of(store_dir, vision, mirror_share=0.5))
    feed = feed_of(store_dir, vision, mirror_share=0.0)
    assert 5 < feed.num_pending < 35
    encode_all(feed)
    assert feed_of(store_dir, vision, mirror_share=0.5).num_pending == 0


def test_batch_keeps_the_stored_dtype_and_passes_over_what_got_damaged(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(10)])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    [segment] = store_dir.rglob("*.seg")
    pair = feed.reader.pairs[3]
    with segment.open("r+b") as file:
        file.seek(int(pair.segment.rows[pair.row]["offset"]) + int(pair.segment.rows[pair.row]["meta_bytes"]) + 5)
        file.write(b"\xff")
    batch = feed.batch(10)
    assert (len(batch.k), batch.heatmap.dtype) == (9, torch.float16)
    assert batch.float().heatmap.dtype == torch.float32
    assert (len(feed), feed.num_skipped) == (9, 1)
    assert len(feed.batch(9).k) == 9


def test_pairs_of_the_store_come_and_go_without_anything_left_behind(tmp_path, vision) -> None:
    """Many times the store's size goes through: what the feed holds stays as large as the store."""
    store_dir = tmp_path / "store"
    limits = StoreLimits(min_free_bytes=0, max_bytes=400_000, segment_bytes=50_000)
    writer = StoreWriter(store_dir, "north", limits=limits)
    feed = feed_of(store_dir, vision, session_s=60.0, mirror_share=0.5, sampling="replay")
    sizes = []
    for start in range(0, 2000, 100):
        writer.append([scene(i) for i in range(start, start + 100)])
        feed.refresh()
        if start % 300 or start > 1700:  # at times pairs go before they were encoded
            encode_all(feed)
            feed.batch(16)
        site = feed._sites["north"]
        assert len(site.samples) + feed.num_pending + feed.num_skipped == len(feed.reader)
        assert len(site.cache) == len(feed.pool) == len(site.samples)
        assert site.cache.vectors.num_slots <= 1024
        assert feed.pool.num_sessions <= len(feed.reader) * 2 / 60 + 2
        assert len(feed._pending._heap) <= 2 * feed.num_pending + 1024 + 100
        sizes.append(len(feed.reader))
    writer.close()
    assert max(sizes[5:]) < 400
    assert len(feed.reader) < sum(sizes) / 10
    again = feed_of(store_dir, vision, mirror_share=0.5)
    assert len(again) == len(feed)
    kept = [sample.uid for sample in again.pool]
    assert kept == [sample.uid for sample in feed.pool]
    np.testing.assert_array_equal(
        again._sites["north"].sums[0].mean(), feed._sites["north"].sums[0].mean()
    )  # exact, whatever came and went


def test_site_that_is_removed_and_comes_again_is_encoded_and_kept_again(store_dir, vision) -> None:
    fill(store_dir, [scene(i, site="south") for i in range(4)], site="south")
    fill(store_dir, [scene(i) for i in range(20)])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    shutil.rmtree(store_dir / "north")
    feed.refresh()
    assert len(feed) == 4
    fill(store_dir, [scene(i) for i in range(20, 30)])
    feed.refresh()
    encode_all(feed)
    assert len(feed.batch(14).k) == 14
    again = feed_of(store_dir, vision)
    assert (len(again), again.num_pending) == (14, 0)


def of_radar(pairs: list[Pair], **changes) -> list[Pair]:
    return [replace(pair, radar=replace(pair.radar, **changes)) for pair in pairs]


@pytest.mark.parametrize(
    "other", [{"unit": "counts"}, {"heatmap": np.ones((4, 4), np.float16), "axes": ("range", "azimuth")}]
)
def test_pairs_encoded_for_a_model_of_another_radar_are_not_taken_up(store_dir, vision, other) -> None:
    """As after a checkpoint was lost, or for another model over the same store."""
    others = [scene(i, site="north") for i in range(10)]
    fill(store_dir, of_radar(others, **other))
    encode_all(feed_of(store_dir, vision))  # the only radar that there is
    fill(store_dir, [scene(i, site="east") for i in range(10)], site="east")
    feed = feed_of(store_dir, vision)  # now the first pair is another's
    encode_all(feed)
    assert vision.net.num_images == 20
    assert (len(feed), feed.num_skipped, feed.sites) == (10, 10, ["east"])
    [misfit] = feed.misfits
    assert misfit.startswith("north: ")
    assert {pair.site for pair in feed.admitted()} == {"east"}


def test_other_unit_in_the_middle_of_a_segment_is_let_go_once_it_is_read(store_dir, vision) -> None:
    """Encoded for another model; the heatmaps before and behind it are of the same size, and fit."""
    fill(store_dir, [scene(0), *of_radar([scene(1)], unit="counts"), scene(2)])
    site = EncodingCache(store_dir, site="north", encoder_id=vision.id, dim=vision.dim)
    site.append([Encoded(scene(i).id, False, np.full(12, i, np.float16)) for i in range(3)])
    feed = feed_of(store_dir, vision, held_out_share=0.0)
    assert len(feed.batch(3).k) == 2
    assert (len(feed), feed.num_skipped, len(feed.admitted()), len(feed.misfits)) == (2, 1, 2, 1)
    np.testing.assert_array_equal(feed._sites["north"].sums[0].mean(), np.full(12, 1))  # of 0 and 2


def test_lost_profile_is_not_made_from_another_radar(store_dir, vision) -> None:
    fill(store_dir, [scene(0), *of_radar([scene(i) for i in range(1, 10)], unit="counts")])
    site = EncodingCache(store_dir, site="north", encoder_id=vision.id, dim=vision.dim)
    site.append([Encoded(scene(i).id, False, np.full(12, i, np.float16)) for i in range(10)])
    feed = feed_of(store_dir, vision)
    assert feed.profiles["north"].num_frames == 1


def test_samples_of_which_none_can_be_read_are_said_to_be_so(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(3)])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    samples = list(feed.pool)
    [segment] = store_dir.rglob("*.seg")
    segment.write_bytes(bytes(segment.stat().st_size))
    with pytest.raises(NoPairsError, match="none of 3 encoded pairs can be read any more; run"):
        feed.collate(samples)
    assert (len(feed), feed.admitted()) == (0, [])
