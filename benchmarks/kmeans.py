"""Spherical k-means beside faiss on the same cores: seconds of all iterations, and the objective that each reaches.

python benchmarks/kmeans.py [--points=200000] [--dim=128] [--clusters=1000] [--heads=1] [--iterations=10] [--repeats=3]
    [--rows=FILE.json] [--no-faiss]

Both begin from the same centroids and see the same unit vectors (a mixture of as many bumps as
there are clusters). faiss is left out where it is not installed (pip install faiss-cpu). Turns
alternate: quote the ratio. A turn clusters once for each head, from other centroids, as DeepCluster
does between epochs; the objective is the first head's.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# the repository need not be installed
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hardware import add_rows, surroundings
from hexa_jax.kmeans import spherical_kmeans


def mixture(points: int, dim: int, bumps: int) -> np.ndarray:
    """float32 [points, dim] unit vectors around random directions."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(bumps, dim)).astype(np.float32)
    x = centres[rng.integers(0, bumps, points)] + 1.2 * rng.normal(size=(points, dim)).astype(
        np.float32
    )
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def faiss_turn(x: np.ndarray, iterations: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that clusters once, from given centroids, and returns what becomes of them."""
    import faiss

    def run(init: np.ndarray) -> np.ndarray:
        settings = {
            "niter": iterations,
            "spherical": True,
            "min_points_per_centroid": 1,
            "max_points_per_centroid": len(x),
        }
        kmeans: Any = faiss.Kmeans(x.shape[1], len(init), **settings)
        kmeans.train(x, init_centroids=init)
        return kmeans.centroids

    return run


def objective(x: np.ndarray, centroids: np.ndarray) -> float:
    """Mean cosine of the points with their nearest centroid."""
    unit = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return float(np.mean([(part @ unit.T).max(axis=1).mean() for part in np.array_split(x, 20)]))


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "points": 200_000,
        "dim": 128,
        "clusters": 1000,
        "heads": 1,
        "iterations": 10,
        "repeats": 3,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-faiss", action="store_true", help="ours alone")
    parser.add_argument("--rows", type=pathlib.Path, help="JSON file to append the result to")
    options = parser.parse_args(argv[1:])
    if min(getattr(options, name) for name in sizes) < 1 or options.clusters > options.points:
        parser.error("every number must be positive, and there must be as many points as clusters")
    x = mixture(options.points, options.dim, options.clusters)
    rng = np.random.default_rng(1)
    inits = [x[rng.choice(len(x), options.clusters, replace=False)] for _ in range(options.heads)]
    on_device = jnp.asarray(x)
    cluster = jax.jit(
        lambda x, init: (
            spherical_kmeans(
                jax.random.key(0), x, options.clusters, options.iterations, init=init
            ).centroids
        )
    )
    sides: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "hexa_jax": lambda init: np.asarray(cluster(on_device, init))
    }
    if not options.no_faiss:
        try:
            sides["faiss"] = faiss_turn(x, options.iterations)
        except ImportError:
            print("no faiss here: pip install faiss-cpu", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    centroids = {}
    for turn in range(options.repeats + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            centroids[name], *_ = [run(init) for init in inits]
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - begin)
    device = jax.devices()[0].device_kind
    print(
        f"{options.points} x {options.dim}, {options.heads} x {options.clusters} clusters, "
        f"{options.iterations} iterations, {device}"
    )
    row: dict[str, Any] = {
        "benchmark": "kmeans",
        "device": device,
        **{name: getattr(options, name) for name in sizes},
    }
    for name, values in seconds.items():
        median, reached = statistics.median(values), objective(x, centroids[name])
        print(
            f"{name:10}{median:8.2f} s  x {median / statistics.median(seconds['hexa_jax']):.2f}  "
            f"objective {reached:.5f}"
        )
        row["ours" if name == "hexa_jax" else name] = {
            "seconds": median,
            "all_seconds": values,
            "objective": reached,
        }
    add_rows(options.rows, [row | surroundings(argv)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
