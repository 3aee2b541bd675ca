"""A profile assigns every kernel to its category and phase, and measures what overlaps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from eagle_ds.bench.profile import Kernel, category_of, common, length, read_trace, summarize, table, union

PHASES = ("forward", "backward", "optimizer")

NAMES = {
    "communication": [
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    ],
    "copies and fills": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, "
        "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>(int)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
        "std::array<char*, 1ul> >",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, "
        "unsigned int, 2, 64, 64>",
        "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int)",
    ],
    "matmul": [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_"
        "k_off_kernel__5x_cublas",
        "void "
        "cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(T1::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
    ],
    "attention prefix": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128, 64, false, 256, cudnn::fusion::Policy>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, "
        "64, 128> >",
        "_dkv_kernel",
        "_row_sums_kernel",
        "triton_tem_fused_flex_attention_0",
    ],
    "attention diagonals": [
        "_diagonal_forward_kernel",
    ],
    "loss": [
        "_row_kernel",
        "_label_kernel",
    ],
    "norm": [
        "triton_red_fused_mean_mul_pow_rsqrt_0",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>",
        "_norm_backward_kernel",
    ],
    "elementwise": [
        "_swiglu_backward_kernel",
        "_add_kernel",
        "_add_rows_kernel",
        "_take_rows_kernel",
        "_rotate_kernel",
        "triton_poi_fused_add_mul_1",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, "
        "std::array<char*, 3ul> >",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, "
        "at::native::func_wrapper_t<float> > >",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, "
        "4>, c10::BFloat16>",
    ],
    "other": [
        "some_kernel_of_tomorrow",
    ],
}
"""Names of kernels as traces show them, by category."""


@pytest.mark.parametrize(("name", "category"), [(n, category) for category in NAMES for n in NAMES[category]])
def test_the_category_follows_from_the_kernels_name(name: str, category: str) -> None:
    assert category_of(name) == category


def test_the_launch_of_a_kernel_overrides_its_name() -> None:
    assert Kernel("nvjet_gemm", 0, 1, "forward").category == "matmul"
    assert Kernel("nvjet_gemm", 0, 1, "forward", in_loss=True).category == "loss"
    assert Kernel("triton_poi_fused_mul", 0, 1, "optimizer").category == "optimizer"
    assert Kernel("ncclDevKernel_AllGather", 0, 1, "optimizer").category == "communication"


def test_interval_arithmetic() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length([(0, 4), (5, 6)]) == 5
    assert common([(0, 4), (5, 9)], [(1, 2), (3, 6), (8, 20)]) == 1 + 1 + 1 + 1
    assert common([], [(0, 1)]) == 0


def test_overlapped_communication_is_measured() -> None:
    kernels = [
        Kernel("nvjet_gemm", 0, 1000, "forward"),
        Kernel("ncclDevKernel_SendRecv", 500, 1500, "forward"),  # half of it overlaps the matmul
        Kernel("ncclDevKernel_SendRecv", 500, 1500, "forward"),  # two channels at once count once
        Kernel("Memcpy DtoH (Device -> Pinned)", 1000, 1500, "forward"),  # moves data, does not compute
        Kernel("_rotate_kernel", 1800, 2000, "backward"),
    ]
    profile = summarize(kernels)
    assert profile.span_ms == 2.0 and profile.busy == 0.85
    assert profile.communication_ms == 1.0 and profile.overlapped == 0.5
    assert {name: share.total for name, share in profile.shares.items()} == {
        "communication": 2000,
        "matmul": 1000,
        "copies and fills": 500,
        "elementwise": 200,
    }
    text = table(profile, PHASES)
    assert "| matmul | 1.00 | 27.0% | 1 | 1.00 | 0.00 | 0.00 |" in text
    assert "50% of it overlapped by computing kernels" in text


def test_a_trace_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="profile on a GPU"):
        summarize([])


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_shows_where_a_kernel_was_launched(tmp_path: Path, name: str) -> None:
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
        event("user_annotation", "forward", -300, 100),  # the previous step; its last kernel runs in this one
        event("user_annotation", "optimizer", -100, 90),
        event("cuda_runtime", "cudaLaunchKernel", -50, 2, correlation=5),
        event("kernel", "nvjet_e", 5, 10, correlation=5),
        event("user_annotation", "forward", 0, 100),
        event("user_annotation", "head and loss", 50, 40),
        event("user_annotation", "backward", 100, 100),
        event("cpu_op", "aten::mm", 10, 5),
        event("cuda_runtime", "cudaLaunchKernel", 12, 2, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 60, 2, correlation=2),
        # another thread during the loss
        event("cuda_runtime", "cudaMemcpyAsync", 61, 2, tid=9, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 150, 2, tid=7, correlation=4),  # autograd's thread
        event("kernel", "nvjet_a", 200, 10, correlation=1),
        event("kernel", "nvjet_b", 210, 10, correlation=2),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 220, 10, correlation=3),
        event("kernel", "nvjet_c", 230, 10, correlation=4),
        event("kernel", "nvjet_d", 240, 10, correlation=99),  # its launch is not in the trace
    ]
    path = tmp_path / name
    with gzip.open(path, "wt") if name.endswith("gz") else path.open("w") as file:
        json.dump({"traceEvents": events}, file)
    found = {kernel.name[-1]: (kernel.phase, kernel.in_loss, kernel.category) for kernel in read_trace(
        path, PHASES, "head and loss"
    )}
    assert found == {
        "a": ("forward", False, "matmul"),
        "b": ("forward", True, "loss"),
        ")": ("forward", False, "copies and fills"),
        "c": ("backward", False, "matmul"),
        "d": ("between", False, "matmul"),
    }
