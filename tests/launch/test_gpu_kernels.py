"""The accounting of GPU programs, by hand: bytes, FLOPs, kinds, places and slow patterns of small HLO texts."""

import pathlib

import pytest

from launch.hlo import parse
from launch.kernels import Peaks, collectives_of, kernels_of, summary, warnings_of

STEP = (pathlib.Path(__file__).parent / "step.hlo").read_text()
X, Y, W, S = 2 * 2 * 8 * 8 * 3, 2 * 2 * 8 * 8 * 4, 2 * 4 * 3 * 3 * 3, 4 * 4  # bytes
CONVOLUTION = 2.0 * 2 * 8 * 8 * 4 * 3 * 3 * 3  # each of the outputs meets 3 x 3 x 3 numbers

PACKAGE = "/home/me/hexa_jax"


def entry(body, before=""):
    """Kernels of a program whose entry computation is `body`."""
    text = f"HloModule m\n\n{before}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    return kernels_of(parse(text)), warnings_of(parse(text))


def test_convolutions_of_a_step():
    forward, norm, of_filter, of_input = kernels_of(parse(STEP), PACKAGE)
    assert [kernel.kind for kernel in (forward, of_filter, of_input)] == [
        "convolution forward",
        "convolution filter gradient",
        "convolution input gradient",
    ]
    assert [kernel.products for kernel in (forward, of_filter, of_input)] == [CONVOLUTION] * 3
    assert [(k.read, k.written) for k in (forward, of_filter, of_input)] == [(X + W, Y), (X + Y, W), (Y + W, X)]
    assert forward.dtype == "bf16" and norm.products == 0
    # A 1x1 convolution's gradient is a forward convolution to cuDNN.
    back = STEP.replace("jit(step)/Network/conv1", "jit(step)/transpose(jvp(Network))/conv1")
    assert kernels_of(parse(back))[0].kind == "convolution input gradient"


def test_a_fusion():
    norm = kernels_of(parse(STEP), PACKAGE)[1]
    assert norm.kind == "reduction"
    assert (norm.read, norm.written) == (Y + S, S + Y)
    assert norm.others == 2 * 512  # each of 2 x 8 x 8 x 4 numbers is multiplied and added; conversions are free
    assert norm.result == "f32[4], bf16[2,8,8,4]"


def test_places_are_the_innermost_lines_of_the_package():
    forward, norm, of_filter, _ = kernels_of(parse(STEP), PACKAGE)
    assert forward.line == "models/norm.py:20"  # called from flax, which called nothing of ours
    assert norm.line == "models/norm.py:20" and norm.path == "backward: bn1/mul"
    assert of_filter.line == "" and of_filter.path == "backward: conv1/conv_general_dilated"
    old = STEP.replace("stack_frame_id=2", 'source_file="/home/me/hexa_jax/losses.py" source_line=7')
    assert kernels_of(parse(old), PACKAGE)[1].line == "losses.py:7"


def test_the_summary():
    peaks = Peaks(bandwidth=1e6, products={"bf16": 1e9}, others=1e6)
    found = summary(kernels_of(parse(STEP), PACKAGE), peaks)
    assert found["bytes"] == 3 * (X + Y + W) + 2 * (Y + S)
    assert found["flops"] == 3 * CONVOLUTION + 1024
    assert found["memory_ms"] == pytest.approx(found["bytes"] / 1000)
    assert found["flops_ms"] == pytest.approx(3 * CONVOLUTION / 1e6 + 1.024, abs=1e-3)
    # Convolutions are bound by memory here, and so is the fusion.
    assert found["floor_ms"] == pytest.approx(found["memory_ms"], abs=1e-3)
    assert found["kernels"] == found["small_kernels"] == 4
    assert list(found["by_kind"]) == [
        "convolution forward",
        "convolution filter gradient",
        "convolution input gradient",
        "reduction",
    ]
    assert found["by_kind"]["reduction"] == {
        "count": 1,
        "bytes": 2 * (Y + S),
        "flops": 1024.0,
        "floor_ms": pytest.approx(2 * (Y + S) / 1000),
    }
    assert found["largest"][0]["path"] == "backward: bn1/mul" and len(found["largest"]) == 4


