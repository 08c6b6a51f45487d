"""The training bench's engine of ours: the programs that `sif-jax sft` and `sif-jax grpo` run, on random tokens (io)."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sif_jax.bench.peak import peak_of
from sif_jax.bench.report_line import machine
from sif_jax.bench.train_workload import (
    CLIP,
    KL_BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TEMPERATURE,
    Stage,
    TrainWork,
    make_work,
)
from sif_jax.bench.worker import Stepped
from sif_jax.config import GrpoConfig, LoraConfig, MeshConfig, OptimizerConfig, TrainBenchConfig
from sif_jax.models.qwen2_5_vl.adapter import load_adapter, save_adapter
from sif_jax.models.qwen2_5_vl.axes import place_parameters
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import take_apart
from sif_jax.models.qwen2_5_vl.lora import add_lora, linear_layers, split_trainable
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.weights import abstract_model, load_model, save_model
from sif_jax.ops.attention_backends import Backend
from sif_jax.ops.attention_choice import choose_backend
from sif_jax.parallel.host_memory import keep_freed_memory
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.placement import put_groups, shard_rows
from sif_jax.rollout.engine import encode_images
from sif_jax.training import grpo, sft
from sif_jax.training.groups import Completions, Groups, pack_completions
from sif_jax.training.optimizer import make_optimizer
from sif_jax.training.reference import reference_of
from sif_jax.training.state import from_zeros, initial_state, make_apply, state_shardings


class OurTraining:
    def __init__(self, config: TrainBenchConfig, checkpoint: Path, adapter: Path, stage: Stage) -> None:
        keep_freed_memory()  # as the commands do
        self._config = config
        self._mesh = make_mesh(MeshConfig())
        self._attention: Backend = choose_backend(config.attention, config.dtype)
        with jax.set_mesh(self._mesh):
            self._open(config, checkpoint, adapter, stage)

    def _open(self, config: TrainBenchConfig, checkpoint: Path, adapter: Path, stage: Stage) -> None:
        model = load_model(
            checkpoint,
            dtype=config.dtype,
            remat=config.remat,
            attention=self._attention,
            scan_layers=config.scan_layers,
            mesh=self._mesh,
        )
        load_adapter(model, adapter)
        place_parameters(model, self._mesh)
        self._work = make_work(config, model.config, stage)
        self._graphdef, trainable, self._frozen = split_trainable(model, lora=True, freeze_vision=True)
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", max_grad_norm=MAX_GRAD_NORM), 1
        )
        where = state_shardings(trainable, optimizer, self._mesh)
        self._state = initial_state(trainable, optimizer, where)
        self._apply = make_apply(optimizer, where)
        self._key = jax.random.key(config.seed)
        if not config.scan_layers:
            self._frozen = take_apart(self._frozen)
        if stage == "sft":
            self._gradients = sft.make_gradients(
                self._graphdef, dropout=False, packed=self._work.packed is not None, shardings=where
            )
        else:
            self._grpo = grpo_config(config)
            self._reference = reference_of(self._graphdef, trainable, self._frozen)
            add = grpo.make_gradients(self._graphdef, self._grpo, where)
            self._gradients = from_zeros(add, config.prompts // self._grpo.micro_batch)

    def step(self) -> Stepped:
        """From arrays on the host to updated weights."""
        with jax.set_mesh(self._mesh):
            return self._step()

    def _step(self) -> Stepped:
        if self._work.completed is None:
            batch = shard_rows(self._work.packed or self._work.batch, self._mesh)
            gradients, sums = self._gradients(None, self._state.trainable, self._frozen, batch, self._key)
            loss, count = sums.nll, sums.tokens
        else:
            gradients, sums = self._update(self._work)
            loss, count = sums.policy.loss, sums.policy.count
        self._state, norm = self._apply(self._state, gradients, count)
        jax.block_until_ready(self._state)
        return Stepped(float(loss) / float(count), float(norm))

    def _update(self, work: TrainWork) -> tuple[Any, grpo.Sums]:
        """Image features once per prompt, the reference, then the gradients of each micro-batch, as after a rollout."""
        assert work.completed is not None
        batch = shard_rows(work.batch, self._mesh)
        features = encode_images(self._graphdef, (self._state.trainable, self._frozen), batch)
        ids, mask, advantages = work.completed
        arrays = (ids, np.zeros(ids.shape, np.float32), mask, advantages, np.ones(advantages.shape, bool))
        ids, logprobs, mask, *earned = (put_groups(x, self._mesh, by_prompts=True) for x in arrays)
        completions = Completions(batch, features, ids, logprobs, mask)
        packings = pack_completions(work.completed.mask.sum(-1), ids.shape[-1], self._grpo, self._mesh)
        groups = Groups(completions, grpo.refer(self._reference, completions, packings, self._grpo), *earned)
        return grpo.sum_gradients(self._gradients, self._state, self._frozen, groups, packings, self._grpo)

    def figures(self) -> dict[str, Any]:
        peak = peak_of(jax.devices()[0].device_kind, self._config.dtype)
        return {
            "machine": machine(),
            "attention": self._attention,
            "peak_bytes": _peak_bytes(),
            "peak_flops": peak.flops,
            "peak_source": peak.source,
        }


def grpo_config(config: TrainBenchConfig) -> GrpoConfig:
    """The paper's objective; what concerns data and sampling is not used."""
    return GrpoConfig.model_validate(
        {
            "run": {"name": "bench"},
            "model": {"path": "bench", "dtype": config.dtype},
            "data": {"path": "bench"},
            "optimizer": {"learning_rate": LEARNING_RATE},
            "lora": {"rank": config.lora_rank},
            "objective": {"kind": "grpo", "kl": "k3", "kl_beta": KL_BETA, "clip_low": CLIP, "clip_high": CLIP},
            "temperature": TEMPERATURE,
            "num_samples": config.samples,
            "prompts_per_step": config.prompts,
            "micro_batch": config.micro_batch or config.prompts,
            "max_new_tokens": config.max_new_tokens,
        }
    )


def write_inputs(config: TrainBenchConfig, checkpoint: Path, adapter: Path) -> None:
    """Random weights, unless the config names some, and an adapter; both factors are random, so that each has a gradient."""
    rngs, dtype = nnx.Rngs(params=config.seed), jnp.dtype(config.dtype)
    if config.checkpoint is None:
        architecture = Qwen2_5_VLConfig.from_directory(config.architecture)
        save_model(Qwen2_5_VL(architecture, param_dtype=dtype, rngs=rngs), checkpoint, source=Path(config.architecture))
    model = abstract_model(Qwen2_5_VLConfig.from_directory(checkpoint), param_dtype=dtype)
    add_lora(model, **LoraConfig(rank=config.lora_rank).model_dump(), freeze_vision=True, rngs=rngs)
    _fill_second_factors(model, rngs)
    save_adapter(model, adapter, base=str(checkpoint))


def _fill_second_factors(model: Qwen2_5_VL, rngs: nnx.Rngs) -> None:
    for layer in linear_layers(model).values():
        if layer.lora_b is not None:
            layer.lora_b[...] = 0.01 * jax.random.normal(rngs.params(), layer.lora_b.shape)


def _peak_bytes() -> int:
    """Of the device's memory; on a CPU of the process, which holds what it loaded, too."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
