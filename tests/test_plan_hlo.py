"""Compiled programs are read right: collectives known by hand, loops, what a fusion reads, what lies in vector memory."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sif_jax.plan.collectives import collectives, group_size
from sif_jax.plan.hlo import Instruction, Program, shapes_of
from sif_jax.plan.memory_traffic import memory_traffic
from tests.conftest import ROOT
from tests.known_collectives import SHARD, TURNS

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed (libtpu)"
)
# By hand, of eight devices: how often, and the bytes that one of them sends.
KNOWN = {
    "gathered": {"all-gather": [TURNS, TURNS * 7 * SHARD]},
    "reduced": {"all-reduce": [1, 2 * 7 / 8 * SHARD]},
    "scattered": {"reduce-scatter": [1, 7 / 8 * SHARD]},
    "exchanged": {"all-to-all": [1, 7 / 8 * SHARD]},
    "passed_on": {"collective-permute": [TURNS, TURNS * SHARD]},
    "until_large": {"all-reduce": [TURNS, TURNS * 2 * 7 / 8 * SHARD]},
}
# Of a small array the TPU's compiler sums all on every device, and cuts afterwards.
ON_TPU = KNOWN | {"scattered": {"all-reduce": [1, 2 * 7 / 8 * SHARD]}}


def found_on(target: str) -> dict[str, dict[str, list[float]]]:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.known_collectives", target]
    done = subprocess.run(command, env=os.environ | flags, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_collectives_compiled_for_eight_cpu_devices_are_those_known_by_hand():
    assert found_on("cpu") == KNOWN


@NEEDS_LIBTPU
def test_collectives_compiled_for_eight_tpus_are_those_known_by_hand():
    assert found_on("v5e:2x4") == ON_TPU


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,4]<=[2,8]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 16),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(2)4}", 4),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_1'}", 4),
        ("replica_groups={}", 16),
    ],
)
def test_the_size_of_a_group_is_read_from_every_way_of_writing_it(groups, size):
    assert group_size(Instruction("x", "f32[8]", "all-reduce", (), f", {groups}, to_apply=%add", False), 16) == size


def test_a_group_that_is_written_in_another_way_is_refused():
    with pytest.raises(ValueError, match="cannot read the group of x: replica_groups=new"):
        group_size(Instruction("x", "f32[8]", "all-reduce", (), ", replica_groups=new[4]", False), 16)


def test_a_fusion_that_goes_on_with_a_collective_inside_a_loop_does_not_count_again():
    program = Program("""HloModule m
%start (p: f32[64]) -> f32[512] {
  %p = f32[64]{0} parameter(0)
  ROOT %g = f32[512]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}
%goes_on (p.1: f32[64]) -> f32[512] {
  %p.1 = f32[64]{0} parameter(0)
  ROOT %g.1 = f32[512]{0} all-gather(%p.1), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}
