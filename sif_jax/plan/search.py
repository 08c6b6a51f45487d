"""Other meshes, micro-batches and remat policies for the same optimizer step: what would fit, what would be fastest (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product

from sif_jax.config import GrpoConfig, MeshConfig, SftConfig
from sif_jax.plan.analytic import estimate, estimated_seconds, fits, tensor_sizes
from sif_jax.plan.model_size import ModelSize
from sif_jax.plan.setting import Setting
from sif_jax.plan.topology import larger

REMATS = ("none", "dots", "full")


def candidates(setting: Setting) -> Iterator[Setting]:
    """Every mesh whose axes are powers of two or the rest, with every micro-batch and remat policy that go with it."""
    for mesh in meshes(setting):
        for rows, remat in product(micro_batches(setting), REMATS):
            changed = with_changes(setting, mesh=mesh, remat=remat, rows=rows)
            if divides(changed):
                yield changed


def ranked(setting: Setting, size: ModelSize) -> list[Setting]:
    """Candidates that fit by the formulas, the fastest first; of equals the one with the most room."""
    limit = setting.topology.chip.hbm_bytes
    fitting = [each for each in candidates(setting) if fits(each, size)]
    return sorted(
        fitting, key=lambda each: (round(estimated_seconds(each, size), 3), estimate(each, size).needed / limit)
    )


def smallest(setting: Setting, size: ModelSize) -> list[Setting]:
    """The candidate that needs the least memory by the formulas, if there is any."""
    return sorted(candidates(setting), key=lambda each: estimate(each, size).needed)[:1]


def meshes(setting: Setting) -> Iterator[MeshConfig]:
    devices = setting.topology.num_devices
    for tensor in tensor_sizes(setting.architecture):
        for sequence in _powers(devices // tensor):
            for fsdp in _divisors(devices // (tensor * sequence) if devices % (tensor * sequence) == 0 else 0):
                data = devices // (tensor * sequence * fsdp)
                yield MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)


def micro_batches(setting: Setting) -> list[int]:
    config = setting.config
    if isinstance(config, SftConfig):
        return _divisors(config.batch_size * config.accumulation)
    assert isinstance(config, GrpoConfig)
    return _divisors(config.prompts_per_step)


def with_changes(
    setting: Setting, *, mesh: MeshConfig | None = None, remat: str | None = None, rows: int | None = None
) -> Setting:
    """The same optimizer step in other parts."""
    config, changes = setting.config, {}
    if mesh is not None:
        changes["mesh"] = mesh
    if remat is not None:
        changes["model"] = config.model.model_copy(update={"remat": remat})
    if rows is not None and isinstance(config, SftConfig):
        changes |= {"batch_size": rows, "accumulation": config.batch_size * config.accumulation // rows}
    elif rows is not None:
        changes["micro_batch"] = rows
    return setting._replace(config=config.model_copy(update=changes))


def divides(setting: Setting) -> bool:
    """Whether rows, or prompts or their samples, go evenly over the mesh."""
    config, mesh = setting.config, setting.mesh
    shards = mesh["data"] * mesh["fsdp"]
    if isinstance(config, SftConfig):
        return config.batch_size % shards == 0 and config.data.buckets.pairs[-1][0] % mesh["sequence"] == 0
    assert isinstance(config, GrpoConfig)
    return not (config.micro_batch % shards and config.num_samples % shards)


def overrides(setting: Setting) -> str:
    """The words that make the config this one."""
    config, mesh = setting.config, setting.mesh
    words = [f"mesh.{axis}={size}" for axis, size in mesh.items() if size > 1 or axis == "data"]
    words.append(f"model.remat={config.model.remat}")
    if isinstance(config, SftConfig):
        words += [f"batch_size={config.batch_size}", f"accumulation={config.accumulation}"]
    elif isinstance(config, GrpoConfig):
        words.append(f"micro_batch={config.micro_batch}")
    return " ".join(words)


def remedies(setting: Setting, size: ModelSize, scale: float) -> Iterator[str]:
    """Of each kind of change the smallest that fits by the formulas, corrected by `scale`."""
    for text, changed in (*_remat(setting), *_fewer_rows(setting), *_more_split(setting), *_more_chips(setting)):
        kind = text.partition(":")[0]
        if fits(changed, size, scale=scale):
            yield f"{kind}: {overrides(changed)}" + (
                f" on {changed.topology.name}" if changed.topology != setting.topology else ""
            )


def first_of_each_kind(lines: Iterator[str]) -> list[str]:
    found: dict[str, str] = {}
    for line in lines:
        found.setdefault(line.partition(":")[0], line)
    return list(found.values())


def _remat(setting: Setting) -> Iterator[tuple[str, Setting]]:
    for remat in REMATS[REMATS.index(setting.config.model.remat) + 1 :]:
        yield "more remat", with_changes(setting, remat=remat)


def _rows(setting: Setting) -> int:
    config = setting.config
    return config.batch_size if isinstance(config, SftConfig) else getattr(config, "micro_batch", 1)


def _fewer_rows(setting: Setting) -> Iterator[tuple[str, Setting]]:
    for rows in reversed([rows for rows in micro_batches(setting) if rows < _rows(setting)]):
        changed = with_changes(setting, rows=rows)
        if divides(changed):
            yield "fewer rows at a time", changed


def _more_split(setting: Setting) -> Iterator[tuple[str, Setting]]:
    now = setting.mesh["fsdp"] * setting.mesh["tensor"]
    wider = [mesh for mesh in meshes(setting) if mesh.fsdp * mesh.tensor > now]
    for mesh in sorted(wider, key=lambda mesh: mesh.fsdp * mesh.tensor):
        changed = with_changes(setting, mesh=mesh)
        if divides(changed):
            yield "weights split further", changed


def _more_chips(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """With as many rows at a time as now, or where those do not divide as few as do."""
    counts = (_rows(setting), *micro_batches(setting))
    for topology in larger(setting.topology):
        bigger = setting._replace(topology=topology)
        for mesh in meshes(bigger):
            dividing = filter(divides, (with_changes(bigger, mesh=mesh, rows=rows) for rows in counts))
            yield from (("more chips", changed) for changed in islice(dividing, 1))


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
