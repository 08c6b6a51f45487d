"""Attention over a shared prefix equals attention over the concatenated sequence; windows undo themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sif_jax.ops.attention import attention, segment_mask
from sif_jax.ops.group_attention import group_attention
from sif_jax.ops.loss import chunked_logprobs
from sif_jax.ops.windows import permute


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("group", [1, 3])
def test_attention_equals_its_definition_head_by_head(group):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 5, 2 * group, 4), normal(rng, 2, 2, 5, 4), normal(rng, 2, 2, 5, 4)
    mask = segment_mask(jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])) & jnp.tri(5, dtype=bool)[None]
    out = attention(q, k, v, mask)
    for b, t, n in np.ndindex(2, 5, 2 * group):
        logits = np.asarray(k[b, n // group] @ q[b, t, n] / 2)
        weights = np.exp(logits) * np.asarray(mask[b, t])
        np.testing.assert_allclose(out[b, t, n], weights / weights.sum() @ np.asarray(v[b, n // group]), atol=1e-5)


def test_a_shared_prefix_gives_what_the_concatenated_sequence_gives():
    rng = np.random.default_rng(1)
    prompts, samples, prefix_length, length = 2, 3, 6, 4
    prefix_k, prefix_v = normal(rng, prompts, 2, prefix_length, 8), normal(rng, prompts, 2, prefix_length, 8)
    q = normal(rng, prompts, samples, length, 4, 8)
    k, v = (normal(rng, prompts, samples, 2, length, 8) for _ in range(2))
    visible = jnp.arange(prefix_length)[None] < jnp.array([[6], [3]])
    causal = jnp.tril(jnp.ones((length, length), bool))
    out = group_attention(q, prefix_k, prefix_v, visible, k, v, backend="xla")
    for p, m in np.ndindex(prompts, samples):
        keys = jnp.concatenate([prefix_k[p], k[p, m]], axis=1)[None]
        values = jnp.concatenate([prefix_v[p], v[p, m]], axis=1)[None]
        mask = jnp.concatenate([jnp.broadcast_to(visible[p], (length, prefix_length)), causal], axis=1)[None]
        np.testing.assert_allclose(out[p, m], attention(q[p, m][None], keys, values, mask)[0], atol=1e-6)


def test_a_row_that_sees_nothing_is_finite():
    q, k = jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 1, 2, 4))
    assert np.isfinite(attention(q, k, k, jnp.zeros((1, 2, 2), bool))).all()


def test_permute_and_its_gradient_are_gathers_that_skip_padding():
    source = jnp.array([[2, -1, 0]])
    target = jnp.array([[2, -1, 0, -1]])
    x = jnp.arange(8.0).reshape(1, 4, 2)
    np.testing.assert_array_equal(permute(x, source, target)[0], [[4, 5], [0, 0], [0, 1]])
    gradient = jax.grad(lambda x: jnp.sum(permute(x, source, target) * jnp.array([[[1.0], [9.0], [3.0]]])))(x)
    np.testing.assert_array_equal(gradient[0], [[3, 3], [0, 0], [1, 1], [0, 0]])


def test_the_gradient_by_hidden_states_computes_the_logits_once_and_that_of_a_frozen_head_not_at_all():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(64, 32), (32, 512)]]
    targets = jnp.zeros(64, jnp.int32)

    def flops(argnums):
        gradient = jax.grad(lambda h, w: chunked_logprobs(h, w, targets)[0].sum(), argnums=argnums)
        return jax.jit(gradient).lower(*shapes).compile().as_text().count(" dot(")

    assert (flops(0), flops((0, 1))) == (2, 4)


@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_chunked_logprobs_equal_the_whole_softmax_and_so_does_the_gradient(chunk):
    rng = np.random.default_rng(2)
    hidden, head, targets = normal(rng, 10, 6), normal(rng, 6, 17), jnp.asarray(rng.integers(0, 17, 10))

    def whole(hidden, head):
        return jax.nn.log_softmax(hidden @ head / 0.7)[jnp.arange(10), targets]

    def ours(hidden, head):
        return chunked_logprobs(hidden, head, targets, temperature=0.7, chunk=chunk)[0]

    np.testing.assert_allclose(ours(hidden, head), whole(hidden, head), atol=1e-5)
    gradients = (jax.grad(lambda *x, by=by: jnp.sum(by(*x) ** 2), argnums=(0, 1))(hidden, head) for by in (ours, whole))
    for own, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-4)
    entropy = chunked_logprobs(hidden, head, targets, chunk=chunk)[1]
    probs = jax.nn.softmax(hidden @ head)
    np.testing.assert_allclose(entropy, -jnp.sum(probs * jnp.log(probs), axis=-1), atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_rows_that_nobody_asks_for_change_nothing_and_chunks_of_them_alone_are_not_computed(chunk):
    rng = np.random.default_rng(3)
    hidden, head, targets = normal(rng, 10, 6), normal(rng, 6, 17), jnp.asarray(rng.integers(0, 17, 10))
    wanted = jnp.zeros(10, bool).at[jnp.array([1, 4, 8])].set(True)

    def loss(hidden, head, asked):
        return jnp.sum(jnp.where(wanted, chunked_logprobs(hidden, head, targets, asked, chunk=chunk)[0], 0.0) ** 2)

    every, few = (chunked_logprobs(hidden, head, targets, asked, chunk=chunk) for asked in (None, wanted))
    for own, expected in zip(few, every, strict=True):
        np.testing.assert_allclose(own[wanted], expected[wanted], atol=1e-6)
    every, few = (jax.grad(loss, argnums=(0, 1))(hidden, head, asked) for asked in (None, wanted))
    for own, expected in zip(few, every, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-5)
    if chunk < 100:  # the last chunks hold none that is wanted: what they would compute is not a number
        spoilt = jnp.where(jnp.arange(10)[:, None] == 9, jnp.nan, hidden)
        assert np.isfinite(chunked_logprobs(spoilt, head, targets, wanted, chunk=chunk)[0][9])
