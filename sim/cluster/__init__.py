"""The hardware: GPU types, machines, and the link resources that traffic between them shares.

``catalogue.py`` has the GPU types (data: ``gpus.toml``), ``node.py`` machines and links and how a scenario
file writes them, ``cluster.py`` the cluster itself. Read ``Cluster`` first.

A *resource* is anything whose bandwidth is shared by the flows that cross it, each direction on its own:

=================== ====================================================================================
``gpu:n0.g3:out``   the GPU's peer port inside its machine (NVLink, else PCIe); also ``:in``
``pcie:n0.g3:in``   the GPU's PCIe port, to host memory and to the network; also ``:out``
``nic:n0:out``      the network port of a machine; also ``:in``
``region:a>b``      everything from region ``a`` to region ``b``
``pair:n0>n1``      a dedicated line from one machine to another, in place of the region's
=================== ====================================================================================

Without NVLink a GPU has one physical port, so its peer traffic crosses ``gpu:`` and ``pcie:`` alike.
"""

from sim.cluster.catalogue import Gpu, did_you_mean, gpu, gpus
from sim.cluster.cluster import Cluster, Path
from sim.cluster.names import gpu_called
from sim.cluster.node import Link, Node

__all__ = ["Cluster", "Gpu", "Link", "Node", "Path", "did_you_mean", "gpu", "gpu_called", "gpus"]
