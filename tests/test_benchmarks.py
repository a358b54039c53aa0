"""The benchmark of a GPU: its rehearsal on the CPU, how it reads a profile, and the page of its results."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "benchmarks/gpu.py")
MEASUREMENTS = (
    "gpu_tests", "ceilings", "throughput", "profile", "time_to_quality", "sampling", "memory", "settings", "pairs",
)  # fmt: skip
RATES = ("images_per_s", "pairs_per_s", "bf16_tflops", "copy_tb_per_s", "ms_per_step", "seconds", "heldout_mse", "busy")
"""Figures that are positive wherever they are given."""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """The module that makes tables; its folder is found by scripts alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield import_module("gpu_measurements.page")


@pytest.fixture(scope="module")
def profile(page: Any) -> Any:  # noqa: ARG001 # for its path
    return import_module("gpu_measurements.profile")


@pytest.mark.slow  # and all of tests/gpu, on the CPU
def test_the_rehearsal_gives_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    command = (*COMMAND, "--rehearse", "--out", str(out), "--commit", "abc")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(dict.fromkeys(line["measurement"] for line in lines)) == ["machine", *MEASUREMENTS]
    assert lines[0]["commit"] == "abc"
    assert [line for line in lines if {"error", "skipped"} & line.keys()] == []
    for line in lines:
        figures = [value for value in line.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in figures), line
        assert all(line[name] > 0 for name in RATES if name in line), line
    of = {name: [line for line in lines if line["measurement"] == name] for name in MEASUREMENTS}
    assert of["gpu_tests"][0]["passed"]
    trained = {(line["training"], line["compiled"], line["precision"]) for line in of["throughput"]}
    ours = {("cifar10", True, "bf16"), ("cifar10", False, "bf16"), ("cifar10", False, "tf32")}
    assert trained == ours | {("diffusers, best", True, "bf16"), ("diffusers, example", False, "tf32")}
    assert {line["by"] for line in of["sampling"]} == {"torch", "torch, compiled", "diffusers", "ONNX Runtime"}
    assert {"convolution", "matrix product", "attention", "normalization", "optimizer", "copy"} <= set(
        of["profile"][0]["ms_by_kind"]
    )
    assert [line["step"] for line in of["time_to_quality"] if "step" in line] == [3, 6]
    assert [line["recompute"] for line in of["memory"]] == [False, True]
    assert "| cifar10 | 4 | bf16 | yes |" in done.stdout  # the table at the end


@pytest.mark.slow  # starts a process
def test_without_a_gpu_it_says_so_and_rehearses(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    command = (*COMMAND, "--only", "ceilings", "--out", str(out))
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["no GPU: rehearsing tiny on the CPU; these figures are of no GPU"]
    assert [json.loads(line)["measurement"] for line in out.read_text().splitlines()] == ["machine", "ceilings"]


@pytest.mark.slow  # starts a process
def test_an_unknown_measurement_is_refused() -> None:
    done = subprocess.run((*COMMAND, "--only", "speed"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--only: no measurement 'speed'; there are gpu_tests, ceilings" in done.stderr.splitlines()[-1]


@pytest.mark.slow  # starts a process
def test_the_page_is_that_of_the_committed_files() -> None:
    """The command would change nothing."""
    committed = ROOT / "benchmarks" / "results" / "gpu.md"
    before = committed.read_bytes()
    subprocess.run((*COMMAND, "--page"), cwd=ROOT, capture_output=True, check=True)
    try:
        assert committed.read_bytes() == before
    finally:
        committed.write_bytes(before)


def test_the_page_says_what_is_of_the_current_code(page: Any) -> None:
    all_of_them = {"ceilings": "Products.", "memory": "The most.", "profile": "A step."}
    old = [{"measurement": "machine", "device": "Old"}, {"measurement": "ceilings", "bf16_tflops": 700.0}]
    new = [
        {"measurement": "machine", "device": "New", "commit": "1234", "torch": "3.0"},
        {"measurement": "ceilings", "bf16_tflops": 900.0},
        {"measurement": "profile", "error": "RuntimeError: no"},
    ]
    first = page.page({"gpu-old.jsonl": old}, all_of_them)
    assert "**No figure of the current code on a GPU exists.**" in first
    assert "**Of earlier code**: the file does not state its commit." in first
    assert "- `ceilings`: Products.\n- `memory`: The most.\n- `profile`: A step." in first
    both = page.page({"gpu-old.jsonl": old, "gpu-new.jsonl": new}, all_of_them)
    assert "No figure of the current code" not in both
    assert "Of commit 1234." in both
    assert "torch 3.0" in both
    assert "- `memory`: The most.\n- `profile`: A step." in both
    assert "- `ceilings`" not in both


def test_slices_of_one_contender_are_one_row(page: Any) -> None:
    def line(name: str, number: int, rate: float) -> dict[str, Any]:
        facts = {"measurement": "throughput", "training": name, "batch_size": 8}
        first = {"first_s": 9.0, "peak_gib": 5.0} if number == 0 else {}
        return facts | first | {"slice": number, "images_per_s": rate, "mfu": rate / 1000}

    rates = {"cifar10": (30.0, 10.0, 20.0), "diffusers, best": (8.0, 4.0, 6.0)}
    found = page.tables([line(name, number, rates[name][number]) for number in range(3) for name in rates])
    assert "| cifar10 | 8 | 20 | 10 | 30 | 3 | 0.02 | 9 | 5 |" in found
    assert "| diffusers, best | 8 | 6 | 4 | 8 | 3 | 0.006 | 9 | 5 |" in found
    assert "The fastest here trains 3.33 times as many images a second as the fastest of diffusers." in found


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("nvjet_sm90_tst_64x8_64x16_1x4_h_bx_NNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128>", "matrix product"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>", "normalization"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel1<float>", "normalization"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::AUnaryFunctor<...>>", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copy"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("triton_poi_fused_convolution_silu_3", "elementwise"),
        ("triton_red_fused_native_group_norm_12", "normalization"),
        ("triton_per_fused_convolution_backward_sum_4", "reduction"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, NormTwoOps>>", "reduction"),
        ("void at::native::distribution_elementwise_grid_stride_kernel<float, 4>", "random"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_sorted_by_their_names(profile: Any, kernel: str, kind: str) -> None:
    assert profile.kind_of(kernel) == kind


def test_time_in_which_kernels_overlap_counts_once(profile: Any) -> None:
    assert profile.union([(5.0, 9.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 7.0
    assert profile.union([]) == 0.0
