"""From store to batches: each image encoded once, ever; odd pairs passed over; replay sampling."""

from dataclasses import replace

import numpy as np
import pytest

from services.core.profiles import load_profile
from tests.trainer.conftest import SHAPE, fill, scene
from trainer.encodings import EncodingCache
from trainer.feed import Feed


def feed_of(store_dir, vision, **changes) -> Feed:
    feed = Feed(store_dir, vision=vision, **({"mirror_share": 0.0, "centre": False, "seed": 0} | changes))
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
    batch = feed.batch(200, fresh_share=0.0, fresh_pairs=1, rng=np.random.default_rng(0))
    assert 60 < int(batch.mirrored.sum()) < 140
    again = feed_of(store_dir, vision, mirror_share=0.5)
    assert again.num_pending == 0


def test_fresh_share_of_a_batch_comes_from_the_newest_pairs(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(100)])
    feed = feed_of(store_dir, vision)
    encode_all(feed)
    batch = feed.batch(40, fresh_share=0.25, fresh_pairs=5, rng=np.random.default_rng(0))
    newest = 95 * 2_000_000_000
    assert int((batch.scenes.at_ns >= newest).sum()) >= 10
    assert len(set(batch.scenes.id[10:].tolist())) == 30


def test_centred_encodings_have_no_mean_left_on_each_site(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(20)])
    fill(store_dir, [scene(i, site="south") for i in range(20)], site="south")
    feed = feed_of(store_dir, vision, centre=True)
    encode_all(feed)
    batch = feed.batch(40, fresh_share=0.0, fresh_pairs=1, rng=np.random.default_rng(0))
    for site in (1, 2):
        np.testing.assert_allclose(batch.k[batch.site == site].mean(0), 0, atol=1e-2)


@pytest.mark.parametrize("cut", [1, 30, 47])
def test_torn_encodings_file_loses_only_the_torn_row(store_dir, cut) -> None:
    def cache() -> EncodingCache:
        return EncodingCache(store_dir, site="north", encoder_id="e", dim=12)

    ids = [scene(i).id for i in range(3)]
    cache().append([(frame_id, False, np.full(12, i, np.float16)) for i, frame_id in enumerate(ids)])
    path = store_dir / "north" / "encodings" / "e.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    torn = cache()
    assert len(torn) == 2
    torn.append([(ids[2], False, np.full(12, 9, np.float16))])
    again = cache().get(ids[2], mirrored=False)
    assert again is not None
    assert again[0] == 9


def test_encodings_of_evicted_pairs_are_let_go(store_dir) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    cache.append([(scene(i).id, False, np.zeros(12, np.float16)) for i in range(1200)])
    cache.forget_all_but({scene(i).id for i in range(1190, 1200)})
    assert len(EncodingCache(store_dir, site="north", encoder_id="e", dim=12)) == 10


def test_newest_pairs_of_all_sites_are_encoded_first(store_dir, vision) -> None:
    """A site that stopped long ago does not keep live ones waiting, whatever their names."""
    fill(store_dir, [scene(i, site="yard") for i in range(10)], site="yard")
    fill(store_dir, [scene(i, site="demo") for i in range(10, 20)], site="demo")
    feed = feed_of(store_dir, vision)
    feed.encode(8)
    assert feed.sites == ["demo"]
    assert len(feed) == 8
