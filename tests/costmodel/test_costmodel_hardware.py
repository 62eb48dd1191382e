"""The GPU table: names as drivers report them, short names, and names that must not match."""

from __future__ import annotations

import pytest

from megactl.costmodel.hardware import find_gpu, gpu_memory, gpus, peak_tflops


@pytest.mark.parametrize(
    ("name", "row", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", "bf16", 989),
        ("NVIDIA H100 PCIe", "H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "H100 NVL", "bf16", 835),
        ("NVIDIA H200", "H200 SXM", "bf16", 989),
        ("NVIDIA GH200 480GB", "GH200", "bf16", 989),
        ("NVIDIA B200", "B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-40GB", "A100", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", "fp32", 19.5),
        ("Tesla V100-SXM2-32GB", "V100 SXM", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "V100 PCIe", "fp16", 112),
        ("Tesla V100S-PCIE-32GB", "V100S PCIe", "fp16", 130),
        ("Tesla T4", "T4", "fp16", 65),
        ("NVIDIA L40S", "L40S", "bf16", 362),
        ("NVIDIA L4", "L4", "bf16", 121),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", "bf16", 364.2),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090", "bf16", 165.2),
        ("a100", "A100", "bf16", 312),
        ("h100", "H100 SXM", "fp8", 1979),
        ("h200", "H200 SXM", "bf16", 989),
        ("v100", "V100 SXM", "fp32", 15.7),
        ("V100-32G", "V100 SXM", "fp16", 125),
        ("v100_16gb", "V100 SXM", "fp16", 125),
        ("v100sxm2", "V100 SXM", "fp16", 125),
        ("v100s", "V100S PCIe", "fp16", 130),
        ("a100-80", "A100 80GB SXM", "bf16", 312),
        ("A100-40GB", "A100", "bf16", 312),
        ("a10080gb", "A100 80GB SXM", "bf16", 312),
        ("H100-SXM", "H100 SXM", "bf16", 989),
        ("h100sxm5", "H100 SXM", "bf16", 989),
        ("h100 pcie", "H100 PCIe", "bf16", 756),
        ("H100PCIe", "H100 PCIe", "bf16", 756),
        ("h200nvl", "H200 NVL", "bf16", 835),
        ("b200", "B200", "bf16", 2250),
    ],
)
def test_reported_names(name: str, row: str, precision: str, peak: float) -> None:
    gpu = find_gpu(name)
    assert gpu is not None and gpu.name == row
    assert gpu.peak(precision) == peak == peak_tflops(name, precision)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA X9000",
        "AMD Instinct MI300X",
        "GRID V100D-8Q",
        "a100-64",
        "h100-mig-1g",
        "h1000",
        "100",
        "sxm",
    ],
)
def test_unknown_names_have_no_peak(name: str) -> None:
    assert find_gpu(name) is None and peak_tflops(name, "bf16") is None


def test_missing_units_are_none() -> None:
    assert peak_tflops("v100", "bf16") is None
    assert peak_tflops("a100", "fp8") is None


def test_every_row_can_be_found_and_is_plausible() -> None:
    for gpu in gpus():
        assert find_gpu(" ".join(gpu.words)) is gpu or find_gpu(" ".join(gpu.words)) == gpu
        assert gpu.bandwidth > 100 and gpu.peaks["fp32"] < gpu.peaks["fp16"]
        if "tf32" in gpu.peaks:
            assert gpu.peaks["tf32"] == pytest.approx(gpu.peaks["bf16"] / 2, rel=0.02)
        if "fp8" in gpu.peaks:
            assert gpu.peaks["fp8"] == pytest.approx(gpu.peaks["bf16"] * 2, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gib"),
    [("v100-32", 31), ("v100-16g", 15), ("v100", None), ("a100", None), ("a100-40", 39), ("A100-SXM4-80GB", 79), ("h100", 79),
     ("h200", 139), ("NVIDIA H100 80GB HBM3", 79), ("gh200", None), ("mi300", None), ("l4", 22)],
)  # fmt: skip
def test_memory_by_row_or_by_name(name: str, gib: float | None) -> None:
    assert gpu_memory(name) == gib


def test_the_peak_of_training_is_that_of_the_16_bit_type_there_is() -> None:
    assert find_gpu("v100").training_peak() == (125, "fp16")
    assert find_gpu("h100").training_peak() == (989, "bf16")
    assert find_gpu("v100").training_peak("bf16") == (None, "bf16")
