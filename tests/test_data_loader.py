"""From records to batches: examples, buckets, packing, and a loader that resumes exactly."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sif_jax.config import BucketsConfig
from sif_jax.data.batch import Collator, RowFiller
from sif_jax.data.example import Example, ExampleEncoder
from sif_jax.data.loader import Loader
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.config import VisionConfig
from sif_jax.models.qwen2_5_vl.image_processor import PatchedImage
from sif_jax.models.qwen2_5_vl.layout import mrope_positions, num_patches
from sif_jax.models.qwen2_5_vl.tiny_tokenizer import train_tokenizer, write_tokenizer
from sif_jax.sif.prompts import user_text
from sif_jax.sif.record import Record

PAD, IMAGE, TEXT = 0, 9, 1
VISION = VisionConfig(
    depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=8, fullatt_block_indexes=(0,)
)


def example(index=0, text=4, grids=(), targets=0):
    """Images and `text` text tokens, of which the last `targets` are trained on; patches hold the example's index."""
    tokens = np.array([t for h, w in grids for t in [TEXT, *[IMAGE] * (h * w // 4)]] + [TEXT] * text, np.int32)
    images = tuple(PatchedImage(np.full((h * w, 6), index, np.float32), (h, w)) for h, w in grids)
    loss_mask = (np.arange(len(tokens)) >= len(tokens) - targets).astype(np.float32)
    return Example(tokens, mrope_positions(tokens, grids, image_token_id=IMAGE, merge_size=2), loss_mask, images, index)


def collator(batch_size=2, tokens=(8, 8, 16, 64), patches=(0, 16, 64, 256), **changes):
    buckets = BucketsConfig(tokens=tokens, patches=patches)
    return Collator(buckets, batch_size, PAD, IMAGE, patch_dim=6, **changes)


# Examples


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer([user_text("Where is the ball?")] * 9, vocab_size=400), directory)
    return ChatProcessor.from_directory(directory, min_pixels=784, max_pixels=8 * 784)


@pytest.fixture
def image_root(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (56, 84), "a_depth.png": (56, 84), "small.png": (28, 28)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    return tmp_path


def record(**changes):
    fields = {
        "dataset": "demo",
        "image": "a.png",
        "depth_image": "a_depth.png",
        "problem": "Where is the ball?",
        "gold_boxes": ((0.0, 0.0, 1.0, 1.0),),
        "response": "Left",
        "completion": "<think></think><answer>Left</answer>",
    }
    return Record(**(fields | changes))


@pytest.mark.parametrize(
    ("target", "trained_on"),
    [("cot", "<think></think><answer>Left</answer><|im_end|>"), ("answer", "Left<|im_end|>"), ("none", "")],
)
def test_each_target_trains_on_its_own_words_after_one_prompt(chat, image_root, target, trained_on):
    made = ExampleEncoder([record()], image_root, chat, target)(0)
    assert chat.decode(made.tokens[made.loss_mask == 1], skip_special_tokens=False) == trained_on
    prompt = chat.decode(made.tokens[made.loss_mask == 0], skip_special_tokens=False)
    assert prompt.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nOriginal image: "
    )
    assert prompt.endswith("in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n")
    assert [image.grid_hw for image in made.images] == [(4, 6), (4, 6)]
    assert (made.tokens == chat.ids.image_pad).sum() == 12


def test_without_depth_input_one_image_is_shown(chat, image_root):
    made = ExampleEncoder([record(depth_image=None)], image_root, chat, "cot", depth_input=False)(0)
    assert len(made.images) == 1


def test_the_prompt_wording_is_an_option(chat, image_root):
    with_words, without = (
        ExampleEncoder([record()], image_root, chat, "none", with_depth_words=words)(0) for words in (True, False)
    )
    assert "bounding box with depth is" in chat.decode(with_words.tokens)
    assert "bounding box is" in chat.decode(without.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "none.png"}, r"none\.png: no such image"),
        ({"depth_image": "cut.png"}, r"cut\.png: the image cannot be read"),
        ({"depth_image": "small.png"}, r"small\.png: the depth image has another size.*28x28.*84x56"),
        ({"depth_image": None}, "depth_input=false"),
        ({"completion": None}, "target=answer"),
        ({"problem": "<image>?"}, "3 <image> and 2 images"),
    ],
)
def test_a_bad_record_is_refused_with_what_to_do(chat, image_root, changes, message):
    with pytest.raises(InputError, match=message):
        ExampleEncoder([record(), record(**changes)], image_root, chat, "cot")(1)


