"""Weights in and out in the memory of one shard, and born split over the devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.names import checkpoint_tensors
from sif_jax.models.qwen2_5_vl.weights import abstract_model

ROOT = Path(__file__).parents[1]

# What the process holds beyond its start and beyond the arrays themselves, which on CPU lie in the same memory.
MEASURE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.weights import abstract_model, load_model, save_weights

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def peak_of(work):
    start = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    result = work()
    return result, memory("VmHWM") - start

directory, shard_bytes = Path(sys.argv[1]), int(sys.argv[2])
jax.jit(jnp.sin)(0.0)  # starts the compiler, which every process does once; what loading compiles is measured
abstract_model(Qwen2_5_VLConfig.from_directory(directory), param_dtype=jnp.bfloat16)
model, peak = peak_of(lambda: load_model(directory, dtype="bfloat16"))
held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
print(peak - held, peak_of(lambda: save_weights(model, directory / "out", shard_bytes=shard_bytes))[1])
"""


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
import sif_jax.models.qwen2_5_vl.weights as weights
from sif_jax.models.qwen2_5_vl.axes import parameter_sharding

dtype, weights.SMALL_BYTES = sys.argv[2], int(sys.argv[3])
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
whole, split = (dict(nnx.to_flat_state(nnx.state(weights.load_model(sys.argv[1], dtype=dtype, mesh=m)))) for m in (None, mesh))
for path, leaf in split.items():
    array = leaf[...]
    assert array.dtype == jnp.dtype(dtype) and array.sharding.mesh == mesh
    assert {x.data.nbytes for x in array.addressable_shards} == {array.nbytes // 8}, path
    rule = parameter_sharding(mesh, path, array.shape)
    assert array.sharding.is_equivalent_to(rule, array.ndim), path
    np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.asarray(whole[path][...]).view(np.uint8))
print(len(split), weights._fill._cache_size())
"""


def raw_config(*, vocab: int, layers: int) -> dict:
    return {
        "model_type": "qwen2_5_vl",
        "vocab_size": vocab,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "image_token_id": 1,
        "video_token_id": 2,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "vision_config": {
            "depth": 2,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 4,
            "out_hidden_size": 1024,
            "fullatt_block_indexes": [1],
            "window_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def hub_order(name: str) -> tuple:
    """Vision, embedding, the layers one after the other, final norm, head."""
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), -1)
    return name == "lm_head.weight", name.startswith("model."), "norm" in parts[1], layer, name


def write_checkpoint(directory: Path, raw: dict, shard_bytes: int) -> list[int]:
    """bfloat16 shards, one at a time; their sizes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    config = Qwen2_5_VLConfig.from_dict(raw)
    tensors = checkpoint_tensors(config, nnx.state(abstract_model(config, param_dtype="bfloat16")))
    shapes = {name: tensor.shape for tensor in tensors.values() for name in tensor.names}
    rng, shard, sizes = np.random.default_rng(0), {}, []
    for name in [*sorted(shapes, key=hub_order), None]:
        size = sum(value.nbytes for value in shard.values())
        if name is None or size + 2 * np.prod(shapes[name]) > shard_bytes:
            save_file(shard, directory / f"model-{len(sizes):05d}.safetensors")
            shard, sizes = {}, [*sizes, size]
        if name is not None:
            noise = rng.standard_normal(4099).astype(ml_dtypes.bfloat16)
            shard[name] = np.resize(noise, shapes[name])
    return sizes


def run(script: str, *arguments: object, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.parametrize(
    ("case", "vocab", "layers", "shard_bytes"),
    [
        ("small tensors", 2048, 14, 72_000_000),
        pytest.param("embedding half of a shard", 32768, 18, 130_000_000, marks=pytest.mark.slow),
    ],
)
def test_loading_and_saving_need_the_memory_of_one_shard(tmp_path, measured, case, vocab, layers, shard_bytes):
    sizes = write_checkpoint(tmp_path / "model", raw_config(vocab=vocab, layers=layers), shard_bytes)
    assert len(sizes) >= 6
    (tmp_path / "model/out").mkdir()
    loading, saving = map(int, run(MEASURE, tmp_path / "model", shard_bytes).split())
    print(case, loading, saving, max(sizes), len(sizes))
    measured(f"host memory while loading, {case}, in largest shards", loading / max(sizes), at_most=1.10)
    measured(f"host memory while saving, {case}, in largest shards", saving / max(sizes), at_most=1.10)


@pytest.mark.parametrize(
    ("dtype", "small_bytes", "num_programs"),
    [("bfloat16", 0, 18 + 20), pytest.param("float32", 2**24, 2 + 2, marks=pytest.mark.slow)],
    ids=["all on devices", "small ones on the host"],
)
def test_eight_devices_hold_an_eighth_each_bit_for_bit(tmp_path, dtype, small_bytes, num_programs):
    write_checkpoint(tmp_path / "model", raw_config(vocab=512, layers=2), 2**26)
    eight = "--xla_force_host_platform_device_count=8"
    out = run(SHARDED, tmp_path / "model", dtype, small_bytes, XLA_FLAGS=eight)
    assert list(map(int, out.split())) == [33, num_programs]  # whole, and split
