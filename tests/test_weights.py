"""Hugging Face checkpoints in and out, bit for bit, and what is refused."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sif_jax
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl import weights
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.tensor_file import TensorFile
from sif_jax.models.qwen2_5_vl.weights import load_model, save_model, save_weights
from tests.checkpoints import tiny_checkpoint, torch_model


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")


def tensors(directory) -> dict[str, np.ndarray]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def rewrite(directory, change) -> None:
    values = tensors(directory)
    change(values)
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=["on the host", "on the device"])
def laid_out(request, monkeypatch):
    """Small parameters take another way than large ones: both must do the same."""
    if request.param == "on the device":
        monkeypatch.setattr("sif_jax.models.qwen2_5_vl.weights.SMALL_BYTES", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_is_equal_bit_for_bit(checkpoint, tmp_path, dtype, laid_out):
    rewrite(checkpoint, lambda values: values.update({n: v.astype(dtype) for n, v in values.items()}))
    save_model(load_model(checkpoint, dtype=dtype), tmp_path / "out", source=checkpoint)
    before, after = tensors(checkpoint), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)) for name in after)
    assert all(np.array_equal(before[name].view(np.uint8), after[name].view(np.uint8)) for name in before)


def test_transformers_loads_what_we_save_and_gives_the_same_logits(tmp_path):
    vlm = sif_jax.load(tiny_checkpoint())
    vlm.save_pretrained(tmp_path / "out")
    theirs = torch_model(tmp_path / "out").state_dict()
    ours = torch_model(tiny_checkpoint()).state_dict()
    assert all((theirs[name] == value).all() for name, value in ours.items())
    again = sif_jax.load(tmp_path / "out")
    inputs = vlm.encode([{"role": "user", "content": "Where is it?"}])
    np.testing.assert_array_equal(vlm.logits(inputs), again.logits(inputs))


def test_shards_are_split_by_size_indexed_and_read_back(checkpoint, tmp_path):
    model, out = load_model(checkpoint), tmp_path / "shards"
    out.mkdir()
    save_weights(model, out, shard_bytes=160_000)
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) > 1
    assert max(path.stat().st_size for path in shards) < 170_000
    for path in shards:
        with safe_open(path, framework="np") as file:
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
    shutil.copy(checkpoint / "config.json", out)
    for (_, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, load_model(out))), strict=True):
        np.testing.assert_array_equal(a[...], b[...])


def test_the_shards_of_transformers_make_the_round_trip(tmp_path, laid_out):
    source = tmp_path / "source"
    torch_model(tiny_checkpoint()).save_pretrained(source, max_shard_size="60KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    layer = {file for name, file in index["weight_map"].items() if ".layers.1." in name}
    assert len(layer) > 1, "a layer that lies in two shards"
    model, out = load_model(source), tmp_path / "out"
    out.mkdir()
    save_weights(model, out, shard_bytes=60_000)
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["metadata"] == index["metadata"]
    assert written["weight_map"].keys() == index["weight_map"].keys()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=48), st.sampled_from([0, 2**24]))
def test_every_finite_bfloat16_survives_float32_and_back(bits, small_bytes):
    values = np.resize(np.array(bits, np.uint16).view(ml_dtypes.bfloat16), (80, 48))
    values[~np.isfinite(values)] = 1
    with TemporaryDirectory() as temporary, patch.object(weights, "SMALL_BYTES", small_bytes):
        directory = shutil.copytree(tiny_checkpoint(), Path(temporary) / "checkpoint")
        name = "model.layers.1.mlp.up_proj.weight"
        rewrite(directory, lambda v: v.update({name: values}))
        save_weights(load_model(directory, dtype="float32"), directory)
        np.testing.assert_array_equal(
            tensors(directory)[name].astype(ml_dtypes.bfloat16).view(np.uint16), values.view(np.uint16)
        )


def test_the_names_of_transformers_5_are_read_too(checkpoint):
    def rename(values):
        for name in list(values):
            new = "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.")
            values[new] = values.pop(name)

    before = load_model(checkpoint)
    rewrite(checkpoint, rename)
    after = load_model(checkpoint)
    np.testing.assert_array_equal(before.embed_tokens[...], after.embed_tokens[...])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.pop("model.layers.1.mlp.up_proj.weight"),
            "1 of .* tensors are missing; got 'model.layers.1.mlp.up_proj",
        ),
        (lambda v: v.update({"model.layers.9.x": np.zeros(1, np.float32)}), "belong to no layer.*'model.layers.9.x'"),
        (
            lambda v: v.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"model.norm.weight has the wrong shape; got \(3,\)",
        ),
        (lambda v: v["model.norm.weight"].__setitem__(0, np.nan), "model.norm.weight holds NaN"),
        (
            lambda v: v["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 3), np.nan),
            r"model.layers.1.mlp.up_proj.weight holds NaN",
        ),
        (
            lambda v: v["visual.blocks.2.attn.qkv.weight"].__setitem__((5, 0), -np.inf),
            "visual.blocks.2.attn.qkv.weight holds NaN or infinity",
        ),
        (
            lambda v: v.update({"model.norm.weight": np.zeros(48, np.int64)}),
            "norm.weight has an unsupported type; got 'I64'",
        ),
        (
            lambda v: v.update({"model.norm.weight": np.zeros(48, ml_dtypes.float8_e4m3fn)}),
            "norm.weight has an unsupported type; got 'F8_E4M3'",
        ),
        (
            lambda v: v.update({"model.language_model.norm.weight": v["model.norm.weight"]}),
            "tensor model.norm.weight is given twice",
        ),
    ],
    ids=["missing", "extra", "wrong shape", "NaN", "NaN in a layer", "infinity in a layer", "int64", "float8", "twice"],
)
def test_a_wrong_tensor_is_named(checkpoint, change, message, laid_out):
    rewrite(checkpoint, change)
    with pytest.raises(InputError, match=message):
        load_model(checkpoint)


def header(text: bytes, *, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(**changes) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "a file of 0 bytes cannot have a header"),
        (b"\x00" * 7, "a file of 7 bytes cannot have a header"),
        (header(b"{}", length=3), "a file of 10 bytes cannot have a header of 3"),
        (header(b"{}", length=2**63), "cannot have a header"),
        (header(b"{]"), "the header is not JSON"),
        (header(b"\xff\xfe"), "the header is not JSON"),
        (header(b"[]"), "the header is not a JSON object"),
        (header(entry()) + bytes(7), "it is truncated: tensor a ends 1 bytes after it"),
        (header(entry(data_offsets=[0, 4])) + bytes(8), "the header's entry of a is malformed"),
        (header(entry(data_offsets=[-8, 0])) + bytes(8), "the header's entry of a is malformed"),
        (header(entry(shape=[-1, -2])) + bytes(8), "the header's entry of a is malformed"),
        (header(entry(shape="2")) + bytes(8), "the header's entry of a is malformed"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"model\.safetensors: cannot be read: .*{reason}.*fix: copy or download"):
        TensorFile(path)


@settings(deadline=None)
@given(st.data())
def test_any_part_of_a_tensor_is_what_numpy_cuts_out_of_it(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrix = value if value.ndim == 1 else value.reshape(len(value), -1)
    index = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in matrix.shape)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.safetensors"
        save_file({"other": np.ones(3, np.float16), "a": value}, path)
        file = TensorFile(path)
        np.testing.assert_array_equal(file.read("a", index), matrix[index])
        np.testing.assert_array_equal(file.read("a"), matrix)


def test_a_truncated_checkpoint_and_a_directory_without_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read: it is truncated"):
        load_model(checkpoint)
    path.rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no weights here.*fix: pickles are never read"):
        load_model(checkpoint)


def sharded(checkpoint) -> dict:
    """The checkpoint in shards; its index."""
    save_weights(load_model(checkpoint), checkpoint, shard_bytes=160_000)
    (checkpoint / "model.safetensors").unlink()
    return json.loads((checkpoint / "model.safetensors.index.json").read_text())


def test_a_shard_that_the_index_names_must_be_there_and_other_files_are_ignored(checkpoint):
    index = sharded(checkpoint)
    save_file({"stray": np.zeros(1, np.float32)}, checkpoint / "consolidated.safetensors")
    load_model(checkpoint)
    shard = sorted(index["weight_map"].values())[-1]
    (checkpoint / shard).unlink()
    with pytest.raises(InputError, match=rf"model.safetensors.index.json: 1 of .* shards are missing; got '{shard}'"):
        load_model(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="malformed index"):
        load_model(checkpoint)


def test_a_tensor_in_two_shards_is_refused(checkpoint):
    first, second, *_ = sorted(set(sharded(checkpoint)["weight_map"].values()))
    name, value = next(iter(load_file(checkpoint / first).items()))
    save_file(load_file(checkpoint / second) | {name: value}, checkpoint / second)
    with pytest.raises(InputError, match=rf"{second}: tensor {name} is given twice.*expected it in {first} alone"):
        load_model(checkpoint)


def test_saving_never_overwrites_and_leaves_nothing_half_written(checkpoint, tmp_path, monkeypatch):
    model = load_model(checkpoint)
    with pytest.raises(InputError, match="already exists"):
        save_model(model, checkpoint, source=checkpoint)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sif_jax.models.qwen2_5_vl.weights.write_tensors", full_disk)
    with pytest.raises(InputError, match=r"No space left on device.*fix: free space"):
        save_model(model, tmp_path / "out", source=checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


HUB_7B = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_chans": 3,
    },
}


def test_the_published_flat_config_and_the_nested_one_of_transformers_5_say_the_same():
    text_keys = (
        set(HUB_7B)
        - {"model_type", "vision_config", "tie_word_embeddings"}
        - {k for k in HUB_7B if k.endswith("token_id")}
    )
    text = {key: HUB_7B[key] for key in text_keys - {"rope_theta", "rope_scaling"}}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    nested = {key: value for key, value in HUB_7B.items() if key not in text_keys} | {"text_config": text}
    assert Qwen2_5_VLConfig.from_dict(nested) == Qwen2_5_VLConfig.from_dict(HUB_7B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "another architecture; got 'llava'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "rotary scaling.*'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "mrope_section"),
        ({"hidden_size": 3072}, "mrope_section|does not feed"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        Qwen2_5_VLConfig.from_dict(HUB_7B | change)
