"""Completions that attend to their prompt by a fused kernel get what XLA's two parts give: outputs, gradients, on a mesh too."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from sif_jax.bench.workload import random_batch
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.ops.group_attention import group_attention
from sif_jax.training.policy import completion_logprobs
from tests.architectures import tiny_architecture
from tests.attention_backends import on_a_gpu, traced_as
from tests.conftest import ROOT

FUSED = ["splash", pytest.param("cudnn", marks=on_a_gpu)]
# (P, M, S, T, N, K, H): groups of 1, 2 and 7; lengths that no block divides; a prompt longer and shorter than its completions.
SHAPES = [(2, 3, 130, 37, 7, 1, 128), (1, 4, 20, 150, 4, 2, 16), (3, 2, 64, 64, 2, 2, 80)]


def arrays(shape, lengths, dtype, seed=0):
    prompts, samples, before, length, heads, keys, dim = shape
    rng = np.random.default_rng(seed)
    prefix, own = (prompts, keys, before, dim), (prompts, samples, keys, length, dim)
    sizes = [(prompts, samples, length, heads, dim), prefix, prefix, own, own, (prompts, samples, length, heads, dim)]
    q, prefix_k, prefix_v, k, v, cotangent = (jnp.asarray(rng.normal(size=size), dtype) for size in sizes)
    return (q, prefix_k, prefix_v, k, v), jnp.arange(before)[None] < jnp.asarray(lengths)[:, None], cotangent


def outputs(backend, values, visible, cotangent):
    """The output, and the gradients by queries, the prompt's keys and values, the completions' keys and values."""

    def attend(q, prefix_k, prefix_v, k, v):
        return group_attention(q, prefix_k, prefix_v, visible, k, v, backend=backend)

    out, pull = jax.vjp(attend, *values)
    return out, *pull(cotangent)


def worst(name, shape, lengths, seed=0) -> float:
    given = arrays(shape, lengths, jnp.bfloat16 if name == "cudnn" else jnp.float32, seed)
    with traced_as(name):
        ours = jax.jit(outputs, static_argnums=0)(name, *given)
    theirs = jax.jit(outputs, static_argnums=0)("xla", *given)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_outputs_and_gradients_equal_those_of_the_two_parts(name, shape, measured):
    before = shape[2]
    error = worst(name, shape, [before, before // 3, 1][: shape[0]])
    tolerance = 3e-2 if name == "cudnn" else 5e-6
    measured(f"attention of completions to a prompt by {name}, against XLA's, relative", error, at_most=tolerance)


@pytest.mark.parametrize("name", FUSED)
@settings(deadline=None, max_examples=8)
@given(lengths=st.tuples(st.integers(0, 20), st.integers(0, 20)), seed=st.integers(0, 2**32 - 1))
def test_a_prompt_of_any_length_and_none_at_all(name, lengths, seed):
    assert worst(name, (2, 2, 20, 9, 4, 2, 16), lengths, seed) < (3e-2 if name == "cudnn" else 1e-5)


def test_cudnn_gets_its_fused_kernels_with_the_whole_mask_as_a_bias(monkeypatch):
    # Lowering asks for the installed cuDNN; the version is all that it wants to know.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    values, visible, cotangent = jax.eval_shape(lambda: arrays((2, 3, 130, 37, 4, 2, 80), [130, 3], jnp.bfloat16))
    kernels = [f"__cudnn$fmhaScaleBiasSoftmax{end}" for end in ("", "Backward")]
    program = export.export(
        jax.jit(lambda *given: outputs("cudnn", *given)),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in kernels],
    )(values, visible, cotangent)
    calls = [line for line in program.mlir_module().splitlines() if "__cudnn$" in line]
    assert sorted(re.findall(r"@(\S+)\(", " ".join(calls))) == kernels
    assert all("tensor<6x1x40x168xbf16>" in call for call in calls), "completions and keys, to multiples of 8"


def test_no_logits_are_held_by_a_fused_kernel():
    shape = (1, 4, 256, 512, 2, 1, 128)
    given = jax.eval_shape(lambda: arrays(shape, [256], jnp.float32))

    def largest(backend):
        program = str(jax.make_jaxpr(lambda *given: outputs(backend, *given))(*given))
        sizes = re.findall(r":f32\[([\d,]+)\]", program)
        return max(int(np.prod([int(size) for size in found.split(",")])) for found in sizes)

    queries, logits = 4 * 512 * 2 * 128, 4 * 2 * 512 * 512
    assert largest("xla") >= logits
    assert largest("splash") <= queries


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
import tests.conftest
from sif_jax.config import MeshConfig
from sif_jax.parallel.mesh import make_mesh
from tests.test_group_attention import arrays, outputs

for shape in [(4, 2, 20, 9, 4, 4, 16), (1, 4, 20, 9, 4, 4, 16), (1, 3, 20, 9, 4, 1, 16)]:
    given = arrays(shape, [20, 7, 1, 13][: shape[0]], jnp.float32)
    one = jax.jit(outputs, static_argnums=0)("splash", *given)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, sequence=2, tensor=2))):
        eight = jax.jit(outputs, static_argnums=0)("splash", *given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, eight)
    print(tuple(eight[0].sharding.spec))
"""


def test_on_eight_devices_prompts_or_samples_and_heads_are_shared_and_all_is_as_on_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    told = subprocess.run(command, env=environment, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    by_prompts, by_samples, whole = told.splitlines()
    assert by_prompts.startswith("('data', None, None, ('tensor', 'sequence')")
    assert by_samples.startswith("(None, 'data', None, ('tensor', 'sequence')")
    assert "data" not in whole, "three samples do not divide over two devices"


def test_a_policy_says_the_same_of_completions_by_a_fused_kernel():
    config = tiny_architecture()
    batch = jax.tree.map(jnp.asarray, random_batch(config, rows=2, tokens=64, image_px=(56, 56)))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 400, (2, 3, 10)))

    def logprobs(attention):
        model = Qwen2_5_VL(config, param_dtype=jnp.float32, attention=attention, rngs=nnx.Rngs(params=0))
        features = model.image_features(batch)
        return completion_logprobs(model, batch, features, ids, temperature=1.0)[0]

    np.testing.assert_allclose(logprobs("splash"), logprobs("xla"), atol=1e-5)
