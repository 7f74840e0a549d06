"""Hardware: the catalogue, machines, and what flows between GPUs cross."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sim.cluster import Cluster, Link, Node, gpu, gpus
from sim.types import ConfigError

TWO_REGIONS = [
    {"gpu": "A100-80G-SXM", "count": 8, "nodes": 2, "region": "a"},
    {"gpu": "L40S", "count": 4, "region": "b"},
]
LINKS = {"inter_node": {"gbps": 200, "latency_us": 10}, "inter_region": {"gbps": 5, "latency_us": 20000}}


def group(node: str, *indices: int) -> tuple[str, ...]:
    return tuple(f"{node}.g{index}" for index in indices)


def test_a_cluster_from_a_scenario_file() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)

    assert len(cluster.gpu_ids) == 20
    assert cluster.gpu_ids[:2] == ("n0.g0", "n0.g1")
    assert cluster.gpu("n2.g3").name == "L40S"
    assert cluster.node("n1.g0").region == "a"
    path = cluster.path(("n0.g0",), ("n1.g0",))
    assert path.bytes_per_s(cluster.capacity_bytes_per_s) == 25e9
    assert path.latency_s == 10e-6


# ---------------------------------------------------------------- catalogue


def test_the_catalogue_has_the_papers_gpus_and_cites_every_row() -> None:
    names = {entry.name for entry in gpus()}
    assert names >= {
        *("V100-16G", "V100-32G", "T4", "L4", "A10G", "A40", "A5000", "A6000", "A100-40G-SXM", "A100-80G-SXM"),
        *("A100-80G-PCIe", "RTX-3090", "RTX-3090-Ti", "RTX-4090", "RTX-PRO-6000", "L40S", "H100-PCIe", "H100-SXM"),
        *("H200-SXM", "B200"),
    }
    assert gpu("CPU").spec_source
    assert gpu("CPU").usd_per_hour is None
    for entry in (entry for entry in gpus() if entry.name != "CPU"):
        for source in (entry.spec_source, entry.idle_source, entry.price_source):
            assert source
        assert entry.idle_w is not None
        assert entry.tdp_w is not None
        assert entry.idle_w < entry.tdp_w


def test_names_do_not_depend_on_case() -> None:
    assert gpu("h100-sxm") is gpu("H100-SXM")


@pytest.mark.parametrize(
    ("name", "bf16_tflops"),
    [
        ("L4", 121),
        ("L40S", 362.05),
        ("RTX-3090", 71),
        ("RTX-4090", 165.2),
        ("A10G", 70),
        ("A40", 149.7),
        ("A5000", 111.1),
        ("A6000", 154.8),
        ("H100-PCIe", 756),
        ("H100-SXM", 989),
        ("H200-SXM", 989),
        ("B200", 2250),
    ],
)
def test_peaks_are_dense(name: str, bf16_tflops: float) -> None:
    assert gpu(name).flops_for("bfloat16") == pytest.approx(bf16_tflops * 1e12)


def test_a_dtype_that_is_not_in_hardware_takes_the_rate_of_the_next_wider_one() -> None:
    assert gpu("V100-16G").flops_for("bfloat16") == gpu("V100-16G").flops_for("float16") == 125e12
    assert gpu("A100-80G-SXM").flops_for("float8") == 312e12
    assert gpu("H100-SXM").flops_for("float8") == 1979e12
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        gpu("H100-SXM").flops_for("bfloat15")


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^gpu: 'H10O-SXM' is unknown; did you mean 'H100-SXM'\?$"):
        gpu("H10O-SXM")
    with pytest.raises(ConfigError, match=r"'A100-40G-SXM' or 'A100-80G-SXM' or 'A100-80G-PCIe'\?"):
        gpu("A100")
    with pytest.raises(ConfigError, match=r"known: .*T4"):
        gpu("zzzzz")


@pytest.mark.parametrize(
    ("field", "value"),
    [("memory_bytes", 0), ("bandwidth_bytes_per_s", math.nan), ("flops", {"float16": 1e12}), ("usd_per_hour", -1.0)],
)
def test_a_gpu_checks_its_figures(field: str, value: object) -> None:
    good = replace(gpu("T4"), name="x")
    with pytest.raises(ConfigError, match=f"GPU x: {field}"):
        replace(good, **{field: value})  # type: ignore[arg-type]


SHEETS = {
    "a100_sxm": "A100-80G-SXM",
    "a100_pcie": "A100-80G-PCIe",
    "b200_sxm": "B200",
    "h100_pcie": "H100-PCIe",
    "h100_sxm": "H100-SXM",
    "h200_sxm": "H200-SXM",
    "l4": "L4",
    "l40s": "L40S",
    "rtx_pro_6000_server": "RTX-PRO-6000",
}


@pytest.mark.parametrize(("sheet", "name"), SHEETS.items())
def test_the_catalogue_agrees_with_an_independent_one(shared_data: Path, sheet: str, name: str) -> None:
    """aiconfigurator's sheets; its L4 memory is the label's, its RTX PRO 6000 runs at the server's lower clock."""
    text = (shared_data / "measured" / "aiconfigurator" / "systems" / f"{sheet}.yaml").read_text()
    theirs = yaml.safe_load(text)
    ours = gpu(name)
    assert ours.bandwidth_bytes_per_s == pytest.approx(theirs["gpu"]["mem_bw"], rel=0.001)
    assert ours.memory_bytes == pytest.approx(theirs["gpu"]["mem_capacity"], rel=0.07)
    assert ours.flops_for("bfloat16") == pytest.approx(theirs["gpu"]["bfloat16_tc_flops"], rel=0.08)
    assert ours.flops_for("int8") == pytest.approx(theirs["gpu"]["int8_tc_flops"], rel=0.08)
    assert ours.tdp_w == theirs["gpu"]["power"]
    assert (ours.nvlink_bytes_per_s or ours.pcie_bytes_per_s) == theirs["node"]["intra_node_bw"]


