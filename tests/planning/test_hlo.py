"""Reading a dump: loops, collectives once per channel, fusions, buffers; on a program small enough to count."""

from hdlm_jax.planning import hlo

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,8]{1,0} all-reduce(%p), channel_id=9, to_apply=%add
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.9)
}

%gather_fusion (p: bf16[16,8]) -> bf16[64,8] {
  %p.1 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,8]{1,0} all-gather(%p.1), channel_id=1, dimensions={0}
}

%inner_body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %product = (s32[], f32[4]{0:T(128)}) fusion(%s), calls=%add, backend_config={"estimated_cycles":"10"}
}

%inner_cond (s: (s32[], f32[4])) -> pred[] {
  %c = s32[] constant(3)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %kernel = f32[4]{0} custom-call(%s), custom_call_target="tpu_custom_call", backend_config={"code": "
line of a kernel
}
  ", "estimated_cycles":"5"}
  %w = (s32[], f32[4]{0}) while(%s), condition=%inner_cond, body=%inner_body
  %g1 = bf16[64,8]{1,0} fusion(%s), kind=kCustom, calls=%gather_fusion
  %g2 = bf16[64,8]{1,0} fusion(%s), kind=kCustom, calls=%gather_fusion
  ROOT %t = (s32[], f32[4]{0}) tuple(%w)
}

%cond (s: (s32[], f32[4])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(12)
  %i.1 = s32[] get-tuple-element(%s), index=0
  ROOT %lt.1 = pred[] compare(%i.1, %c.1), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %grads = f32[100]{0} parameter(1)
  %loop = (s32[], f32[4]{0}) while(%x), condition=%cond, body=%body
  %ar = (f32[100]{0}, f32[4]{0}) all-reduce(%grads, %x), channel_id=5, to_apply=%add, metadata={op_name="psum"}
  %rs = bf16[16,8]{1,0} fusion(%x), calls=%all-reduce-scatter.1
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""

CHOICE = """HloModule jit_step, is_scheduled=true

%idle (x: f32[4]) -> f32[4] {
  ROOT %idle.x = f32[4]{0} fusion(%x), calls=%add, backend_config={"estimated_cycles":"1"}
}

%busy (x: f32[4]) -> f32[4] {
  %ag = bf16[64,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %busy.x = f32[4]{0} fusion(%ag), calls=%add, backend_config={"estimated_cycles":"7"}
}

ENTRY %main (x: f32[4], p: pred[], n: s32[]) -> f32[4] {
  %first = f32[4]{0} conditional(%p, %x, %x), true_computation=%idle, false_computation=%busy
  ROOT %last = f32[4]{0} conditional(%n, %first, %x, %x), branch_computations={%busy, %idle, %busy}
}
"""

REPORT = """Memory Space: default (color=0)
Total bytes: 400 (400B)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.50MiB(  9%);  1.50MiB;   2260992000;                2; 2×f32[100], bf16[3]
    2.00MiB( 18%);  512.00KiB;   3116630016;                1; bf16[64,8]
"""


def test_cycles_count_as_often_as_their_loops_run():
    assert hlo.Program(TEXT).cycles() == 12 * (5 + 3 * 10)


def test_of_a_choice_the_dearest_branch_counts():
    program = hlo.Program(CHOICE)
    assert program.cycles() == 7 + 7
    assert [(one.kind, one.count) for one in program.collectives()] == [("all-gather", 2)]


def test_collectives_count_once_per_channel_and_as_often_as_they_run():
    found = {one.kind: one for one in hlo.Program(TEXT).collectives()}
    assert (found["all-gather"].count, found["all-gather"].bytes) == (24, 24 * 64 * 8 * 2)
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (1, 416)
    assert found["all-reduce"].source == "psum" and found["all-reduce"].elements == 100
    assert (found["reduce-scatter"].count, found["reduce-scatter"].bytes) == (1, 64 * 8 * 2)


def test_sizes():
    assert hlo.size("f32[]") == 4 and hlo.size("(pred[8]{0}, /*index=1*/s8[2,2]{1,0:T(4,128)(4,1)S(1)})") == 12


def test_a_loop_with_another_condition_counts_once():
    assert hlo.trips([]) == 1


def test_the_largest_buffers_with_what_makes_them():
    first, second = hlo.buffers(REPORT, hlo.Program(TEXT))
    assert (first.bytes, first.shapes) == (1.5 * 2**20, "2×f32[100], bf16[3]")
    assert second.bytes == 512 * 2**10
