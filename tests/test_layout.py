"""Patch positions, windows and M-RoPE positions against transformers' functions, which they must equal exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from sif_jax.models.qwen2_5_vl.layout import (
    max_windows,
    mrope_positions,
    patch_positions,
    patch_segments,
    window_layout,
)

IMAGE, TEXT = 9, 1
even = st.integers(1, 13).map(lambda n: 2 * n)
grid_lists = st.lists(st.tuples(even, even), min_size=1, max_size=4)
narrow = st.tuples(st.just(2), st.integers(1, 200).map(lambda n: 2 * n))
any_grids = st.lists(
    st.one_of(st.just((2, 2)), st.tuples(even, even), narrow, narrow.map(lambda g: g[::-1])), max_size=30
)


def grid_thw(grids):
    return torch.tensor([(1, *grid) for grid in grids])


class RopeIndexOnly:
    """Just enough of the model for its `get_rope_index`."""

    config = Qwen2_5_VLConfig()
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids


@settings(deadline=None)
@given(grid_lists)
def test_patch_positions_are_those_of_transformers(grids):
    expected = get_vision_position_ids(grid_thw(grids), 2)
    np.testing.assert_array_equal(patch_positions(grids, merge_size=2), expected.numpy())


@settings(deadline=None)
@given(grid_lists, st.sampled_from([2, 4, 8]))
def test_windows_hold_the_patches_of_transformers_in_its_order(grids, window_patches):
    index, bounds = get_vision_window_index(grid_thw(grids), 2, window_patches * 14, 14)
    patches = (index[:, None] * 4 + torch.arange(4)).flatten().numpy()
    expected = np.split(patches, bounds.numpy()[1:-1])
    windows, segments, _ = window_layout(grids, merge_size=2, window_patches=window_patches)
    assert segments.max() == len(expected)
    for number, window in enumerate(expected, 1):
        assert windows[segments == number].tolist() == window.tolist()


@settings(deadline=None)
@given(any_grids, st.sampled_from([2, 4, 8]))
def test_every_patch_has_one_slot_and_every_window_stays_in_one_row(grids, window_patches):
    windows, segments, slots = window_layout(grids, merge_size=2, window_patches=window_patches)
    np.testing.assert_array_equal(windows.reshape(-1)[slots], np.arange(len(slots)))
    np.testing.assert_array_equal(segments > 0, windows >= 0)
    assert (windows >= 0).sum() == len(slots)
    rows = [set(row[row > 0]) for row in segments]
    assert sum(map(len, rows)) == segments.max(initial=0)


@settings(deadline=None, max_examples=300)
@given(any_grids, st.sampled_from([2, 4, 6, 8]))
def test_the_number_of_rows_is_bounded_by_the_number_of_patches(grids, window_patches):
    layout = window_layout(grids, merge_size=2, window_patches=window_patches)
    bound = max_windows(len(layout.slots), merge_size=2, window_patches=window_patches)
    assert len(layout.windows) <= bound <= 2 * -(-len(layout.slots) // window_patches**2)


def test_windows_of_36_patches_reach_the_bound():
    layout = window_layout([(6, 6)] * 5, merge_size=2, window_patches=8)
    assert len(layout.windows) == max_windows(5 * 36, merge_size=2, window_patches=8) == 5


def test_ragged_edges_fill_the_room_that_earlier_rows_have_left():
    windows, segments, slots = window_layout([(10, 6), (2, 8)], merge_size=2, window_patches=8)  # 48, 12 and 16 patches
    assert windows.shape == (2, 64)
    assert segments[0].tolist() == [1] * 48 + [2] * 12 + [0] * 4
    assert segments[1].tolist() == [3] * 16 + [0] * 48
    assert windows[0, :60].tolist() == list(range(60))
    assert slots[60:].tolist() == list(range(64, 80))


def test_no_image_gives_empty_layouts():
    windows, segments, slots = window_layout([], merge_size=2, window_patches=8)
    assert windows.shape == segments.shape == (0, 64)
    assert max_windows(0, merge_size=2, window_patches=8) == 0
    assert slots.shape == patch_segments([]).shape == (0,)
    assert patch_positions([], merge_size=2).shape == (0, 2)


def test_patch_segments_number_the_images():
    assert patch_segments([(2, 2), (2, 4)]).tolist() == [1] * 4 + [2] * 8


@settings(deadline=None)
@given(st.lists(st.tuples(even, even), max_size=4), st.lists(st.integers(1, 6), min_size=5, max_size=5))
def test_mrope_positions_are_those_of_transformers(grids, text_lengths):
    parts = [[TEXT] * text_lengths[0]]
    for (height, width), text in zip(grids, text_lengths[1:]):
        parts += [[IMAGE] * (height * width // 4), [TEXT] * text]
    tokens = np.array([token for part in parts for token in part], np.int32)
    ids = torch.tensor(tokens.tolist())[None]
    types = (ids == IMAGE).int()
    expected, _ = Qwen2_5_VLModel.get_rope_index(RopeIndexOnly(), ids, types, grid_thw(grids) if grids else None)
    positions = mrope_positions(tokens, grids, image_token_id=IMAGE, merge_size=2)
    np.testing.assert_array_equal(positions, expected[:, 0].T.numpy())


def test_text_after_an_image_of_two_by_three_tokens_goes_on_from_its_longer_side():
    tokens = np.array([TEXT, *[IMAGE] * 6, TEXT, TEXT])
    positions = mrope_positions(tokens, [(4, 6)], image_token_id=IMAGE, merge_size=2)
    image = [[1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1], [1, 2, 2], [1, 2, 3]]
    assert positions.tolist() == [[0, 0, 0], *image, [4, 4, 4], [5, 5, 5]]


@pytest.mark.parametrize("tokens", [[IMAGE], [IMAGE, TEXT, IMAGE], [IMAGE] * 4, [TEXT]])
def test_image_tokens_that_do_not_match_the_grid_are_refused(tokens):
    with pytest.raises(ValueError, match="image"):
        mrope_positions(np.array(tokens), [(2, 4)], image_token_id=IMAGE, merge_size=2)