def test_loops_and_branches():
    text = """
%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[], f32[64]{0}) parameter(0)
  %x = f32[64]{0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[64]{0} add(%x, %x)
  ROOT %t = (s32[], f32[64]{0}) tuple(%i, %y)
}
%small (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %y = f32[64]{0} negate(%p)
}
%large (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %z = f32[64]{0} negate(%p)
  ROOT %y = f32[64]{0} exponential(%z)
}
"""
    body = """  %p = f32[64]{0} parameter(0)
  %n = s32[] constant(0)
  %t = (s32[], f32[64]{0}) tuple(%n, %p)
  %w = (s32[], f32[64]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %q = f32[64]{0} get-tuple-element(%w), index=1
  %b = s32[] parameter(1)
  %k = f32[64]{0} conditional(%b, %q, %q), branch_computations={%small, %large}
  ROOT %c = f32[64]{0} call(%k), to_apply=%small
"""
    kernels, _ = entry(body, text)
    # x + x reads x once; of the branches the one that moves more counts.
    assert [(one.times, one.read, one.written, one.others) for one in kernels] == [(3, 256, 256, 64.0)] + [
        (1, 256, 256, 64.0)
    ] * 3
    assert sum(one.bytes for one in kernels) == 6 * 512 and sum(one.flops for one in kernels) == 6 * 64


def test_slices_and_updates_in_place():
    text = """
%fused_slice (p0: f32[100,16], p1: s32[]) -> f32[1,16] {
  %p0 = f32[100,16]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,16]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,16}
  ROOT %y = f32[1,16]{1,0} negate(%one)
}
%fused_update (p0: f32[100,16], p1: f32[1,16], p2: s32[]) -> f32[100,16] {
  %p0 = f32[100,16]{1,0} parameter(0)
  %p1 = f32[1,16]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %y = f32[100,16]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}
"""
    body = """  %p = f32[100,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %a = f32[1,16]{1,0} fusion(%p, %i), kind=kLoop, calls=%fused_slice
  %b = f32[100,16]{1,0} fusion(%p, %a, %i), kind=kLoop, calls=%fused_update
  %s = ((f32[100,16]{1,0}, s32[]), f32[1,16]{1,0}, u32[]) fusion-start(%p, %i), kind=kLoop, calls=%fused_slice
  ROOT %d = f32[1,16]{1,0} fusion-done(%s)
"""
    (one, two, asynchronous), _ = entry(body, text)
    assert (asynchronous.kind, asynchronous.read, asynchronous.written) == (one.kind, one.read, one.written)
    assert (asynchronous.others, asynchronous.times) == (16.0, 1)
    assert (one.kind, one.read, one.written) == ("gather or update", 64 + 4, 64)
    assert (two.kind, two.read, two.written) == ("gather or update", 64 + 4, 64)


def test_matrix_products():
    body = """  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %c = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %d = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config=CONFIG
"""
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    (one, two), _ = entry(body.replace("CONFIG", config))
    assert [kernel.kind for kernel in (one, two)] == ["matrix product"] * 2
    assert one.products == two.products == 2 * 8 * 4 * 16
    assert (one.dtype, two.dtype) == ("f32 highest", "f32")
    # Without TF32 it is done outside of the tensor cores.
    assert Peaks(1, {"f32": 1000.0}, 10.0).seconds(one)[1] == 102.4
    assert Peaks(1, {"f32": 1000.0}, 10.0).seconds(two)[1] == 1.024


