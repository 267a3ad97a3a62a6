# ruff: noqa: E501  (the text of a compiled program has long lines)
"""Plans for slices that are not here: texts of compiled programs by hand, and with libtpu the real compiler."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mmjax.errors import MmjaxError
from mmjax.training import optimized, roofline
from mmjax.training.optimized import allocations
from mmjax.training.plan import SETTINGS, plan, sentences
from mmjax.training.roofline import CHIPS, Collective, collectives, loops, out_of_memory

EXPERIMENT = pathlib.Path(__file__).with_name("plan_experiment.py")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

PROGRAM = """HloModule jit_step
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[1024,512]) -> f32[512,512] {
  %all-reduce.5 = f32[1024,512]{1,0:T(8,128)} all-reduce(%input), channel_id=5, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %dynamic-slice.5 = f32[512,512]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.5, %zero, %zero)
}

%cond (p: (s32[], f32[7])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[7])) -> (s32[], f32[7]) {
  %g = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, dimensions={0}
  %alone = f32[11]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
}

ENTRY %main (p0: f32[7]) -> f32[7] {
  %r = (f32[]{:T(128)}, f32[11]{0:T(128)S(1)}, f32[5,11]{1,0:T(8,128)S(1)}) all-reduce(%a, %b, %c), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%add
  %f = f32[512,512]{1,0:T(8,128)S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %w = (s32[]{:T(128)}, f32[7]{0}) while(%t), condition=%cond, body=%body, metadata={op_name="jit(step)/while"}
  %s = (f32[3,5]{1,0}, f32[12,5]{1,0}) all-gather-start(%q), replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[12,5]{1,0} all-gather-done(%s)
  %p = (f32[13]{0}, f32[13]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_of_a_program():
    results = {(one.kind, one.size): one for one in collectives(PROGRAM)}
    assert results == {
        ("reduce-scatter", 512 * 512 * 4): Collective("reduce-scatter", 512 * 512 * 4, 2, 1),
        ("all-gather", 1024 * 512 * 2): Collective("all-gather", 1024 * 512 * 2, 2, 3),
        ("all-reduce", 4 * (1 + 11 + 55)): Collective("all-reduce", 4 * 67, 8, 1),
        ("all-gather", 240): Collective("all-gather", 240, 4, 1),
        ("collective-permute", 52): Collective("collective-permute", 52, 2, 1),
    }
    assert loops(PROGRAM) == [3]


def test_a_collective_beside_other_work_counts_once():
    """TPU's compiler writes it into each fusion between its start and its end."""
    part = """%{name} (p: bf16[6,7]) -> bf16[24,7] {{
  ROOT %g = bf16[24,7]{{0,1}} all-gather(%p), channel_id={channel}, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}
}}
"""
    parts = [("start", 1, 0), ("middle", 1, 0), ("end", 1, 0), ("other", 72, 1), ("again", 72, 1)]
    text = "".join(part.format(name=name, channel=channel, chain=chain) for name, channel, chain in parts)
    calls = "".join(
        f"  %f{i} = bf16[24,7] fusion(%p), kind=kCustom, calls=%{name}\n" for i, (name, *_) in enumerate(parts)
    )
    text += f"ENTRY %main (p: bf16[6,7]) -> bf16[24,7] {{\n{calls}}}\n"
    assert collectives(text) == [Collective("all-gather", 24 * 7 * 2, 4, 2)]


def test_bytes_of_the_ring_algorithms():
    assert Collective("all-reduce", 120, 4).sent == 180
    assert Collective("all-gather", 120, 4).sent == 90
    assert Collective("reduce-scatter", 30, 4).sent == 90
    assert Collective("all-to-all", 120, 4).sent == 90
    assert Collective("collective-permute", 120, 4).sent == 120


def test_roofline_by_hand():
    chip = CHIPS["TPU v5 lite"]
    results = roofline.roofline(chip, 197e12, 0.5 * 8.19e11, [Collective("all-gather", 2 * 10**9, 2, 9)])
    assert results == pytest.approx({"compute": 1.0, "memory": 0.5, "network": 0.05})


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.27G of "
        "15.75G hbm. Exceeded hbm capacity by 4.52G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.27G) exceeds available HBM (15.75G).",
    ],
)
def test_out_of_memory_messages(message):
    results = out_of_memory(message)
    assert results == pytest.approx({"used": 20.27 * 2**30, "capacity": 15.75 * 2**30, "missing": 4.52 * 2**30})
    assert out_of_memory("INVALID_ARGUMENT: something else") is None


def test_code_counts_for_what_fits():
    hbm = 16 * 2**30
    assert roofline.without_capacity({"total": int(15.7 * 2**30), "hbm": hbm}) is None
    excess = roofline.without_capacity({"total": int(15.99 * 2**30), "hbm": hbm})
    assert excess is not None and excess["missing"] / 2**30 == pytest.approx(0.24, abs=1e-6)


def test_collectives_of_a_program_compiled_here():
    """XLA's CPU text has the same grammar; one device has no collectives, and a scan its length."""

    def step(x):
        return jax.lax.scan(lambda carry, row: (carry @ row, None), x, jnp.ones((13, 5, 5)))[0]

    text = jax.jit(step).lower(jnp.ones((5, 5))).compile().as_text()
    assert collectives(text) == []
    assert loops(text) in ([13], [])


@needs_libtpu
def test_plan_of_a_step():
    result = plan(EXPERIMENT, "v5e:2x4", ["--batch_size", "128"])
    json.dumps(result)
    assert (result["chip"], result["chips"], result["batch_size"], result["fits"]) == ("v5e", 8, 128, True)
    up, down = 1024 * 512 * 4, 512 * 4
    # Cut in two by fsdp: the kernel, its momentum copy and its two moments; the small leaf is whole everywhere.
    arguments = result["arguments"]
    assert arguments["params"] == up // 2 + down
    assert arguments["ema"] == up // 2
    assert arguments["opt_state"] == 2 * (up // 2 + down) + 4
    assert arguments["batch"] == 128 // 8 * (1024 + 1) * 4
    assert result["memory"]["arguments"] >= sum(arguments.values())
    assert result["memory"]["aliased"] >= up // 2 * 4
    # Forward and one backward matmul (the inputs need no gradient) of 16 rows a chip, and little else.
    assert result["flops"] == pytest.approx(2 * 2 * 16 * 1024 * 512, rel=0.5)
    results = {(row["kind"], row["size"], row["group"]) for row in result["collectives"]}
    assert {("all-gather", up // 2, 2), ("reduce-scatter", up // 2, 2), ("all-reduce", up // 2, 4)} <= results
    assert result["step_seconds"] == max(result["roofline"].values()) == result["roofline"][result["bound"]]
    np.testing.assert_allclose(result["examples_per_second"], 128 / result["step_seconds"])
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in roofline.tables(result):
        console.print(table)
    text = console.export_text()
    console.file.close()
    assert "reduce-scatter" in text and "of 16.00 GiB" in text and "<- bound" in text


def test_allocations_of_a_buffer_assignment():
    """Vector memory ("color 1") and what lives within a kernel are not high-bandwidth memory."""
    text = """BufferAssignment:
allocation 0: size 100, parameter 0, shape |f32[5,5]| at ShapeIndex {}, maybe-live-out:
 value: <0 p0 @0> (size=100,offset=0): f32[5,5]{1,0:T(8,128)}
allocation 1: size 11, parameter 1, shape |s8[11]| at ShapeIndex {}:
allocation 2: size 20, output shape is |(f32[5])|, maybe-live-out:
allocation 3: size 7, constant:
allocation 4: size 512, thread-local:
allocation 5: size 3000, preallocated-temp:
allocation 6: size 98746368, color 1, preallocated-temp:
"""
    assert allocations(text) == {"arguments": 111, "temporaries": 3007, "output": 120, "aliased": 100}


@needs_libtpu
def test_the_program_without_machine_code_costs_what_the_whole_one_does(tmp_path):
    """In a process of its own, because libtpu reads the flags once."""
    code = """
import json, pathlib, sys
from mmjax.training import optimized
from mmjax.training.experiment import load_experiment, parse_overrides
from mmjax.training.plan import _shapes, describe_topology
config = parse_overrides(load_experiment(sys.argv[2]), ["--batch_size", "65536"])
lift, _, state, batch = _shapes(config, describe_topology("v5e:2x4"))
lowered = lift.lower(state, batch)
whole = lowered.compile()
memory, cost = whole.memory_analysis(), whole.cost_analysis()
program = optimized.optimize(lowered, pathlib.Path(sys.argv[1]))
names = {"argument": "arguments", "temp": "temporaries", "output": "output", "alias": "aliased"}
results = [[getattr(memory, f"{name}_size_in_bytes"), program.memory[ours]] for name, ours in names.items()]
results += [[cost["flops"], program.flops], [cost["bytes accessed"], program.moved]]
print(json.dumps(results + [[memory.generated_code_size_in_bytes, program.memory["code"]]]))
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(EXPERIMENT)]
    environment = os.environ | SETTINGS | {"XLA_FLAGS": optimized.flags(str(tmp_path))}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    arguments, temporaries, output, aliased, flops, moved, code_size = json.loads(ran.stdout.splitlines()[-1])
    assert flops[0] == flops[1] > 1e10
    for pair in (arguments, temporaries, output, aliased):
        assert pair[1] == pytest.approx(pair[0], rel=0.01, abs=2**20)
    assert moved[1] == pytest.approx(moved[0], rel=0.06)
    assert 0.1 < code_size[1] / code_size[0] < 10


@needs_libtpu
def test_micro_batches_are_a_loop():
    result = plan(EXPERIMENT, "v5e:2x4", ["--accumulate", "4", "--batch_size", "4096"])
    assert result["loops"] == [4]
    gathers = [row for row in result["collectives"] if row["kind"] == "all-gather" and row["size"] == 1024 * 512 * 2]
    assert sum(row["count"] for row in gathers) == 4
    assert any("counts a body once" in sentence for sentence in sentences(result))
    # The same rows in four parts are the same matrix work.
    assert result["flops"] == pytest.approx(2 * 2 * 512 * 1024 * 512, rel=0.05)


def test_loops_count_by_their_length():
    def step(x, w, image, kernel):
        x = x @ w  # 2 * 3 * 5 * 5 = 150
        x, _ = jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=7)
        convolved = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x, convolved  # [2, 3, 5, 7] out, 3 * 3 * 11 in: 2 * 210 * 99 = 41580

    arrays = jnp.ones((3, 5)), jnp.ones((5, 5)), jnp.ones((2, 5, 7, 11)), jnp.ones((3, 3, 11, 7))
    jaxpr = jax.make_jaxpr(jax.jit(step))(*arrays)
    assert roofline.loop_factor(jaxpr) == pytest.approx((150 * 8 + 41580) / (150 * 2 + 41580))
    assert roofline.loop_factor(jax.make_jaxpr(jnp.sin)(1.0)) == 1.0


@needs_libtpu
def test_a_plan_that_is_too_large_reports_the_excess():
    result = plan(EXPERIMENT, "v5e:2x4", ["--width", "2000000"])
    memory = result["memory"]
    assert not result["fits"]
    assert memory["missing"] == pytest.approx(memory["used"] - memory["capacity"])
    assert 0 < memory["missing"] < 30 * 2**30 and 15 * 2**30 < memory["capacity"] < 16 * 2**30
    assert "does not fit" in sentences(result)[0] and "GiB more" in sentences(result)[0]


@needs_libtpu
def test_what_cannot_be_planned():
    with pytest.raises(MmjaxError, match="--topology v5e:3x7"):
        plan(EXPERIMENT, "v5e:3x7")
    with pytest.raises(MmjaxError, match="does not use 4 devices"):
        plan(EXPERIMENT, "v5e:2x2", ["--mesh.data", "3"])
    with pytest.raises(MmjaxError, match="not a multiple of 4 shards"):
        plan(EXPERIMENT, "v5e:2x2", ["--batch_size", "6"])
    toy = EXPERIMENT.parent.parent / "faults" / "toy_experiment.py"
    with pytest.raises(MmjaxError, match="lacks example_batch"):
        plan(toy, "v5e:2x2")