# Batches


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gold_boxes": ()}, "no gold boxes; fix: leave it out"), ({"frame": "pixel"}, "wrong frame; got 'pixel'")],
)
def test_a_prompt_whose_completions_could_not_be_scored_is_refused(chat, image_root, changes, message):
    ExampleEncoder([record(**changes)], image_root, chat, "cot")(0)
    with pytest.raises(InputError, match=message):
        ExampleEncoder([record(**changes)], image_root, chat, "none")(0)


def test_a_batch_is_the_first_bucket_that_holds_its_longest_row():
    batch = collator()([[example(3, text=9, grids=[(4, 6)], targets=2)], [example(5, text=3)]])
    shapes = {name: array.shape for name, array in batch.arrays.items()}
    assert shapes == {
        "tokens": (2, 16),
        "positions": (2, 16, 3),
        "segments": (2, 16),
        "loss_mask": (2, 16),
        "image_index": (2, 16),
        "patches": (2, 64, 6),
        "patch_positions": (2, 64, 2),
        "patch_segments": (2, 64),
        "windows": (2, 2, 64),
        "window_segments": (2, 2, 64),
        "window_slot": (2, 64),
    }
    assert {array.dtype.name for array in batch.arrays.values()} == {"int32", "float32"}
    assert batch.records == ((3,), (5,))
    assert batch.waste.tokens == 1 - (16 + 3) / 32
    assert batch.waste.patches == 1 - 24 / 128


