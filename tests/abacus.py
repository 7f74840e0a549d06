"""A GPU and a model to reckon with by hand: a byte or a FLOP takes 1,000 ps."""

from __future__ import annotations

from sim.cluster import Cluster, Gpu, Link, Node
from sim.cost import Roofline
from sim.model import ModelSpec

TINY = ModelSpec(
    name="tiny",
    num_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=32,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    gated_mlp=False,
    dtype="float16",
)
SLOW_GPU = Gpu(
    name="abacus",
    memory_bytes=10**9,
    bandwidth_bytes_per_s=1e9,
    flops={"float16": 1e9, "float32": 1e9},
    pcie_bytes_per_s=1e9,
)
ABACUS = Cluster(nodes=(Node(name="n0", gpu=SLOW_GPU, count=2),), intra_node=Link(bytes_per_s=1e9, latency_s=1e-6))
PERFECT = Roofline(
    compute_efficiency=1.0,
    memory_efficiency=1.0,
    attention_compute_efficiency=1.0,
    attention_memory_efficiency=1.0,
    overhead_s=1e-3,
)
