"""How well near duplicates are told from different pictures: edited copies against a collection.

Command line: `python -m benchmarks.duplicates SOURCE [--copies=300] [--limit=0] [--grid=16]`

SOURCE is as in `hexa explore`, such as folder:DIR, and should hold no duplicates. Prints a line of
JSON with the pairs of different pictures at some thresholds, and one per edit with the share of
copies at the chosen threshold and the correlation that 99 % of the copies reach.
"""

import argparse
import json

import cv2
import numpy as np

from hexa_jax.data.decode import decode
from hexa_jax.data.sources import make_source
from hexa_jax.data.subset import Subset, spread
from hexa_jax.explore import duplicates
from hexa_jax.explore.duplicates import THRESHOLD, find_pairs, signature

THRESHOLDS = (0.90, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """The image after JPEG."""
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))


def scaled(image: np.ndarray, factor: float) -> np.ndarray:
    """The image in another size."""
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=how)


def cropped(image: np.ndarray, share: float) -> np.ndarray:
    """The image without a share of each dimension, half of it on each side."""
    top, left = (round(extent * share / 2) for extent in image.shape[:2])
    return image[top : image.shape[0] - top, left : image.shape[1] - left]


def grey(image: np.ndarray) -> np.ndarray:
    """The image without colors."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


EDITS = {
    "JPEG quality 30": lambda image: jpeg(image, 30),
    "JPEG quality 10": lambda image: jpeg(image, 10),
    "half size, JPEG 75": lambda image: jpeg(scaled(image, 0.5), 75),
    "1.7 times the size": lambda image: scaled(image, 1.7),
    "brighter by a fifth, clipped": lambda image: cv2.convertScaleAbs(image, alpha=1.2, beta=15),
    "grey": grey,
    "2 % cropped": lambda image: cropped(image, 0.02),
    "6 % cropped": lambda image: cropped(image, 0.06),
    "mirrored": lambda image: image[:, ::-1].copy(),
}


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--copies", type=int, default=300)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--grid", type=int, default=duplicates.GRID)
    options = parser.parse_args()
    duplicates.GRID = options.grid
    source = make_source(options.source)
    source = Subset(source, spread(len(source), options.limit))
    images = [decode(source[i]["image"], source.name(i)) for i in range(len(source))]
    signatures = np.stack([signature(image) for image in images])
    pairs, correlation = find_pairs(signatures, min(THRESHOLDS))
    pairs_at = {str(threshold): int(np.sum(correlation >= threshold)) for threshold in THRESHOLDS}
    print(
        json.dumps({"images": len(images), "grid": options.grid, "pairs_at": pairs_at}), flush=True
    )
    for pair, value in list(zip(pairs, correlation, strict=True))[:3]:
        print(
            json.dumps(
                {"pair": [source.name(int(i)) for i in pair], "correlation": round(float(value), 4)}
            )
        )
    chosen = spread(len(images), options.copies)
    for name, edit in EDITS.items():
        found = np.array([signature(edit(images[i])) @ signatures[i] for i in chosen])
        reached = round(float(np.quantile(found, 0.01)), 4)
        share = round(float(np.mean(found >= THRESHOLD)), 4)
        print(json.dumps({"edit": name, "found": share, "99 % reach": reached}), flush=True)


if __name__ == "__main__":
    main()