%cond (v: (s32[], f32[64])) -> pred[] {
  %v = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%v), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (w: (s32[], f32[64])) -> (s32[], f32[64]) {
  %w = (s32[], f32[64]{0}) parameter(0)
  %j = s32[] get-tuple-element(%w), index=0
  %x = f32[64]{0} get-tuple-element(%w), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %f = f32[512]{0} fusion(%x), kind=kCustom, calls=%goes_on
  ROOT %t = (s32[], f32[64]{0}) tuple(%next, %x)
}
ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %s = f32[512]{0} fusion(%a), kind=kCustom, calls=%start
  %zero = s32[] constant(0)
  %init = (s32[], f32[64]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[64]{0}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[64]{0} get-tuple-element(%loop), index=1
}
""")
    assert program.turns == {"loop": 6}  # 0, 2, … 10
    assert collectives(program, devices=8) == {"all-gather": (1, 7 * 64 * 4)}


LOOP = """HloModule m
%cond (v: (s32[], s32[])) -> pred[] {
  %v = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%v), index=0
  %n = s32[] get-tuple-element(%v), index=1
  ROOT %lt = pred[] compare(%n, %i), direction=GT
}
%body (w: (s32[], s32[])) -> (s32[], s32[]) {
  %w = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%w), index=0
  %n.1 = s32[] get-tuple-element(%w), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %n.1)
}
ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %bound = s32[] constant(9)
  %start = s32[] constant(3)
  %copied = s32[] copy(%start)
  %init = (s32[], s32[]) tuple(%copied, BOUND)
  %loop = (s32[], s32[]) while(%init), condition=%cond, body=%body
  ROOT %out = s32[] get-tuple-element(%loop), index=0
}
"""


def test_a_loop_is_counted_from_its_start_to_a_bound_that_it_carries():
    assert Program(LOOP.replace("BOUND", "%bound")).turns == {"loop": 6}


def test_a_loop_whose_length_is_an_argument_is_counted_as_often_as_the_reader_is_told():
    program = Program(LOOP.replace("BOUND", "%a"))
    assert program.turns == {"loop": None}
    assert program.runs(unknown=7)["body"] == 7
    assert program.runs()["body"] == 1


def test_a_length_that_the_compiler_tells_is_taken():
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"28"}}')
    assert Program(known.replace("BOUND", "%a")).turns == {"loop": 28}


ROW_OF_A_STACK = """%slice (stack: f32[10,256], i: s32[]) -> f32[256] {
  %stack = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,256]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%cut)
}
"""


def test_memory_traffic_counts_slices_of_a_stack_and_leaves_out_vector_memory():
    program = Program(
        f"HloModule m\n{ROW_OF_A_STACK}"
        """ENTRY %main (a: f32[10,256], k: s32[]) -> f32[256] {
  %a = f32[10,256]{1,0:T(8,128)} parameter(0)
  %k = s32[] parameter(1)
  %row = f32[256]{0:T(256)} fusion(%a, %k), kind=kLoop, calls=%slice
  %near = f32[256]{0:T(256)S(1)} negate(%row)
  ROOT %out = f32[256]{0:T(256)} exponential(%near)
}
"""
    )
    row, index = 4 * 256, 4
    assert memory_traffic(program) == (row + index + row) + row + row  # read and write; read; write


def test_memory_traffic_sees_slices_and_updates_in_fusions_within_fusions():
    """As libtpu writes a layer's product with its own weights of a stack: the slice is a fusion of the product's fusion."""
    program = Program(
        f"HloModule m\n{ROW_OF_A_STACK}"
        """%update (into: f32[10,256], row: f32[256], j: s32[]) -> f32[10,256] {
  %into = f32[10,256]{1,0} parameter(0)
  %row = f32[256]{0} parameter(1)
  %j = s32[] parameter(2)
  %none = s32[] constant(0)
  %wide = f32[1,256]{1,0} bitcast(%row)
  ROOT %done = f32[10,256]{1,0} dynamic-update-slice(%into, %wide, %j, %none)
}
%outer (a.1: f32[10,256], k.1: s32[], b.1: f32[10,256]) -> f32[10,256] {
  %b.1 = f32[10,256]{1,0} parameter(2)
  %k.1 = s32[] parameter(1)
  %a.1 = f32[10,256]{1,0} parameter(0)
  %own = f32[256]{0} fusion(%a.1, %k.1), kind=kLoop, calls=%slice
  %twice = f32[256]{0} add(%own, %own)
  ROOT %stored = f32[10,256]{1,0} fusion(%b.1, %twice, %k.1), kind=kLoop, calls=%update
}
ENTRY %main (a: f32[10,256], k: s32[], b: f32[10,256]) -> f32[10,256] {
  %a = f32[10,256]{1,0:T(8,128)} parameter(0)
  %k = s32[] parameter(1)
  %b = f32[10,256]{1,0:T(8,128)} parameter(2)
  ROOT %out = f32[10,256]{1,0:T(8,128)} fusion(%a, %k, %b), kind=kOutput, calls=%outer
}
"""
    )
    row, index = 4 * 256, 4
    assert memory_traffic(program) == row + index + row  # the slice, the index, the update


def test_types_are_read_with_their_sizes_and_places():
    shapes = list(shapes_of("(bf16[2,3]{1,0:T(8,128)S(1)}, pred[]{:T(512)}, s4[8]{0}, token[])"))
    assert [shape.nbytes for shape in shapes] == [12, 1, 4, 0]
    assert [shape.in_main_memory for shape in shapes] == [False, True, True, True]
