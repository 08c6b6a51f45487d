"""Compile time does not grow with depth: layers are a loop, in tracing, lowering and XLA alike."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from sif_jax.bench.workload import abstract_policy, random_batch
from sif_jax.models.qwen2_5_vl.decoder import Cache, Prefix, RowPlaces
from sif_jax.training import sft
from tests.architectures import tiny_architecture

REPEATS = 2  # alternating, the fastest counts: whatever else the machine does slows both depths


@pytest.fixture(autouse=True)
def no_persistent_cache():
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


def seconds(build: Callable[[], jax.stages.Lowered]) -> float:
    began = time.perf_counter()
    build().compile()
    return time.perf_counter() - began


def ratio(build: Callable[[int], jax.stages.Lowered], shallow: int, deep: int) -> float:
    times = [(seconds(lambda: build(shallow)), seconds(lambda: build(deep))) for _ in range(REPEATS)]
    return min(deep for _, deep in times) / min(shallow for shallow, _ in times)


def sft_step(layers: int) -> jax.stages.Lowered:
    config = tiny_architecture(layers=layers)
    graphdef, trainable, frozen = abstract_policy(config, remat="full")
    batch, key = random_batch(config, rows=1, tokens=64, image_px=(56, 56)), jax.eval_shape(lambda: jax.random.key(0))
    return sft.make_gradients(graphdef, dropout=False).lower(None, trainable, frozen, batch, key)


def decode_step(layers: int) -> jax.stages.Lowered:
    config = tiny_architecture(layers=layers)
    graphdef, *states = abstract_policy(config)
    G, R, S, U = 1, 2, 64, 32
    K, H, D = config.text.num_key_value_heads, config.text.head_dim, config.text.hidden_size

    def shape(*dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    def step(states, hidden, positions, prefix, cache, places):
        return nnx.merge(graphdef, *states).decoder.decode_step(hidden, positions, prefix, cache, places)

    prefix = Prefix(shape(layers, G, K, S, H), shape(layers, G, K, S, H), shape(G, S, dtype=jnp.bool_))
    cache = Cache(shape(layers, R, K, U, H), shape(layers, R, K, U, H))
    members, place = shape(1, G, R, dtype=jnp.int32), shape(1, R, dtype=jnp.int32)
    places = RowPlaces(members, place, shape(dtype=jnp.int32), shape(R, U, dtype=jnp.bool_))
    return jax.jit(step).lower(states, shape(R, D), shape(R, dtype=jnp.int32), prefix, cache, places)


def vision_tower(depth: int) -> jax.stages.Lowered:
    config = tiny_architecture(vision_depth=depth)
    graphdef, *states = abstract_policy(config)
    batch = random_batch(config, rows=1, tokens=64, image_px=(56, 56))
    return jax.jit(lambda states, batch: nnx.merge(graphdef, *states).image_features(batch)).lower(states, batch)


@pytest.mark.slow
def test_80_decoder_layers_compile_as_fast_as_28(measured):
    measured("compile time of an SFT step, 80 layers over 28", ratio(sft_step, 28, 80), at_most=1.5)


def test_a_decoding_step_of_80_layers_compiles_as_fast_as_one_of_28(measured):
    measured("compile time of a decoding step, 80 layers over 28", ratio(decode_step, 28, 80), at_most=1.5)


@pytest.mark.slow
def test_92_vision_blocks_compile_as_fast_as_32(measured):
    measured("compile time of the vision tower, 92 blocks over 32", ratio(vision_tower, 32, 92), at_most=1.5)
