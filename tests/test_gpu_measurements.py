"""The measurements of the GPU benchmark: reading profiles, and running out of time or memory."""

import gc
import itertools
import shutil
import subprocess
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

ROOT = Path(__file__).parents[1]
Measurements = Callable[[str], Any]


@pytest.fixture(scope="module")
def measurements() -> Iterator[Measurements]:
    """Imports a module of gpu_measurements, whose folder only scripts have on their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield lambda name: import_module(f"gpu_measurements.{name}")


@pytest.fixture(scope="module")
def profile(measurements: Measurements) -> Any:
    return measurements("profile")


@pytest.fixture
def bench(measurements: Measurements) -> Any:
    """A rehearsal with no time left."""
    return measurements("bench").Bench(True, 0, Path("none"))


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
        ("triton_poi_fused__to_copy_convolution_silu_5", "elementwise"),
        ("triton_poi_fused_native_dropout_silu", "elementwise"),
        ("triton_red_fused__to_copy_native_group_norm_backward_7", "normalization"),
        ("triton_tem_fused__to_copy_addmm_2", "matrix product"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, NormTwoOps>>", "reduction"),
        ("void at::native::distribution_elementwise_grid_stride_kernel<float, 4>", "random"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_classified_by_name(profile: Any, kernel: str, kind: str) -> None:
    assert profile.kind_of(kernel) == kind


def test_overlapping_time_counts_once(profile: Any) -> None:
    assert profile.union([(5.0, 9.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 7.0
    assert profile.union([]) == 0.0


def test_annotations_are_not_kernels(profile: Any) -> None:
    def event(name: str, start: float, end: float, annotation: bool = False) -> FunctionEvent:
        return FunctionEvent(0, name, 0, start, end, device_type=DeviceType.CUDA, is_user_annotation=annotation)

    events = [
        event("## Call CompiledFxGraph abc ##", 0, 1000, annotation=True),
        event("Optimizer.step#AdamW.step", 0, 1000),
        event("nvjet_sm90", 100, 400),
        event("triton_poi_fused_add_0", 500, 600),
    ]
    found = profile.summary(events, 1e-3, 1, on_gpu=True)
    assert (found["kernels"], found["busy"]) == (2, 0.4)
    assert found["ms_by_kind"] == {"matrix product": 0.3, "elementwise": 0.1}


def test_only_synchronizing_operations_are_counted(profile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's notice that it does not detect all of them is not counted."""
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)

    def step() -> None:
        warnings.warn("Synchronization debug mode ... does not yet detect all synchronizing operations.", stacklevel=1)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", stacklevel=1)

    assert profile.waits(step) == 2


@pytest.mark.parametrize(
    ("card", "mfu"),
    [
        ("NVIDIA H100 80GB HBM3", 3 / 989),
        ("NVIDIA H100 PCIe", 3 / 756),
        ("NVIDIA H200", 3 / 989),
        ("NVIDIA A100-SXM4-40GB", 3 / 312),
        ("NVIDIA A100 80GB PCIe", 3 / 312),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_the_peak_is_that_of_the_exact_card(measurements: Measurements, card: str, mfu: float | None) -> None:
    utilization = measurements("turns").utilization
    counts = SimpleNamespace(flops=1e12)
    found = utilization(SimpleNamespace(card=card, products={}), counts, "bf16", images_per_s=1)
    assert found.get("mfu") == (mfu and pytest.approx(mfu, rel=0.01))


def test_without_time_every_contender_is_skipped(measurements: Measurements, bench: Any) -> None:
    turns = measurements("turns")
    contenders = [turns.Contender({"training": name}, 1, pytest.fail) for name in ("one", "other")]
    found = list(turns.slices(bench, contenders, rounds=3, seconds=1))
    assert found == [{"training": name, "skipped": "no time left"} for name in ("one", "other")]


def test_a_stage_ends_when_no_time_is_left(
    measurements: Measurements, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = measurements("checks")
    stage = tmp_path / "python"
    stage.write_text("#!/bin/sh\nexec sleep 60\n")
    stage.chmod(0o755)
    monkeypatch.setattr(checks.sys, "executable", str(stage))
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    raw = tmp_path / "data" / "raw" / "digits.npz"
    raw.parent.mkdir(parents=True)
    raw.touch()
    assert list(checks.time_to_quality(bench)) == [{"stage": "shard", "skipped": "ended early: no time left"}]


def test_hanging_tests_are_reported_with_their_output(
    measurements: Measurements, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = measurements("checks")

    def hang(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout, output=b"tests/gpu/test_training.py ..")

    monkeypatch.setattr(checks.subprocess, "run", hang)
    expected = {"passed": False, "error": ["timed out after 540 s", "tests/gpu/test_training.py .."]}
    assert list(checks.gpu_tests(bench)) == [expected]


def test_the_memory_measurement_holds_one_training_run_at_a_time(
    measurements: Measurements, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training run that fails gives a line as well."""
    training = measurements("training")
    made: list[weakref.ref[Any]] = []

    class Idle:
        def step(self) -> None:
            """Do nothing."""

    def new(*_: Any, **options: Any) -> Any:
        assert [each() for each in made if each() is not None] == []
        if options["recompute"]:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED\nmore")
        found = Idle()
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(bench, "left", lambda: 1.0)
    monkeypatch.setattr(bench, "rehearse", False)
    monkeypatch.setattr(bench, "new_training", new)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which takes long in a process that runs tests
    found = list(training.memory(bench))
    assert len(made) == 11
    assert {(line["side"], line["batch_size"]) for line in found} == {
        *itertools.product((32, 64, 128), (32, 128, 512)),
        (256, 32),
        (256, 128),
    }
    assert {line.get("does_not_run") for line in found} == {
        None,
        "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    }


def test_contenders_are_set_up_again(measurements: Measurements, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slice for batch size 128 includes its setup, although it was measured before."""
    training = measurements("training")
    made: list[tuple[int, str, bool]] = []

    def new(*_: Any, **options: Any) -> Any:
        made.append((options["batch_size"], options["precision"], options["compile"]))
        return SimpleNamespace(step=None, counts=None)

    def slices(_: Any, contenders: Any, **__: Any) -> list[dict[str, Any]]:
        for contender in contenders:
            if contender.facts["training"] == "cifar10":
                contender.make()
        return []

    monkeypatch.setattr(bench, "rehearse", False)
    monkeypatch.setattr(bench, "best_batch", 512)
    monkeypatch.setattr(bench, "new_training", new)
    monkeypatch.setattr(training, "slices", slices)
    assert list(training.throughput(bench)) == []
    alone = [(size, "bf16", False) for size in (128, 256, 512, 1024)]
    assert made == [*alone, (512, "bf16", True), (128, "bf16", False), (128, "fp32", False)]