# ---------------------------------------------------------------- paths


def test_a_group_spreads_evenly_over_ports() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    path = cluster.path(group("n0", 0, 1, 2, 3), group("n0", 4, 5, 6, 7))
    assert dict(path.usage) == {
        **{f"gpu:n0.g{index}:out": 0.25 for index in range(4)},
        **{f"gpu:n0.g{index}:in": 0.25 for index in range(4, 8)},
    }
    assert path.bytes_per_s(cluster.capacity_bytes_per_s) == 4 * 0.8 * 300e9


def test_uneven_groups_send_where_parts_overlap() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    path = dict(cluster.path(group("n0", 0, 1), group("n0", 4, 5, 6, 7)).usage)
    assert path["gpu:n0.g0:out"] == 0.5
    assert path["gpu:n0.g7:in"] == 0.25


def test_what_stays_on_a_gpu_crosses_nothing() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    same = cluster.path(group("n0", 0, 1), group("n0", 0, 1))
    assert same == ((), 0.0)
    assert same.bytes_per_s(cluster.capacity_bytes_per_s) == math.inf
    grown = dict(cluster.path(group("n0", 0, 1), group("n0", 0, 1, 2, 3)).usage)
    assert grown == {
        "gpu:n0.g0:out": 0.25,
        "gpu:n0.g1:in": 0.25,
        "gpu:n0.g1:out": 0.5,
        "gpu:n0.g2:in": 0.25,
        "gpu:n0.g3:in": 0.25,
    }


def test_between_machines_a_flow_crosses_pcie_and_both_network_ports() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    path = cluster.path(group("n0", 0, 1), group("n1", 0, 1))
    assert dict(path.usage) == {
        "pcie:n0.g0:out": 0.5,
        "pcie:n0.g1:out": 0.5,
        "nic:n0:out": 1.0,
        "nic:n1:in": 1.0,
        "pcie:n1.g0:in": 0.5,
        "pcie:n1.g1:in": 0.5,
    }


def test_a_group_over_two_machines_uses_each_port_for_its_share() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    path = dict(cluster.path(("n0.g0", "n1.g0"), ("n0.g1", "n0.g2")).usage)
    assert path["gpu:n0.g0:out"] == path["gpu:n0.g1:in"] == 0.5
    assert path["nic:n1:out"] == path["nic:n0:in"] == 0.5


def test_regions_share_one_line_each_way() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    path = cluster.path(("n0.g0",), ("n2.g0",))
    assert ("region:a>b", 1.0) in path.usage
    assert path.latency_s == 0.02
    assert path.bytes_per_s(cluster.capacity_bytes_per_s) == 0.625e9
    assert cluster.capacity_bytes_per_s["region:b>a"] == 0.625e9


def test_a_pair_is_a_dedicated_ordered_line() -> None:
    pairs = [{"a": "n0", "b": "n2", "gbps": 80, "latency_us": 100}]
    cluster = Cluster.of(TWO_REGIONS, LINKS | {"pairs": pairs})
    there, back = cluster.path(("n0.g0",), ("n2.g0",)), cluster.path(("n2.g0",), ("n0.g0",))
    assert "region:a>b" not in dict(there.usage)
    assert there.bytes_per_s(cluster.capacity_bytes_per_s) == 10e9
    assert there.latency_s == pytest.approx(1e-4)
    assert back.latency_s == 0.02