def test_a_row_with_an_image_is_written_as_the_contract_says():
    (row,) = (
        {name: array[0] for name, array in batch.items()}
        for batch in [collator(1)([[example(7, text=3, grids=[(2, 4)], targets=2)]]).arrays]
    )
    assert row["tokens"].tolist() == [TEXT, IMAGE, IMAGE, TEXT, TEXT, TEXT, PAD, PAD]
    assert row["positions"].tolist() == [[0] * 3, [1, 1, 1], [1, 1, 2], [3] * 3, [4] * 3, [5] * 3, [0] * 3, [0] * 3]
    assert row["segments"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert row["loss_mask"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert row["image_index"].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1]
    assert row["patches"][:, 0].tolist() == [7] * 8 + [0] * 8
    assert row["patch_positions"][:8].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert row["patch_segments"].tolist() == [1] * 8 + [0] * 8
    assert row["windows"][0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1]
    assert row["window_segments"][0, :9].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert row["window_slot"].tolist() == [*range(8), *[0] * 8]


def test_a_batch_of_text_has_the_patches_of_its_bucket():
    arrays = collator()([[example()]]).arrays
    assert arrays["patches"].shape == (2, 0, 6)
    assert arrays["windows"].shape == (2, 0, 64)
    assert arrays["segments"][1].tolist() == [0] * 8
    longer = collator()([[example(text=9)]]).arrays
    assert (longer["tokens"].shape, longer["patches"].shape) == ((2, 16), (2, 64, 6))
    assert not longer["patch_segments"].any()


@pytest.mark.parametrize(
    ("sizes", "bucket"),
    [
        ({"text": 8}, (8, 0)),
        ({"grids": [(2, 2)]}, (8, 16)),
        ({"text": 9}, (16, 64)),
        ({"grids": [(2, 130)]}, (128, 260)),
    ],
)
def test_a_bucket_must_hold_both_the_tokens_and_the_patches(sizes, bucket):
    arrays = collator(1, tokens=(8, 8, 16, 128), patches=(0, 16, 64, 260))([[example(**sizes)]]).arrays
    assert (arrays["tokens"].shape[1], arrays["patches"].shape[1]) == bucket


def test_packed_examples_restart_their_positions_and_number_their_segments():
    rows = [[example(1, text=3, grids=[(2, 2)], targets=1), example(2, text=2, grids=[(2, 4), (2, 2)])]]
    row = {name: array[0] for name, array in collator(1, tokens=(16,), patches=(16,))(rows).arrays.items()}
    assert row["segments"].tolist() == [1] * 5 + [2] * 7 + [0] * 4
    assert row["positions"][:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 1, 3, 4, 5, 6, 0, 0, 0, 0]
    assert row["image_index"].tolist() == [-1, 0, -1, -1, -1, -1, 1, 2, -1, 3, -1, -1, -1, -1, -1, -1]
    assert row["patch_segments"].tolist() == [1] * 4 + [2] * 8 + [3] * 4
    assert row["patches"][:, 0].tolist() == [1] * 4 + [2] * 12
    assert row["loss_mask"].tolist() == [0] * 4 + [1] + [0] * 11


even = st.integers(1, 6).map(lambda n: 2 * n)
examples = st.lists(
    st.builds(lambda text, grids: (text, grids), st.integers(1, 30), st.lists(st.tuples(even, even), max_size=2)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(examples, st.booleans())
def test_a_batch_holds_each_token_and_patch_exactly_once(sizes, pack):
    collate = collator(batch_size=4, tokens=(32, 128), patches=(64, 288))
    filler = RowFiller(collate, pack=pack)
    made = [example(i, text, grids) for i, (text, grids) in enumerate(sizes)]
    taken = [one for one in made if filler.add(one)] if pack else [one for one in made[:4] if filler.add(one)]
    batch = collate(filler.rows)
    arrays = batch.arrays
    assert (arrays["segments"] > 0).sum() == sum(len(one.tokens) for one in taken)
    assert (arrays["patch_segments"] > 0).sum() == sum(num_patches([i.grid_hw for i in one.images]) for one in taken)
    assert sorted(index for row in batch.records for index in row) == [one.record_index for one in taken]
    for row in range(4):
        real = np.flatnonzero(arrays["patch_segments"][row])
        shown = arrays["image_index"][row][arrays["image_index"][row] >= 0]
        assert shown.tolist() == list(range(len(real) // 4))
        np.testing.assert_array_equal(arrays["windows"][row].reshape(-1)[arrays["window_slot"][row][real]], real)
        assert (arrays["windows"][row] >= 0).sum() == len(real)


def test_packing_puts_each_example_into_the_first_row_with_room():
    filler = RowFiller(collator(2, tokens=(10,), patches=(0,)), pack=True)
    assert [filler.add(example(i, text=text)) for i, text in enumerate([6, 7, 4, 3, 1])] == [True] * 4 + [False]
    assert [[one.record_index for one in row] for row in filler.rows] == [[0, 2], [1, 3]]


@settings(deadline=None)
@given(examples)
def test_the_shapes_of_a_batch_are_those_of_its_bucket_and_no_others(sizes):
    buckets = {"tokens": (32, 64, 512), "patches": (64, 288, 4096)}
    batches = [collator(1, **buckets)([[example(i, *size)]]).arrays for i, size in enumerate(sizes)]
    shapes = {(b["tokens"].shape[1], *b["windows"].shape[:2], b["patches"].shape[1]) for b in batches}
    assert shapes <= {(32, 1, 2, 64), (64, 1, 8, 288), (512, 1, 114, 4096)}


def test_a_fixed_shape_is_the_largest_bucket_whatever_the_rows():
    collate = collator(fixed_shape=True)
    for rows in ([[example()]], [[example(grids=[(4, 4)])]], [[example(grids=[(2, 2)] * 20)]]):
        arrays = collate(rows).arrays
        assert arrays["tokens"].shape == (2, 64)
        assert arrays["patches"].shape == (2, 256, 6)
        assert arrays["windows"].shape == (2, 8, 64)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"text": 65}, "the example has too many tokens; got 65; expected at most 64.*data.buckets.tokens"),
        ({"grids": [(2, 130)]}, "the example has too many patches; got 260; expected at most 256"),
    ],
)
def test_an_example_larger_than_every_bucket_is_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        collator(1, tokens=(64,) if "text" in sizes else (256,), patches=(256,))([[example(7, **sizes)]])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"images": ()}, "got '6 image tokens and 0 patches'; expected one token for 4 patches"),
        ({"tokens": np.full(11, TEXT, np.int32)}, "got '0 image tokens and 24 patches'"),
        ({"images": (PatchedImage(np.zeros((24, 6), np.float32), (4, 4)),)}, r"image 1 do not fill its grid.*4 \* 4"),
        ({"images": (PatchedImage(np.zeros((24, 5), np.float32), (4, 6)),)}, r"got \[24, 5\]; expected \[4 \* 6, 6\]"),
    ],
)
def test_tokens_that_do_not_show_the_images_are_refused(changes, told):
    with pytest.raises(InputError, match=told):
        collator(1)([[dataclasses.replace(example(grids=[(4, 6)]), **changes)]])


