"""The mesh and its one table: what is split, what is refused, and that eight devices compute what one does."""

import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from sif_jax.config import GrpoConfig, MeshConfig, SftConfig
from sif_jax.config.mesh import AXES
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.axes import check_heads, parameter_sharding
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.weights import abstract_model
from sif_jax.parallel.mesh import make_mesh, mesh_shape, slice_shapes
from sif_jax.parallel.partition import RULES, num_shards, partition
from sif_jax.parallel.placement import check_rows, split_by_prompts
from sif_jax.training import grpo, sft
from tests.conftest import ROOT
from tests.tiny_run import tiny_config

MODELS = ROOT / "configs" / "models"
SHAPES = [
    "data=8",
    "data=1,fsdp=8",
    "data=1,fsdp=4,tensor=2",
    "data=2,fsdp=2,tensor=2",
    "data=4,sequence=2",
    "data=1,fsdp=2,sequence=2,tensor=2",
    "data=1,fsdp=2,sequence=4",
]


def abstract(**axes: int) -> Any:
    """A rule about shapes needs no devices."""
    return AbstractMesh(tuple(axes.values()), tuple(axes))


def updates(stage: str, kind: str, *shapes: str) -> list[dict]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    out = subprocess.run(
        [sys.executable, "-m", "tests.mesh_updates", stage, kind, *shapes],
        env=environment,
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize(
    ("stage", "kind", "shapes"),
    [
        pytest.param("sft", "apart", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        pytest.param("grpo", "apart", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        pytest.param("sft", "full", SHAPES, marks=pytest.mark.slow),
        pytest.param("sft", "lora", SHAPES, marks=pytest.mark.slow),
        pytest.param("grpo", "full", SHAPES, marks=pytest.mark.slow),
        pytest.param("grpo", "lora", SHAPES, marks=pytest.mark.slow),
    ],
)
def test_on_any_mesh_loss_gradients_and_update_are_those_of_one_device(measured, stage, kind, shapes):
    lines = updates(stage, kind, *shapes)
    assert [line["mesh"] for line in lines] == shapes
    for line in lines:
        measured(f"{stage} update ({kind}), mesh {line['mesh']}, against one device", line["error"], at_most=1e-5)
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in line["mesh"].split(","))}
        parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        assert line["held"] < 1 / parts + 0.1, "weights and moments are split over fsdp and tensor"


@pytest.mark.parametrize(
    ("axes", "devices", "shape"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, 8, (1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 2}, 16, (2, 2, 2, 2)),
    ],
)
def test_minus_one_takes_what_is_left(axes, devices, shape):
    assert mesh_shape(MeshConfig(**axes), devices) == shape


@pytest.mark.parametrize("axes", [{"tensor": 3}, {"data": 4}, {"data": 16}, {"data": 2, "fsdp": 2, "tensor": 4}])
def test_axes_that_do_not_multiply_to_the_devices_are_refused(axes):
    with pytest.raises(InputError, match=r"does not divide the devices; got 'data=.*; expected a product of 8"):
        mesh_shape(MeshConfig(**axes), 8)


@pytest.mark.parametrize(
    ("axes", "told"),
    [({"tensor": 0}, "mesh.tensor is no number"), ({"fsdp": -1}, "two mesh axes are -1"), ({"data": -2}, "mesh.data")],
)
def test_what_is_no_mesh_is_refused(axes, told):
    with pytest.raises(ValueError, match=told):
        MeshConfig(**axes)


def test_one_device_is_a_mesh_of_every_axis():
    assert dict(make_mesh(MeshConfig()).shape) == dict.fromkeys(AXES, 1)


def test_slices_lie_along_data_alone():
    assert slice_shapes((4, 8, 1, 2), 2) == ((2, 8, 1, 2), (2, 1, 1, 1))
    with pytest.raises(InputError, match=r"slices do not divide mesh.data.*got 1; expected a multiple of 2"):
        slice_shapes((1, 16, 1, 1), 2)


@pytest.mark.parametrize(
    ("model", "tensor", "told"),
    [
        ("Qwen2.5-VL-3B-Instruct", 4, "the 2 num_key_value_heads; got 4; expected a divisor of 2"),
        ("Qwen2.5-VL-7B-Instruct", 8, "the 28 num_attention_heads; got 8; expected a divisor of 28"),
        ("Qwen2.5-VL-7B-Instruct", 7, "the 4 num_key_value_heads"),
    ],
)
def test_heads_that_tensor_does_not_divide_are_refused(model, tensor, told):
    config = Qwen2_5_VLConfig.from_directory(MODELS / model)
    with pytest.raises(InputError, match=told):
        check_heads(config, abstract(tensor=tensor), MODELS / model)
    check_heads(config, abstract(tensor=2), MODELS / model)


def test_a_run_whose_rows_do_not_divide_is_refused():
    mesh = abstract(data=2, fsdp=4, sequence=1, tensor=1)
    check_rows(16, mesh)
    with pytest.raises(InputError, match="rows do not divide over the devices; got 12; expected a multiple of 8"):
        check_rows(12, mesh)


def test_a_rollout_is_split_by_prompts_or_else_by_samples_or_refused():
    mesh = abstract(data=8)
    assert split_by_prompts(8, 3, mesh)
    assert not split_by_prompts(1, 8, mesh)
    with pytest.raises(InputError, match="neither prompts nor samples divide"):
        split_by_prompts(4, 12, mesh)


