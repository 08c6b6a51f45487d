"""One process of several that save and restore arrays split over a mesh (a script; needs no model)."""

import resource
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sif_jax.errors import InputError
from sif_jax.parallel.distributed import start_processes
from sif_jax.training import checkpoint
from sif_jax.training.checkpoint import Checkpoints

SPECS = {"both": PartitionSpec("data", "fsdp"), "one": PartitionSpec(None, "fsdp"), "whole": PartitionSpec()}


def arrays(mesh, scale: int):
    """The same numbers on any mesh; `moments` is on every device, `visits` on the hosts."""

    def placed(values, spec):
        return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda part: values[part])

    values = scale * np.arange(800 * 80, dtype=np.float32).reshape(800, 80) / 7
    split = {name: placed(values + number, spec) for number, (name, spec) in enumerate(SPECS.items())}
    return split | {"visits": scale * np.arange(5.0)}


def make_mesh(shape: str):
    data, fsdp = map(int, shape.split("x"))
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axes, devices=jax.devices()[: data * fsdp])


def is_same(one, other) -> bool:
    def same(a, b):
        if isinstance(a, np.ndarray):
            return a.tobytes() == b.tobytes()
        pairs = zip(a.addressable_shards, b.addressable_shards, strict=True)
        return a.sharding == b.sharding and all(np.array_equal(x.data, y.data) for x, y in pairs)

    return all(jax.tree.leaves(jax.tree.map(same, one, other)))


def restore_on(store: Checkpoints, step: int, *shapes: str) -> None:
    for shape in shapes:
        mesh = make_mesh(shape)
        _, restored, host = store.restore(step, arrays(mesh, 0))
        assert host == {"step": step}
        assert is_same(restored, arrays(mesh, step)), shape
        print("restored", step, "on", shape, flush=True)


def fail_in_this_process(what: str) -> None:
    if what == "write":  # of the arrays; as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, -1))
        return

    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    setattr(checkpoint, {"commit": "write_checksums", "restore": "_read_arrays"}[what], full)


def main() -> None:
    start_processes()
    directory, save, *rest = sys.argv[1:]
    step, shape, *failing = save.split(",")  # such as 1,2x4 or 1,2x4,write,1: process 1 cannot write
    with Checkpoints(directory, keep=9) as store:
        if store.latest() is not None:
            restore_on(store, store.latest(), *rest)
        if failing and failing[1] == str(jax.process_index()):
            fail_in_this_process(failing[0])
        began = time.monotonic()
        try:
            store.save(int(step), arrays=arrays(make_mesh(shape), int(step)), host={"step": int(step)})
            store.finish()
            restore_on(store, int(step), shape)
        except InputError as error:
            print("error:", error, flush=True)
            print("told after", time.monotonic() - began, "s; latest", store.latest(), flush=True)


if __name__ == "__main__":
    main()
