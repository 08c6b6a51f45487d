"""Hugging Face checkpoints in and out, bit for bit, and what is refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sif_jax
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_is_equal_bit_for_bit(checkpoint, tmp_path, dtype):
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
    ],
    ids=["missing", "extra", "wrong shape", "NaN"],
)
def test_a_wrong_tensor_is_named(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(InputError, match=message):
        load_model(checkpoint)


def test_a_truncated_file_and_a_directory_without_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read"):
        load_model(checkpoint)
    path.unlink()
    with pytest.raises(InputError, match="no weights here"):
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
