from __future__ import annotations

import pytest

from llm.hardware import GPUS, gpu_named


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("nvidia_a100-sxm4-80gb", "A100"),
        ("h100", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40", None),  # not the L4
        ("NVIDIA RTX A4000", None),  # not the A40
        ("some CPU", None),
    ],
)
def test_devices_by_the_names_of_torch_and_of_clusters(name: str, expected: str | None) -> None:
    found = gpu_named(name)
    assert (found.name if found else None) == expected


def test_every_device_is_found_by_its_own_name() -> None:
    assert [gpu_named(gpu.name) for gpu in GPUS] == list(GPUS)


def test_peaks_are_dense() -> None:
    """Data sheets print twice as much, for sparse matrices."""
    peaks = {gpu.name: gpu.peak_flops for gpu in GPUS}
    assert peaks["H100"] == peaks["H200"] == 989e12
    assert peaks["A100"] == 312e12
    assert peaks["L4"] == 121e12