@pytest.mark.parametrize(("kind", "train"), [(SftConfig, sft.train), (GrpoConfig, grpo.train)])
def test_a_run_refuses_a_mesh_before_it_makes_its_directory(tmp_path, kind, train):
    config = tiny_config(kind, tmp_path, "mesh.tensor=3")
    with pytest.raises(InputError, match="does not divide the devices"):
        train(config)
    assert not config.run.directory.exists()


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed_tokens", (152064, 3584), ("tensor", "fsdp")),
        ("lm_head", (3584, 152064), ("fsdp", "tensor")),
        ("decoder.layers.q_proj.kernel", (28, 3584, 3584), (None, "fsdp", "tensor")),
        ("decoder.layers.o_proj.kernel", (28, 3584, 3584), (None, "tensor", "fsdp")),
        ("decoder.layers.mlp.down_proj.kernel", (28, 18944, 3584), (None, "tensor", "fsdp")),
        ("decoder.layers.q_proj.lora_a", (28, 3584, 64), (None, ("tensor", "fsdp"), None)),
        ("decoder.layers.q_proj.lora_b", (28, 64, 3584), (None, None, ("tensor", "fsdp"))),
        ("vision.blocks.mlp.up_proj.kernel", (32, 1280, 3421), (None, "fsdp", None)),  # 2 does not divide 3421
        ("decoder.norm.scale", (3584,), ("fsdp",)),
    ],
)
def test_a_weight_lies_where_the_names_of_its_axes_say(path, shape, spec):
    mesh = abstract(data=2, fsdp=4, sequence=1, tensor=2)
    assert parameter_sharding(mesh, tuple(path.split(".")), shape).spec == PartitionSpec(*spec)


@pytest.mark.parametrize("model", sorted(path.name for path in MODELS.iterdir()))
def test_eight_devices_share_every_weight_of_the_published_models(model):
    config = Qwen2_5_VLConfig.from_directory(MODELS / model)
    flat = nnx.to_flat_state(nnx.state(abstract_model(config, param_dtype="bfloat16")))
    for mesh in (abstract(data=1, fsdp=8, tensor=1), abstract(data=2, fsdp=4, tensor=2)):
        for path, leaf in flat:
            spec = parameter_sharding(mesh, path, leaf.shape).spec
            split = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
            assert len(split) == len(set(split))
            if leaf.size > 2**20 * len(leaf.shape):
                assert "fsdp" in split, path


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, *RULES]), st.integers(1, 4096)), max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_whatever_is_split_divides_evenly(axes, sizes):
    mesh = AbstractMesh(tuple(sizes), AXES)
    spec = partition(mesh, [name for name, _ in axes], [size for _, size in axes])
    for (name, size), entry in zip(axes, spec, strict=True):
        parts = [mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        assert size % math.prod(parts) == 0
        assert name or not parts
        if name and size % num_shards(mesh, name) == 0:
            assert math.prod(parts) == num_shards(mesh, name)


def test_the_head_is_put_together_once_and_never_per_chunk():
    script = """
import re, jax, jax.numpy as jnp
from sif_jax.config import MeshConfig
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.partition import sharding
from sif_jax.ops.loss import chunked_logprobs
mesh = make_mesh(MeshConfig(data=1, fsdp=8))
shapes = [((512, 64), ("batch", None)), ((64, 1024), ("embed", "vocab"))]
with jax.set_mesh(mesh):
    hidden, head = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding(mesh, a, s)) for s, a in shapes)
    ids = jax.ShapeDtypeStruct((512,), jnp.int32, sharding=sharding(mesh, ("batch",), (512,)))
    loss = lambda hidden, head, ids: chunked_logprobs(hidden, head, ids, chunk=8)[0].sum()
    text = jax.jit(jax.grad(loss)).lower(hidden, head, ids).compile().as_text()
computations = re.split(r"\\n(?=(?:ENTRY )?%[^\\n]*\\{\\n)", text)
whole = [c for c in computations if re.search(r"f32\\[64,1024\\][^\\n]*all-gather\\(", c)]
assert len(whole) == 1 and whole[0].startswith("ENTRY"), [c[:60] for c in whole]
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=ROOT)


def test_split_rows_and_join_rows_are_inverses():
    from sif_jax.training.groups import join_rows, split_rows

    rows = np.arange(24.0).reshape(12, 2)
    parts = split_rows({"x": rows}, 3)
    assert [part["x"].shape for part in parts] == [(3, 2)] * 4
    np.testing.assert_array_equal(join_rows([part["x"] for part in parts]), rows)


def test_a_micro_batch_of_fewer_rows_than_devices_is_whole_on_each_of_them():
    script = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sif_jax.config import MeshConfig
from sif_jax.parallel.mesh import make_mesh
from sif_jax.training.groups import split_rows
mesh = make_mesh(MeshConfig())
rows = np.arange(32.0, dtype=np.float32).reshape(8, 4)
with jax.set_mesh(mesh):
    split = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
    parts = [part["x"] for part in split_rows({"x": split}, 2)]
assert all(part.sharding.is_fully_replicated for part in parts)
np.testing.assert_array_equal(np.stack(parts), rows.reshape(4, 2, 4))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=ROOT)