def test_a_gpu_without_nvlink_has_one_port_for_peers_and_network() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    assert dict(cluster.path(("n2.g0",), ("n2.g1",)).usage) == {
        "gpu:n2.g0:out": 1.0,
        "gpu:n2.g1:in": 1.0,
        "pcie:n2.g0:out": 1.0,
        "pcie:n2.g1:in": 1.0,
    }
    bridged = Cluster.of(TWO_REGIONS, LINKS | {"intra_node": {"gbps": 450, "latency_us": 2}})
    assert bridged.capacity_bytes_per_s["gpu:n2.g0:out"] == 56.25e9
    assert "pcie:n2.g0:out" not in dict(bridged.path(("n2.g0",), ("n2.g1",)).usage)


def test_a_node_can_have_its_own_port() -> None:
    cluster = Cluster.of([{"gpu": "T4", "count": 1, "nodes": 2, "nic_gbps": 8}], LINKS)
    path = cluster.path(("n0.g0",), ("n1.g0",))
    assert path.bytes_per_s(cluster.capacity_bytes_per_s) == 1e9


def test_weights_load_over_all_pcie_ports_at_once() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    path = cluster.load_path(group("n0", 0, 1, 2, 3))
    assert path.bytes_per_s(cluster.capacity_bytes_per_s) == 4 * 0.8 * 32e9


def test_the_link_of_a_tensor_parallel_group_is_its_slowest() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    assert cluster.collective_link(("n0.g0",)).bytes_per_s == math.inf
    assert cluster.collective_link(group("n0", 0, 1)) == Link(bytes_per_s=240e9, latency_s=8e-6, medium="nvlink")
    assert cluster.collective_link(group("n2", 0, 1)) == Link(bytes_per_s=0.8 * 32e9, latency_s=5e-6, medium="pcie")
    across = cluster.collective_link((*group("n0", 0, 1, 2, 3), *group("n1", 0, 1, 2, 3)))
    assert across == Link(bytes_per_s=25e9, latency_s=10e-6)
    far = cluster.collective_link((*group("n0", 0, 1), *group("n2", 0, 1)))
    assert far == Link(bytes_per_s=0.625e9, latency_s=0.02)


def test_the_matrices_agree_with_single_paths() -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    bandwidth, latency = cluster.bandwidth_matrix_bytes_per_s(), cluster.latency_matrix_s()
    for i, a in enumerate(cluster.gpu_ids):
        for j, b in enumerate(cluster.gpu_ids):
            path = cluster.path((a,), (b,))
            assert bandwidth[i, j] == path.bytes_per_s(cluster.capacity_bytes_per_s)
            assert latency[i, j] == path.latency_s
    alone = Cluster.of([{"gpu": "T4", "count": 1, "nodes": 2}])
    np.testing.assert_array_equal(alone.bandwidth_matrix_bytes_per_s(), [[math.inf, 0], [0, math.inf]])
    np.testing.assert_array_equal(alone.latency_matrix_s(), [[0, math.inf], [math.inf, 0]])


def test_rent_is_unknown_if_any_price_is() -> None:
    cluster = Cluster.of([{"gpu": "T4", "count": 4}, {"gpu": "H100-SXM", "count": 2, "usd_per_hour": 3.5}])
    assert cluster.usd_per_hour() == pytest.approx(4 * 0.978 + 7.0)
    assert cluster.usd_per_hour(spot=True) is None
    assert Cluster.of([{"gpu": "T4", "count": 4}]).usd_per_hour(spot=True) == pytest.approx(1.904)


def test_names_are_numbered_only_where_a_row_stands_for_several_machines() -> None:
    cluster = Cluster.of([{"gpu": "T4", "count": 1, "name": "x"}, {"gpu": "T4", "count": 1, "nodes": 2, "name": "y"}])
    assert cluster.gpu_ids == ("x.g0", "y0.g0", "y1.g0")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("links", "field"),
    [
        ({}, "cluster.links.inter_node: missing, so n0 and n1 have no link"),
        ({"inter_node": {"gbps": 0}}, "cluster.nodes: nic_gbps or cluster.links.inter_node: nic:n0:out has 0 gbps"),
        ({"inter_node": {"gbps": 1}, "pairs": [{"a": "n0", "b": "n1", "gbps": 0}]}, "cluster.links.pairs: pair:n0>n1"),
    ],
)
def test_gpus_without_a_link_cannot_talk(links: dict[str, object], field: str) -> None:
    cluster = Cluster.of([{"gpu": "T4", "count": 1, "nodes": 2}], links)
    with pytest.raises(ConfigError, match=field):
        cluster.path(("n0.g0",), ("n1.g0",))


