"""The programs of one optimizer step of a run, with abstract arguments: the run's own functions, nothing rebuilt (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sif_jax.config import GrpoConfig, SftConfig, TrainConfig
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import are_apart, copy_layers, join_layers, stacked_states
from sif_jax.ops.attention_backends import Backend
from sif_jax.ops.attention_choice import EVERYWHERE, NATIVE
from sif_jax.parallel.partition import num_shards
from sif_jax.parallel.placement import check_rows, split_by_prompts
from sif_jax.plan.abstract import (
    abstract_batch,
    abstract_policy,
    device_bytes,
    group,
    placed_as,
    random_key,
    shape,
    whole,
)
from sif_jax.rollout import programs as rollout
from sif_jax.rollout.engine import shared_slots
from sif_jax.rollout.sampling import Sampling
from sif_jax.rollout.schedule import Slots, Spread, empty_rows
from sif_jax.training import grpo, sft
from sif_jax.training.groups import Completions, Groups
from sif_jax.training.optimizer import make_optimizer
from sif_jax.training.reference import Reference, reference_logprobs, reference_of
from sif_jax.training.state import StateShardings, TrainState, make_apply, state_shardings

STEPS = 1000  # of the learning rate's schedule; no program depends on their number
SPECIAL_IDS = 2  # tokens that end a completion; how many does not matter


class Program(NamedTuple):
    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    settings: dict[str, Any]  # static arguments
    calls: float  # in one optimizer step
    beside: float  # bytes that a device holds meanwhile and that are no argument
    turns: int = 1  # of a loop whose length the program does not say


class State(NamedTuple):
    """What a run holds from step to step."""

    graphdef: nnx.GraphDef
    trainable: Any
    frozen: Any
    moments: Any
    step: Any
    shardings: StateShardings
    optimizer: Any

    @property
    def states(self) -> tuple[Any, Any]:
        return self.trainable, self.frozen


Compile = Callable[[Program], Any]  # a compiled program, whose results' places the next programs need


def run_programs(
    config: TrainConfig,
    architecture: Qwen2_5_VLConfig,
    mesh: Mesh,
    platform: str,
    compile_: Compile,
    completion_tokens: int | None = None,
) -> Iterator[Program]:
    """In the order in which a step runs them.

    Raises:
      InputError: the batch does not divide over the mesh.
    """
    # Outside of `jax.set_mesh`: optax makes a few small arrays here, and no device of the mesh can hold them.
    state = abstract_state(config, architecture, mesh, attention_of(config, platform))
    with jax.set_mesh(mesh):
        yield from _programs(config, architecture, mesh, platform, state, compile_, completion_tokens)


def _programs(
    config: TrainConfig,
    architecture: Qwen2_5_VLConfig,
    mesh: Mesh,
    platform: str,
    state: State,
    compile_: Compile,
    completion_tokens: int | None,
) -> Iterator[Program]:
    if isinstance(config, SftConfig):
        yield from sft_programs(config, architecture, mesh, state)
    elif isinstance(config, GrpoConfig):
        wanted = platform != "tpu" if config.separate_layers is None else config.separate_layers
        separate = are_apart(state.states) or wanted
        yield from grpo_programs(config, architecture, mesh, state, separate, compile_, completion_tokens)


def attention_of(config: TrainConfig, platform: str) -> Backend:
    """The platform's own where the config leaves the choice; a run proves it right before it takes it.

    Raises:
      InputError: the kernel that the config names is another platform's.
    """
    wanted, native = config.model.attention, NATIVE.get(platform, "xla")
    if native == "cudnn" and config.model.dtype == "float32":
        native = "xla"
    if wanted == "auto":
        return native
    if wanted not in {native, *EVERYWHERE}:
        fix = "set model.attention=auto"
        raise InputError(f"{wanted} attention does not run on {platform}", value=wanted, fix=fix)
    return wanted


def abstract_state(config: TrainConfig, architecture: Qwen2_5_VLConfig, mesh: Mesh, attention: Backend) -> State:
    graphdef, trainable, frozen = abstract_policy(config, architecture, mesh, attention)
    optimizer = make_optimizer(config.optimizer, STEPS)
    where = state_shardings(trainable, optimizer, mesh)
    moments = placed_as(jax.eval_shape(optimizer.init, trainable), where.moments)
    return State(graphdef, trainable, frozen, moments, shape((), jnp.int32, where.step), where, optimizer)


def sft_programs(config: SftConfig, architecture: Qwen2_5_VLConfig, mesh: Mesh, state: State) -> Iterator[Program]:
    check_rows(config.batch_size, mesh)
    batch = abstract_batch(config, architecture, mesh, config.batch_size)
    function = sft.make_gradients(
        state.graphdef, dropout=has_dropout(config), packed=config.packing, shardings=state.shardings
    )
    arguments = (state.trainable, state.frozen, batch, random_key(mesh))
    earlier = earlier_sums(function, arguments, mesh)
    moments, waiting = device_bytes(state.moments), device_bytes(batch)
    yield Program(
        "gradients",
        function,
        (earlier if config.accumulation > 1 else None, *arguments),
        {},
        config.accumulation,
        moments + waiting,
    )
    yield apply_program(state, mesh, 1, waiting)


def has_dropout(config: TrainConfig) -> bool:
    return config.lora is not None and config.lora.dropout > 0


def earlier_sums(function: Any, arguments: tuple[Any, ...], mesh: Mesh) -> tuple[Any, Any]:
    """The gradients and sums of the micro-batches before."""
    _, sums = jax.eval_shape(function, None, *arguments)
    return arguments[0], jax.tree.map(lambda x: whole(x, mesh), sums)


def apply_program(state: State, mesh: Mesh, calls: int, beside: float) -> Program:
    held = TrainState(state.step, state.trainable, state.moments)
    count = whole(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    function = make_apply(state.optimizer, state.shardings)
    beside += device_bytes(state.frozen)
    return Program("optimizer", function, (held, state.trainable, count), {}, calls, beside)


def grpo_programs(
    config: GrpoConfig,
    architecture: Qwen2_5_VLConfig,
    mesh: Mesh,
    state: State,
    separate: bool,
    compile_: Compile,
    completion_tokens: int | None,
) -> Iterator[Program]:
    by_prompts = split_by_prompts(config.micro_batch, config.num_samples, mesh)
    batch = abstract_batch(config, architecture, mesh, config.prompts_per_step, by_rows=by_prompts)
    beside = device_bytes(state.moments) + copied_bytes(config, state)
    images = Program("images", rollout.encode_images, (state.graphdef, state.states, batch), {}, 1, beside)
    yield images
    features = results(images, compile_)
    held = beside + device_bytes((batch, features))
    yield from rollout_programs(
        config, architecture, mesh, state, batch, features, separate, compile_, held, completion_tokens
    )
    yield from learning_programs(config, architecture, mesh, state, features, beside)


def copied_bytes(config: GrpoConfig, state: State) -> float:
    """Of the policy at the start, which a full fine-tune with a KL keeps."""
    return device_bytes(state.trainable) if config.objective.kl_beta and config.lora is None else 0.0


def results(program: Program, compile_: Compile) -> Any:
    """Shapes and places of what a program returns."""
    traced = program.function.trace(*program.arguments, **program.settings)
    return placed_as(traced.out_info, compile_(program).output_shardings)


def rollout_programs(
    config: GrpoConfig,
    architecture: Qwen2_5_VLConfig,
    mesh: Mesh,
    state: State,
    batch: Any,
    features: Any,
    separate: bool,
    compile_: Compile,
    held: float,
    completion_tokens: int | None,
) -> Iterator[Program]:
    by_prompts, lanes = split_by_prompts(config.micro_batch, config.num_samples, mesh), num_shards(mesh, "batch")
    spread: Spread = "prompts" if by_prompts else "samples"
    sampling = sampling_of(config, architecture)
    slots, each = shared_slots(
        sampling,
        lanes=lanes,
        prompts=config.prompts_per_step,
        samples=config.num_samples,
        spread=spread,
        rows=config.decode_rows,
        prefill=config.micro_batch,
    )
    text, dtype, length = architecture.text, jnp.dtype(config.model.dtype), batch["tokens"].shape[1]
    common = {"config": text, "dtype": dtype, "separate": separate}

    def made(function: Any, **settings: Any) -> Any:
        return results(Program("", function, (), settings | common, 0, 0), compile_)

    graphdef, states = state.graphdef, state.states
    layers = None
    if separate:
        apart = Program("layers apart", copy_layers, (stacked_states(states),), {}, 1, held)
        yield apart
        copies = results(apart, compile_)
        layers = join_layers(states, copies)
        held += device_bytes(copies)
    pool = made(rollout.empty_pool, slots=lanes * slots.prompts, length=length)
    unit, shown = prompts_unit(config, architecture, mesh, batch, features, each * lanes if by_prompts else each)
    places = jax.ShapeDtypeStruct((lanes, each), jnp.int32)
    yield Program(
        "prompts",
        rollout.prefill,
        (graphdef, states, pool, unit, shown, places),
        {"spread": spread},
        config.prompts_per_step // unit["tokens"].shape[0],
        held if unit is not batch else held - device_bytes((batch, features)),
    )
    yield from decoding(config, state, pool, layers, slots, sampling, held, made, completion_tokens)


def prompts_unit(
    config: GrpoConfig, architecture: Qwen2_5_VLConfig, mesh: Mesh, batch: Any, features: Any, rows: int
) -> tuple[Any, Any]:
    """The prompts of one pass, as `rollout.engine.split_prompts` cuts them."""
    if rows == config.prompts_per_step:
        return batch, features
    by_prompts = split_by_prompts(config.micro_batch, config.num_samples, mesh)
    unit = abstract_batch(config, architecture, mesh, rows, by_rows=by_prompts)
    return unit, some_rows(features, rows, mesh)


def some_rows(features: Any, rows: int, mesh: Mesh) -> Any:
    """As `training.groups.split_rows` lays them: like all of them, or whole on every device where they are too few."""
    dims = (rows, *features.shape[1:])
    whole_rows = shape(dims, features.dtype)
    split = features.shape[0] // features.sharding.shard_shape(features.shape)[0]
    return whole(whole_rows, mesh) if rows % split else shape(dims, features.dtype, features.sharding)


def sampling_of(config: GrpoConfig, architecture: Qwen2_5_VLConfig) -> Sampling:
    special = (architecture.image_token_id, architecture.video_token_id)
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        stop_ids=tuple(range(SPECIAL_IDS)),
        forbidden_ids=special,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop=config.stop,
    )


def decoding(
    config: GrpoConfig,
    state: State,
    pool: Any,
    layers: Any,
    slots: Slots,
    sampling: Sampling,
    held: float,
    made: Callable[..., Any],
    completion_tokens: int | None,
) -> Iterator[Program]:
    """All rows at the longest ring, and the ring's last doubling, in which the old and the new one are held."""
    ring = slots.rings[-1]
    cache = made(rollout.empty_cache, rows=slots.lanes * slots.rows, length=ring)
    column = jax.ShapeDtypeStruct((), jnp.int32)
    waves = -(-config.prompts_per_step * config.num_samples // (slots.lanes * slots.rows))
    tokens = completion_tokens or config.max_new_tokens
    yield Program(
        "decoding",
        rollout.decode,
        (state.graphdef, state.states, layers, pool, cache, column, empty_rows(slots, slots.rows)),
        {"sampling": sampling, "max_steps": slots.max_steps},
        waves * tokens / slots.max_steps,
        held,
        slots.max_steps,
    )
    if len(slots.rings) > 1:
        shorter = made(rollout.empty_cache, rows=slots.lanes * slots.rows, length=slots.rings[-2])
        source = jax.ShapeDtypeStruct((slots.lanes, slots.rows), jnp.int32)
        yield Program(
            "longer ring",
            rollout.rearrange,
            (shorter, source, column),
            {"length": ring},
            1,
            held + device_bytes((state.states, pool)),
        )


def learning_programs(
    config: GrpoConfig, architecture: Qwen2_5_VLConfig, mesh: Mesh, state: State, features: Any, beside: float
) -> Iterator[Program]:
    parts = config.prompts_per_step // config.micro_batch
    groups = abstract_groups(config, architecture, mesh, features)
    completions = groups.completions
    others = (2 * parts - 1 if parts > 1 else 0) * device_bytes(groups)  # the whole, and its parts
    if config.objective.kl_beta:
        reference = abstract_reference(config, state)
        arguments = (*reference, completions.batch, completions.features, completions.ids)
        yield Program(
            "reference", reference_logprobs, arguments, {"temperature": config.temperature}, parts, beside + others
        )
    function = grpo.make_gradients(state.graphdef, config, state.shardings)
    arguments = (state.trainable, state.frozen, groups, random_key(mesh))
    earlier = earlier_sums(function, arguments, mesh) if parts > 1 else None
    updates = config.updates_per_rollout
    yield Program("gradients", function, (earlier, *arguments), {}, parts * updates, beside + others)
    held = copied_bytes(config, state) + others + device_bytes(groups)
    yield apply_program(state, mesh, updates, held)


def abstract_groups(config: GrpoConfig, architecture: Qwen2_5_VLConfig, mesh: Mesh, features: Any) -> Groups:
    """One micro-batch whose longest completion is as long as any may be."""
    rows = config.micro_batch
    by_prompts = split_by_prompts(rows, config.num_samples, mesh)
    batch = abstract_batch(config, architecture, mesh, rows, by_rows=by_prompts)
    place = partial(group, mesh=mesh, by_prompts=by_prompts)
    tokens, each = (rows, config.num_samples, config.max_new_tokens), (rows, config.num_samples)
    shown = some_rows(features, rows, mesh) if config.freeze_vision else None
    logprobs = place(tokens, jnp.float32)
    completions = Completions(batch, shown, place(tokens, jnp.int32), logprobs, place(tokens, jnp.bool_))
    reference = logprobs if config.objective.kl_beta else None
    return Groups(completions, reference, place(each, jnp.float32), place(each, jnp.bool_))


def abstract_reference(config: GrpoConfig, state: State) -> Reference:
    if config.lora is None:
        return Reference(state.graphdef, state.states)
    return reference_of(state.graphdef, state.trainable, state.frozen)
