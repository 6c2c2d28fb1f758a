"""GPUs that are not there, as devices to compile for: the one file that uses private names of jax.

Tried with jax 0.10.2 on Python 3.11 and jax 0.11.2 on Python 3.12. jax's public
`get_topology_desc(platform="cuda")` is not implemented; the C interface below it is, and needs the
CUDA plugin's wheels but neither a card nor a driver.
"""

import dataclasses
import importlib.metadata
import pathlib
import tomllib
from typing import Any

import jax

from launch.kernels import Peaks

FACTS = pathlib.Path(__file__).with_name("gpus.toml")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
INSTALL = "pip install -e '.[aot-gpu]' (jax 0.10.2 or 0.11.2)"


class TopologyError(ValueError):
    """No devices to compile for; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Facts of one kind of GPU; gpus.toml says where they are from.

    Attributes:
        kind: its name in --topology.
        memory: bytes of device memory.
        peaks: FLOP/s and bytes/s at most.
        description: the table of gpus.toml.
    """

    kind: str
    memory: int
    peaks: Peaks
    description: dict[str, Any]


def read_gpus(path: pathlib.Path = FACTS) -> dict[str, Gpu]:
    """Return {kind: Gpu} of a file like gpus.toml."""
    tables = tomllib.loads(path.read_text())
    return {
        kind: Gpu(
            kind,
            table["memory_bytes"],
            Peaks(table["bandwidth"], table["flops"], table["vector_flops"]),
            table,
        )
        for kind, table in tables.items()
    }


def target_config(gpu: Gpu) -> str:
    """Return the compiler's description of a GPU: XLA's GpuTargetConfigProto as text."""
    facts = gpu.description
    major, minor = facts["compute_capability"]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {facts["cores"]}
  fpus_per_core: {facts["fpus_per_core"]}
  clock_rate_ghz: {facts["clock_ghz"]}
  device_memory_size: {facts["memory_bytes"]}
  memory_bandwidth: {facts["bandwidth"]}
  l2_cache_size: {facts["l2_bytes"]}
  shared_memory_per_core: {facts["shared_per_core"]}
  shared_memory_per_block_optin: {facts["shared_per_block_optin"]}
  shared_memory_per_block: 49152
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{facts["name"]}"
"""


def plugin_version() -> str:
    """Return the installed CUDA plugin and its version, such as "jax-cuda12-plugin 0.11.2".

    Raises:
        TopologyError: there is none.
    """
    for name in PLUGINS:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise TopologyError(f"the GPU compiler is missing: {INSTALL}")


def gpu_devices(gpu: Gpu, hosts: int, gpus: int) -> list[jax.Device]:
    """Return compile-only devices, `gpus` on each of `hosts`, in the order of the hosts.

    Raises:
        TopologyError: no CUDA plugin, a jax whose private names are others, or a topology that the
            compiler does not take.
    """
    plugin_version()
    try:
        from jax._src.lib import xla_client

        is_initialized, initialize = (
            xla_client.pjrt_plugin_initialized,
            xla_client.initialize_pjrt_plugin,
        )
        describe = xla_client._xla.get_default_c_api_topology
    except (ImportError, AttributeError) as error:
        raise TopologyError(
            f"jax {jax.__version__} has not the private names of 0.10.2 and 0.11.2 ({error}): "
            f"{INSTALL}"
        ) from None
    options = {"topology": f"1x{hosts}x{gpus}", "target_config": target_config(gpu)}
    try:
        jax.devices()  # jax's discovery registers the plugin
        if not is_initialized("cuda"):
            initialize("cuda")
        return list(describe("cuda", gpu.kind, options)._make_compile_only_devices())
    except (RuntimeError, ValueError, AttributeError) as error:
        raise TopologyError(
            f"{hosts} x {gpus} {gpu.kind}: {str(error).splitlines()[0][:200]}"
        ) from None