def test_regions_need_a_line() -> None:
    cluster = Cluster.of(TWO_REGIONS, {"inter_node": {"gbps": 100}})
    with pytest.raises(ConfigError, match=r"cluster.links.inter_region: missing, so n0 and n2 have no link"):
        cluster.path(("n0.g0",), ("n2.g0",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gpu": "H10O", "count": 1}, r"cluster.nodes\[0\].gpu: 'H10O' is unknown; did you mean 'H100"),
        ({"gpu": "T4"}, r"cluster.nodes\[0\].count: missing"),
        ({"gpu": "T4", "count": 0}, r"cluster.nodes\[0\].count: 0 must be a whole number >= 1"),
        ({"gpu": "T4", "count": True}, r"cluster.nodes\[0\].count: True must be"),
        ({"gpu": "T4", "count": 1, "nodes": 1.5}, r"cluster.nodes\[0\].nodes: 1.5 must be"),
        ({"gpu": "T4", "cuont": 1, "count": 1}, r"'cuont' is unknown; did you mean 'count'"),
        ({"gpu": "T4", "count": 1, "nic_gbps": math.nan}, r"cluster.nodes\[0\].nic_gbps: nan must be a finite"),
        ({"gpu": "T4", "count": 1, "usd_per_hour": -2}, r"cluster.nodes\[0\].usd_per_hour: -2 must be >= 0"),
        ({"gpu": "T4", "count": 1, "region": "a>b"}, "region: 'a>b' must be text without"),
        ("T4", r"cluster.nodes\[0\]: 'T4' must be a mapping"),
    ],
)
def test_a_bad_node_is_named(row: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cluster.of([row])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ({"inter_nod": {"gbps": 1}}, "cluster.links: 'inter_nod' is unknown; did you mean 'inter_node'"),
        ({"inter_node": {"latency_us": 1}}, "cluster.links.inter_node.gbps: missing"),
        ({"inter_node": {"gbps": -1}}, "cluster.links.inter_node.gbps: -1 must be >= 0"),
        ({"inter_region": {"gbps": 1, "latency_us": "x"}}, "inter_region.latency_us: 'x' must be a finite number"),
        (
            {"pairs": [{"a": "n0", "b": "n9", "gbps": 1}]},
            "cluster.links.pairs: node 'n9' is unknown; did you mean 'n0'",
        ),
        ({"pairs": [{"a": "n0", "b": "n0", "gbps": 1}]}, "must join two nodes"),
    ],
)
def test_a_bad_link_is_named(links: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cluster.of([{"gpu": "T4", "count": 1}], links)


def test_node_names_must_differ_and_gpus_must_exist() -> None:
    node = Node(name="x", gpu=gpu("T4"), count=1)
    with pytest.raises(ConfigError, match="the name 'x' occurs 2 times"):
        Cluster(nodes=(node, node))
    with pytest.raises(ConfigError, match="at least one node"):
        Cluster.of([])
    with pytest.raises(ConfigError, match=r"GPU 'x.g1' is unknown; did you mean 'x.g0'"):
        Cluster(nodes=(node,)).gpu("x.g1")
    with pytest.raises(ConfigError, match="must not be empty"):
        Cluster(nodes=(node,)).path((), ("x.g0",))


# ---------------------------------------------------------------- laws


GROUPS = st.lists(st.sampled_from(Cluster.of(TWO_REGIONS, LINKS).gpu_ids), min_size=1, max_size=8, unique=True).map(
    tuple
)


@given(sources=GROUPS, targets=GROUPS)
def test_what_leaves_arrives(sources: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Over GPU ports, and over network ports, as much goes out as comes in, and no part is sent twice."""
    usage = dict(Cluster.of(TWO_REGIONS, LINKS).path(sources, targets).usage)

    def share(kind: str, way: str) -> float:
        return sum(part for name, part in usage.items() if name.startswith(kind) and name.endswith(way))

    for kind in ("gpu:", "pcie:", "nic:"):
        assert share(kind, ":out") == pytest.approx(share(kind, ":in"))
    assert share("nic:", ":out") <= 1 + 1e-9
    assert all(0 < part <= 1 for part in usage.values())
    assert (not usage) == (sources == targets)


@given(sources=GROUPS, targets=GROUPS, factor=st.floats(min_value=1, max_value=100))
def test_faster_links_never_slow_a_flow(sources: tuple[str, ...], targets: tuple[str, ...], factor: float) -> None:
    cluster = Cluster.of(TWO_REGIONS, LINKS)
    path = cluster.path(sources, targets)
    faster = {name: rate * factor for name, rate in cluster.capacity_bytes_per_s.items()}
    assert path.bytes_per_s(faster) >= path.bytes_per_s(cluster.capacity_bytes_per_s)