def test_a_collator_takes_its_numbers_from_the_model(chat):
    collate = Collator.for_model(chat, VISION, BucketsConfig(), 3)
    assert (collate.window_patches, collate.merge_size, collate.patch_dim, collate.batch_size) == (8, 2, 1176, 3)
    assert (collate.pad_id, collate.image_token_id) == (chat.pad_id, chat.ids.image_pad)


def test_an_image_processor_of_another_patch_size_is_refused(chat):
    with pytest.raises(InputError, match=r"disagree.*\(14, 2\).*\(16, 2\)"):
        Collator.for_model(chat, dataclasses.replace(VISION, patch_size=16), BucketsConfig(), 3)


# Loader


def encode(index):
    return example(index, text=3 + index % 7, grids=[(2, 2)] * (index % 3))


def bad_at(*bad):
    def encode_or_fail(index):
        if index in bad:
            raise InputError("bad image")
        return encode(index)

    return encode_or_fail


N = 47  # records; odd, so that the last batch is not full


def loader(encoder=encode, num_records=N, batch_size=2, **options):
    return Loader(
        encoder, num_records, collator(batch_size), **({"seed": 0, "num_threads": 2, "prefetch": 4} | options)
    )


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(batches, others):
    assert [batch.records for batch in batches] == [batch.records for batch in others]
    for batch, other in zip(batches, others, strict=True):
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])


def seen(batches):
    return [index for batch in batches for row in batch.records for index in row]


def test_one_epoch_shows_every_record_once_and_fills_up_with_padding():
    batches = list(loader(epochs=1))
    assert sorted(seen(batches)) == list(range(N))
    assert batches[-1].records[1] == ()
    assert {batch.arrays["tokens"].shape[0] for batch in batches} == {2}


def test_without_shuffling_records_come_in_order():
    assert seen(loader(epochs=2, shuffle=False)) == [*range(N), *range(N)]


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = {tuple(seen(loader(epochs=1, seed=seed))) for seed in range(4)}
    twice = seen(loader(epochs=2))
    assert len(orders | {tuple(twice[N:])}) == 5
    assert sorted(twice[N:]) == list(range(N))


def test_the_same_seed_gives_the_same_batches_whatever_the_threads():
    assert_same(take(loader(num_threads=0), 12), take(loader(num_threads=4, prefetch=9), 12))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("done", [0, 1, 5, 6, 13])
def test_a_loader_resumes_exactly_from_its_state(pack, done):
    options = {"pack": pack, "encoder": bad_at(2, 3), "on_error": "skip"}
    stream = loader(**options)
    take(stream, done)
    state = json.loads(json.dumps(stream.get_state()))
    rest = take(stream, 8)
    resumed = loader(**options)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 8), rest)
    resumed.set_state(state)
    assert_same(take(resumed, 8), rest)


