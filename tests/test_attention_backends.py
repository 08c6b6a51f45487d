"""Every backend of self-attention against one reference in float64: outputs, gradients, packing, memory, the choice."""

import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from sif_jax.errors import InputError
from sif_jax.ops import attention_backends, attention_choice
from sif_jax.ops.attention_backends import BACKENDS, self_attention
from sif_jax.ops.attention_choice import choose_backend
from sif_jax.ops.scan import scan_layers
from tests.attention_backends import RUNNABLE, traced_as

# (T, N, K, H, causal): decoder and vision heads; groups of 1, 2, 7; lengths that no block and no chunk divides.
SHAPES = [(130, 7, 1, 128, True), (37, 4, 2, 16, True), (131, 2, 2, 80, False)]
BATCH = 2


def reference(q, k, v, cotangent, segments, *, causal):
    """(output, gradients by q, k, v) in float64, head by head."""
    (batch, length, heads, dim), num_keys = q.shape, k.shape[1]
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    for b, n in np.ndindex(batch, heads):
        key = n // (heads // num_keys)
        logits = q[b, :, n] @ k[b, key].T / np.sqrt(dim)
        mask = segments[b][:, None] == segments[b][None, :]
        logits[~(mask & np.tri(length, dtype=bool) if causal else mask)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[b, :, n] = weights @ v[b, key]
        by_weights = cotangent[b, :, n] @ v[b, key].T
        by_logits = weights * (by_weights - (by_weights * weights).sum(-1, keepdims=True)) / np.sqrt(dim)
        dq[b, :, n] = by_logits @ k[b, key]
        dk[b, key] += by_logits.T @ q[b, :, n]
        dv[b, key] += weights.T @ cotangent[b, :, n]
    return out, dq, dk, dv


@cache
def compiled(name, shape):
    """(q, k, v, cotangent, segments) → (output, gradients by q, k, v)."""
    length, heads, num_keys, dim, causal = shape
    backend, dtype = name.split()[0], jnp.bfloat16 if name == "cudnn" else jnp.float32

    def outputs(q, k, v, cotangent, segments):
        def attend(q, k, v):
            return self_attention(q, k, v, segments, causal=causal, backend=backend)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    queries = jax.ShapeDtypeStruct((BATCH, length, heads, dim), dtype)
    keys = jax.ShapeDtypeStruct((BATCH, num_keys, length, dim), dtype)
    with traced_as(name):
        return jax.jit(outputs).lower(
            queries, keys, keys, queries, jax.ShapeDtypeStruct((BATCH, length), np.int32)
        ).compile(), dtype


def errors(name, shape, segments, seed):
    """Of the output, then of each gradient, relative to its largest value."""
    (length, heads, num_keys, dim, causal), rng = shape, np.random.default_rng(seed)
    function, dtype = compiled(name, shape)
    sizes = [(length, heads, dim), (num_keys, length, dim), (num_keys, length, dim), (length, heads, dim)]
    arrays = [jnp.asarray(rng.normal(size=(BATCH, *size)), dtype) for size in sizes]
    ours = function(*arrays, jnp.asarray(segments))
    theirs = reference(*(np.asarray(x, np.float64) for x in arrays), segments, causal=causal)
    return [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]


def packed(length, *rows):
    """Segments of rows that hold examples of these lengths, cut at the end of the row."""
    numbered = [np.repeat(np.arange(1, len(row) + 1), row)[:length] for row in rows]
    return np.stack([np.pad(row, (0, length - len(row))) for row in numbered]).astype(np.int32)


@pytest.mark.parametrize("name", RUNNABLE)
def test_outputs_and_gradients_equal_the_definition_in_float64(name, measured):
    tolerance = 2e-2 if name == "cudnn" else 2e-6
    every = [errors(name, shape, packed(shape[0], [3, shape[0] // 2], [7]), seed=0) for shape in SHAPES]
    measured(f"attention by {name} against float64, relative", max(of[0] for of in every), at_most=tolerance)
    worst = max(max(of[1:]) for of in every)
    measured(f"gradients of attention by {name} against float64, relative", worst, at_most=tolerance)


ROW = st.lists(st.integers(1, 90), max_size=5)  # none: a row of padding


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RUNNABLE)
@settings(deadline=None, max_examples=6)
@given(rows=st.tuples(ROW, ROW), seed=st.integers(0, 2**32 - 1))
def test_any_packing_gives_what_the_definition_gives(name, shape, rows, seed):
    assert max(errors(name, shape, packed(shape[0], *rows), seed)) < (3e-2 if name == "cudnn" else 1e-5)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_row_alone_needs_no_segments(name):
    """Real positions and their gradients are the same; padding, which gives no loss, may differ."""
    rng, segments = np.random.default_rng(0), jnp.asarray(packed(37, [20], [37]))
    shapes = [(2, 37, 4, 16), *[(2, 2, 37, 16)] * 2]
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16 if name == "cudnn" else jnp.float32) for shape in shapes
    )

    def total(backend, packed):
        def loss(q, k, v):
            out = self_attention(q, k, v, segments, causal=True, backend=backend, packed=packed)
            return jnp.sum(jnp.where((segments > 0)[:, :, None, None], out, 0).astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    with traced_as(name):
        ours = jax.tree.leaves(total(name.split()[0], packed=False))
    for own, expected in zip(ours, jax.tree.leaves(total("xla", packed=True)), strict=True):
        error = jnp.abs(own - expected).max() / jnp.abs(expected).max()
        assert error < (3e-2 if name == "cudnn" else 1e-5)


@pytest.mark.parametrize("name", RUNNABLE)
def test_bfloat16_stays_bfloat16_and_near_float32(name, measured):
    rng, segments = np.random.default_rng(0), jnp.asarray(packed(37, [20, 10], [37]))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in [(2, 37, 4, 16), *[(2, 2, 37, 16)] * 2])
    with traced_as(name):
        out = self_attention(q, k, v, segments, causal=True, backend=name.split()[0])
    assert out.dtype == jnp.bfloat16
    wide = self_attention(*(x.astype(jnp.float32) for x in (q, k, v)), segments, causal=True, backend="xla")
    error = jnp.abs(out - wide).max() / jnp.abs(wide).max()
    measured(f"bfloat16 attention by {name} against float32, relative", error, at_most=0.01)


@pytest.mark.parametrize("backend", ["xla", "flash"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_a_long_row_never_holds_its_logits_whole(gradient, backend, measured):
    heads, length, dim = 16, 8192, 80

    def total(q, k, v, segments):
        return self_attention(q, k, v, segments, causal=True, backend=backend).sum()

    function = jax.grad(total, argnums=(0, 1, 2)) if gradient else total
    shapes = [(1, length, heads, dim), (1, heads, length, dim), (1, heads, length, dim)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(function).lower(*arguments, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
    arrays = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", program.as_text())
    share = max(math.prod(map(int, shape.split(","))) for shape in arrays) / (heads * length**2)
    kind = "gradient" if gradient else "forward"
    measured(f"{backend} attention at 8192 positions, {kind}: largest array, share of N T T", share, at_most=1 / 16)
    temporary = program.memory_analysis().temp_size_in_bytes / (4 * heads * length**2)
    measured(
        f"{backend} attention at 8192 positions, {kind}: temporary bytes, share of 4 N T T", temporary, at_most=1 / 5
    )


@pytest.mark.parametrize(
    ("packed", "kernel"), [(True, "fmhaScaleBiasSoftmax"), (False, "fmhaSoftmax")], ids=["packed", "alone"]
)
def test_cudnn_gets_its_fused_kernels_with_the_segments_of_packed_rows_as_an_explicit_bias(monkeypatch, packed, kernel):
    # Lowering asks for the installed cuDNN; the version is all that it wants to know.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def total(q, k, v, segments):
        out = self_attention(q, k, v, segments, causal=True, backend="cudnn", packed=packed)
        return out.astype(jnp.float32).sum()

    kernels = [f"__cudnn${kernel}", f"__cudnn${kernel}Backward"]
    shapes = [(2, 250, 4, 80), (2, 2, 250, 80), (2, 2, 250, 80)]
    lowered = export.export(
        jax.jit(jax.grad(total, argnums=(0, 1, 2))),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in kernels],
    )(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), jax.ShapeDtypeStruct((2, 250), jnp.int32))
    calls = [line for line in lowered.mlir_module().splitlines() if "__cudnn$" in line]
    assert sorted(re.findall(r"@(\S+)\(", " ".join(calls))) == kernels
    assert all(("tensor<2x1x256x256xbf16>" in call) == packed for call in calls)


@pytest.mark.parametrize(
    ("backend", "marked", "remat", "times"),
    [
        ("cudnn", "dot_product_attention_fwd_wrapper[", "dots", 1),
        ("cudnn", "dot_product_attention_fwd_wrapper[", "full", 2),
        ("flash", " = exp ", "dots", 2),  # once forward, and the weights again for the gradient
        ("flash", " = exp ", "full", 3),
    ],
)
def test_dots_keeps_what_attention_needs_for_its_gradient(monkeypatch, backend, marked, remat, times):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    segments = jnp.ones((1, 256), jnp.int32)

    def total(q):
        def layer(q, _):
            return self_attention(q, q.swapaxes(1, 2), q.swapaxes(1, 2), segments, causal=True, backend=backend), None

        return scan_layers(layer, q, jnp.arange(9), remat=remat)[0].astype(jnp.float32).sum()

    program = str(jax.make_jaxpr(jax.grad(total))(jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)))
    assert program.count(marked) == times


@pytest.fixture
def on_a_tpu(monkeypatch):
    """A process that believes to be on a TPU, where splash is computed by the function that is given."""

    def pretend(splash):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        monkeypatch.setitem(BACKENDS, "splash", splash)

    choose_backend.cache_clear()
    yield pretend
    choose_backend.cache_clear()


def ignores_segments(q, k, v, segments, causal, packed):
    return BACKENDS["xla"](q, k, v, jnp.ones_like(segments), causal, packed)


def gives_nan(q, k, v, segments, causal, packed):
    return jnp.where(segments[..., None, None] > 0, BACKENDS["xla"](q, k, v, segments, causal, packed), jnp.nan)


def does_not_lower(q, k, v, segments, causal, packed):
    raise ValueError("no such kernel\nsecond line")


def test_auto_takes_the_platforms_own_backend_once_and_says_so_once(on_a_tpu, capsys):
    on_a_tpu(BACKENDS["xla"])
    assert choose_backend("auto", "bfloat16") == choose_backend("auto", "bfloat16") == "splash"
    assert capsys.readouterr().err == "attention: splash (tpu)\n"


@pytest.mark.parametrize(
    ("broken", "told"), [(ignores_segments, "off by"), (gives_nan, "off by nan"), (does_not_lower, "no such kernel")]
)
def test_a_backend_that_computes_something_else_is_left_or_refused_by_name(broken, told, on_a_tpu, capsys):
    on_a_tpu(broken)
    assert choose_backend("auto", "bfloat16") == "xla"
    assert re.fullmatch(rf"attention: xla \(tpu; splash attention .*{told}.*\)\n", capsys.readouterr().err)
    with pytest.raises(InputError, match=rf"splash attention .*{told}.*; fix: set model.attention=auto"):
        choose_backend("splash", "bfloat16")


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_an_accelerators_backend_is_refused_on_a_cpu(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(InputError, match=f"{name} attention does not run on cpu; got '{name}'; fix: "):
        choose_backend(name, "bfloat16")


def test_cudnn_is_not_tried_in_float32(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_choice, "_error", None)
    assert attention_choice.why_not("cudnn", "float32") == "cudnn attention computes in bfloat16 only"


ON_FOUR_DEVICES = """
import itertools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sif_jax.ops.attention_backends import self_attention

mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for backend, rows in itertools.product(("splash", "flash"), (4, 3)):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in [(rows, 130, 4, 16), *[(rows, 2, 130, 16)] * 2])
    segments = np.tile(np.repeat([1, 2, 0], [60, 50, 20]).astype(np.int32), (rows, 1))

    def gradients(q, k, v, segments):
        def total(q, k, v):
            out = self_attention(q, k, v, segments, causal=True, backend=backend)
            return (out**2).sum(), out
        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    one = jax.jit(gradients)(q, k, v, segments)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")) if rows == 4 else PartitionSpec())
    with jax.set_mesh(mesh):
        four = jax.jit(gradients)(*jax.device_put((q, k, v, segments), sharding))
    assert four[1].sharding.is_equivalent_to(sharding, 4), four[1].sharding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 if backend == "flash" else 0), one, four)
"""


@pytest.mark.slow
def test_splash_and_flash_on_four_devices_give_each_its_rows_and_what_one_device_gives():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    root = Path(attention_backends.__file__).parents[2]
    subprocess.run([sys.executable, "-c", ON_FOUR_DEVICES], env=environment, check=True, cwd=root)