def test_warnings():
    assert warnings_of(parse(STEP), PACKAGE) == []
    wide = STEP.replace("%x = bf16[2,8,8,3]{3,2,1,0} parameter", "%x = f32[2,8,8,3]{3,2,1,0} parameter")
    assert warnings_of(parse(wide), PACKAGE) == [
        "2 float32 convolutions in a bfloat16 program: models/norm.py:20, filter"
    ]
    planes = STEP.replace("(bf16[2,8,8,4]{3,2,1,0}, u8[0]", "(bf16[2,8,8,4]{2,1,3,0}, u8[0]")
    assert warnings_of(parse(planes), PACKAGE) == ["1 convolutions outside NHWC: models/norm.py:20"]
    # Labels alone say nothing: NCHW with channels last in memory is NHWC.
    labels = STEP.replace("bf16[2,8,8,4]{3,2,1,0}, u8", "bf16[2,4,8,8]{1,3,2,0}, u8").replace(
        'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward',
        'dim_labels=b01f_o01i->bf01, custom_call_target="__cudnn$convForward',
    )
    assert warnings_of(parse(labels), PACKAGE) == []


def test_warnings_about_other_patterns():
    body = """  %a = f32[64,64,64,64]{3,2,1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  %u = f32[8,64,64,64]{3,2,1,0} parameter(2)
  %same = f32[64,64,64,64]{3,2,1,0} copy(%a)
  %other = f32[64,64,64,64]{2,1,3,0} copy(%a)
  %turned = f32[64,64,64,64]{3,2,1,0} transpose(%a), dimensions={0,3,1,2}
  %renamed = f32[64,64,64,64]{1,3,2,0} transpose(%a), dimensions={0,3,1,2}
  %rows = f32[64,64,64,64]{3,2,1,0} transpose(%a), dimensions={0,2,1,3}
  %s = f32[64,64,64,64]{3,2,1,0} scatter(%a, %i, %u), update_window_dims={1,2,3}, to_apply=%add
  %once = f32[64,64,64,64]{3,2,1,0} scatter(%a, %i, %u), update_window_dims={1,2,3}, unique_indices=true, to_apply=%add
  %k = f32[64]{0} parameter(3)
  %sorted = f32[64]{0} sort(%k), dimensions={0}, to_apply=%add
  %back = f32[64]{0} custom-call(%k), custom_call_target="xla_ffi_python_gpu_callback"
"""
    kernels, warnings = entry(body)
    assert [warning.partition(": ")[::2] for warning in warnings] == [
        ("2 layout copies of activations", "other, turned"),
        ("1 scatters with atomic additions", "s"),
        ("1 sorts", "sorted"),
        ("1 transfers to or from the host", "back"),
    ]
    assert [kernel.kind for kernel in kernels] == ["copy or transpose"] * 5 + ["scatter"] * 2 + ["sort", "other"]


def test_collectives():
    """They compute nothing; the start of an asynchronous one results in its operands as well, which do not travel twice."""
    body = """  %a = f32[1024]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %s = ((f32[1024]{0}), f32[1024]{0}) all-reduce-start(%a), to_apply=%add
  %d = f32[1024]{0} all-reduce-done(%s)
  %g = (f32[1024]{0}, f32[4096]{0}) all-gather-start(%d), dimensions={0}
  %e = f32[4096]{0} all-gather-done(%g)
  ROOT %r = (f32[1024]{0}, f32[8]{0}) all-reduce(%a, %b), to_apply=%add
"""
    text = f"ENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    one, two, three = kernels_of(parse(text))
    assert (one.kind, one.read, one.written, one.flops) == ("collective", 4096, 4096, 0.0)
    assert (two.kind, two.read, two.written) == ("collective", 4096, 16384)
    assert (three.read, three.written) == (4096 + 32, 4096 + 32)
    assert collectives_of(parse(text)) == {
        "all-reduce f32": {"count": 2, "bytes": 2 * 4096 + 32},
        "all-gather f32": {"count": 1, "bytes": 16384},
    }


def test_a_text_without_an_entry():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("HloModule nothing\n")