def test_the_last_batch_resumes_to_the_end():
    stream = loader(epochs=1)
    take(stream, (N + 1) // 2)
    resumed = loader(epochs=1)
    resumed.set_state(stream.get_state())
    assert list(resumed) == list(stream) == []


def test_packing_keeps_the_order_and_loses_nothing():
    assert sorted(seen(loader(epochs=1, pack=True, batch_size=1))) == list(range(N))
    assert len(list(loader(epochs=1, pack=True, batch_size=1))) < len(list(loader(epochs=1, batch_size=1)))


def test_processes_share_one_stream():
    whole = seen(take(loader(batch_size=1), 30))
    shares = [seen(take(loader(batch_size=3, shard=i, num_shards=3), 10)) for i in range(3)]
    assert [index for turn in zip(*shares, strict=True) for index in turn] == whole


@pytest.mark.parametrize(
    "options",
    [{}, {"pack": True}, {"on_error": "skip", "epochs": 3}, {"epochs": 1}],
    ids=["plain", "packed", "skipped", "ends"],
)
@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_put_together_are_the_batches_of_one_loader_and_resume_as_any_number(options, num_shards):
    encode = [bad_at(5, 11)] if "on_error" in options else []
    batches = take(loader(*encode, batch_size=4, **options), 6)
    shards = [loader(*encode, batch_size=4, shard=i, num_shards=num_shards, **options) for i in range(num_shards)]
    for batch in batches[:4]:
        parts = [next(shard) for shard in shards]
        assert tuple(row for part in parts for row in part.records) == batch.records
    states = [shard.get_state() for shard in shards]
    assert all(state == states[0] for state in states)
    resumed = loader(*encode, batch_size=4, **options)
    resumed.set_state(states[0])
    assert [batch.records for batch in take(resumed, 2)] == [batch.records for batch in batches[4:6]]


def test_a_shard_encodes_its_own_rows_alone():
    encoded = []

    def encode(index):
        encoded.append(index)
        return example(index)

    mine = seen(take(loader(encode, batch_size=4, shard=1, num_shards=2, prefetch=1, num_threads=1), 3))
    assert set(mine) <= set(encoded)
    assert len(encoded) < 3 * 4


def test_rows_that_processes_cannot_share_are_refused():
    with pytest.raises(InputError, match="rows do not divide over the processes; got 3; expected a multiple of 2"):
        loader(batch_size=3, shard=0, num_shards=2)


def test_a_bad_record_stops_the_run():
    with pytest.raises(InputError, match="row 6: bad image"):
        list(loader(bad_at(5), epochs=1))


def test_an_error_names_the_file_and_the_row_in_it():
    options = {"file": Path("rows.json"), "rows": range(100, 100 + N), "epochs": 1}
    with pytest.raises(InputError, match=r"^rows\.json: row 105: bad image$"):
        list(loader(bad_at(5), **options))


def test_a_skipped_record_is_listed_once_and_moves_nothing_else():
    stream = loader(bad_at(5, 7), epochs=3, on_error="skip")
    assert seen(stream) == [index for index in seen(loader(epochs=3)) if index not in (5, 7)]
    assert stream.skipped == {5: "row 6: bad image", 7: "row 8: bad image"}


def test_an_example_larger_than_the_buckets_can_be_skipped():
    stream = loader(lambda index: example(index, text=99 if index == 4 else 3), epochs=1, on_error="skip")
    assert 4 not in seen(stream)
    assert "too many tokens" in stream.skipped[4]


def test_a_file_of_bad_records_ends_in_an_error_and_not_in_a_loop():
    with pytest.raises(InputError, match=r"all of 47 records in a row failed.*bad image"):
        next(loader(bad_at(*range(N)), on_error="skip"))


def test_no_records_are_refused():
    with pytest.raises(InputError, match="no records"):
        loader(num_records=0)


def test_the_host_modules_and_the_loader_run_without_jax_and_torch(image_root, chat):
    chat.save(image_root)
    script = """
import sys
sys.modules["jax"] = sys.modules["torch"] = None
from pathlib import Path
from sif_jax.config import BucketsConfig
from sif_jax.data.batch import Collator
from sif_jax.data.example import ExampleEncoder
from sif_jax.data.loader import Loader
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.sif.record import Record
root = Path(sys.argv[1])
chat = ChatProcessor.from_directory(root)
records = [Record(dataset="d", image="a.png", depth_image=None, problem="?", gold_boxes=(), response="yes")]
encode = ExampleEncoder(records, root, chat, "answer", depth_input=False)
collate = Collator(BucketsConfig(tokens=(512,), patches=(1344,)), 2, chat.pad_id, chat.ids.image_pad)
print(sum(len(batch.records) for batch in Loader(encode, 1, collate, seed=0, epochs=4)))
"""
    done = subprocess.run([sys.executable, "-c", script, str(image_root)], capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr
