"""GPUs by the words of their names: never a slice or a laptop's for the big one."""

import pytest

from sim.cluster import gpu_called, gpus
from sim.types import ConfigError


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("h200", "H200-SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G-SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"),
        ("Tesla V100-SXM2-32GB", "V100-32G"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX-3090-Ti"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
        ("a100-80g-pcie", "A100-80G-PCIe"),
    ],
)
def test_what_drivers_and_results_call_them(said: str, ours: str) -> None:
    assert gpu_called(said) == ours


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "a slice of a GPU"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "a slice of a GPU"),
        ("H100 NVL", "not the H100-SXM: the NVL form makes it another GPU"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "not the RTX-4090: a laptop's GPU"),
        ("NVIDIA GeForce RTX 4090 D", "the D variant"),
        ("NVIDIA RTX A5000 Laptop GPU", "a laptop's GPU"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "a Max-Q variant"),
        ("Tesla V100-PCIE-16GB", "the PCIe card"),
        ("NVIDIA A40-48Q", "'48q' in its name"),
        ("NVIDIA L40", "is unknown"),
        ("NVIDIA GH200 480GB", "is unknown"),
        ("NVIDIA H20", "is unknown"),
        ("A100", "is unknown"),
        ("A100-PCIE-40GB", "is unknown"),
    ],
)
def test_others_are_refused_by_the_word_that_makes_them_others(said: str, why: str) -> None:
    with pytest.raises(ConfigError, match="gpu: ") as refused:
        gpu_called(said)
    assert why in str(refused.value)


def test_every_gpu_of_the_catalogue_is_itself() -> None:
    assert [gpu_called(entry.name.lower()) for entry in gpus()] == [entry.name for entry in gpus()]
