"""Images a second that one core prepares, from JPEG bytes to uint8 crops: this project, tf.data, and a PIL pipeline.

python benchmarks/input.py [--crops=8] [--images=64] [--repeats=5]

--crops     2 (2 x 224) or 8 (2 x 224 + 6 x 96)
--images    synthetic photographs of 500 x 375 pixels and about 110 KB, made by the benchmark
--repeats   turns; the three pipelines take turns in one process that is bound to one core

All draw the same kinds of boxes and flips. Ours and tf.data's leave the photometric work to the
device; the PIL pipeline does it on the host, as the reference scripts do: jitter, grey, blur, and
the conversion to floats. tf.data needs TensorFlow (the extra `prepare`), PIL needs Pillow (the
extra `dev`).
"""

import argparse
import io
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from hexa_jax.data.crops import Resolution
from hexa_jax.data.decode import crop_generator, decode, random_resized_crop

HEIGHT, WIDTH, KILOBYTES = 375, 500, 110
RESOLUTIONS = {
    2: (Resolution(2, 224, (0.08, 1.0)),),
    8: (Resolution(2, 224, (0.14, 1.0)), Resolution(6, 96, (0.05, 0.14))),
}
RATIO = (3 / 4, 4 / 3)
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def photographs(count: int) -> list[bytes]:
    """JPEGs with detail at all scales; the quality is such that their mean is near KILOBYTES."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for side in (4, 8, 16, 32, 64, 125, 250, 500):
            noise = rng.normal(size=(side * 3 // 4, side, 3)).astype(np.float32)
            image += (
                cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
                * (64 / side) ** 0.4
            )
        low, high = image.min(), image.max()
        images.append((255 * (image - low) / (high - low)).astype(np.uint8))
    for quality in range(98, 40, -1):
        encoded = [
            cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
            for image in images
        ]
        if np.mean([len(data) for data in encoded]) < 1000 * KILOBYTES:
            return encoded
    raise AssertionError("no quality gives files that small")


# ---- Ours ----------------------------------------------------------------------------------------


def ours(data: bytes, resolutions: tuple[Resolution, ...], index: int) -> list[np.ndarray]:
    """Crops uint8 [count, size, size, 3], per resolution."""
    image, out, number = decode(data, "synthetic"), [], 0
    for r in resolutions:
        crops = np.empty((r.count, r.size, r.size, 3), np.uint8)
        for v in range(r.count):
            generator = crop_generator(0, 1, index, number + v)
            crops[v] = random_resized_crop(image, generator, r.size, r.scale, r.ratio, r.flip)
        number += r.count
        out.append(crops)
    return out


# ---- tf.data -------------------------------------------------------------------------------------


def tf_pipeline(
    files: list[bytes], resolutions: tuple[Resolution, ...], antialias: bool
) -> Callable[[], int]:
    """A function that runs all files through tf.data once, on one thread, and returns how many there were."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    if not tf.config.threading.get_inter_op_parallelism_threads():
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)

    def cut(data: Any, size: int, scale: tuple[float, float], image: Any) -> Any:
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image), tf.zeros((1, 0, 4)), aspect_ratio_range=RATIO, area_range=scale, min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        crop = tf.slice(image, begin, extent)
        crop = tf.image.resize(crop, (size, size), antialias=antialias)
        crop = tf.image.random_flip_left_right(crop)
        return tf.cast(tf.clip_by_value(tf.round(crop), 0, 255), tf.uint8)

    def crops(data: Any) -> Any:
        # tf.data's fast choice
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_FAST")
        return tuple(
            tf.stack([cut(data, r.size, r.scale, image) for _ in range(r.count)])
            for r in resolutions
        )

    dataset = tf.data.Dataset.from_tensor_slices(files).map(crops, num_parallel_calls=1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    dataset = dataset.with_options(options)
    return lambda: sum(1 for _ in dataset)


# ---- PIL -----------------------------------------------------------------------------------------


def pil_box(rng: np.random.Generator, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """torchvision's rule: (left, top, right, bottom)."""
    for _ in range(10):
        area = HEIGHT * WIDTH * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= WIDTH and 0 < height <= HEIGHT:
            left, top = rng.integers(0, WIDTH - width + 1), rng.integers(0, HEIGHT - height + 1)
            return int(left), int(top), int(left) + width, int(top) + height
    return 0, 0, WIDTH, HEIGHT


def pil_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turns the hue by a share of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue, np.int16) + int(255 * shift)) % 256
    return Image.merge(
        "HSV", (Image.fromarray(turned.astype(np.uint8), "L"), saturation, value)
    ).convert("RGB")


def pil(
    data: bytes, resolutions: tuple[Resolution, ...], rng: np.random.Generator
) -> list[np.ndarray]:
    """Normalised float crops [size, size, 3] with all photometric work done, as MoCo-v2's and SwAV's scripts do it."""
    image, out = Image.open(io.BytesIO(data)).convert("RGB"), []
    for r in resolutions:
        for _ in range(r.count):
            crop = image.resize(
                (r.size, r.size), Image.Resampling.BILINEAR, box=pil_box(rng, r.scale)
            )
            if rng.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if rng.random() < 0.8:
                for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                    crop = enhance(crop).enhance(rng.uniform(0.2, 1.8))
                crop = pil_hue(crop, rng.uniform(-0.2, 0.2))
            if rng.random() < 0.2:
                crop = crop.convert("L").convert("RGB")
            if rng.random() < 0.5:
                crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
            pixels = np.asarray(crop, np.float32) / 255
            out.append((pixels - MEAN) / STD)
    return out


# ---- Measurement ---------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    """Of one turn."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crops", type=int, choices=sorted(RESOLUTIONS), default=8)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv[1:])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    files, resolutions = photographs(options.images), RESOLUTIONS[options.crops]
    print(
        f"{len(files)} JPEGs of {WIDTH} x {HEIGHT}, mean "
        f"{np.mean([len(f) for f in files]) / 1000:.0f} KB; one core"
    )
    rng = np.random.default_rng(0)
    decoded = [decode(data, "synthetic") for data in files]

    def cut_only() -> None:
        for index, image in enumerate(decoded):
            for v, size, scale in [
                (v, r.size, r.scale) for r in resolutions for v in range(r.count)
            ]:
                random_resized_crop(image, crop_generator(0, 1, index, v), size, scale, RATIO, 0.5)

    turns: dict[str, Callable[[], Any]] = {
        "hexa_jax": lambda: [ours(data, resolutions, i) for i, data in enumerate(files)],
        "  of it: decoding": lambda: [decode(data, "synthetic") for data in files],
        "  of it: boxes, cutting, resizing": cut_only,
        "PIL, photometric work on the host": lambda: [
            pil(data, resolutions, rng) for data in files
        ],
    }
    try:
        turns["tf.data"] = tf_pipeline(files, resolutions, antialias=True)
        turns["tf.data, without anti-aliasing"] = tf_pipeline(files, resolutions, antialias=False)
    except ImportError:
        print("no TensorFlow: tf.data is left out", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(options.repeats + 1):
        for name, work in turns.items():
            elapsed = seconds(work)
            if turn:  # the first one warms up
                times[name].append(elapsed)
    median = {name: statistics.median(values) / len(files) for name, values in times.items()}
    title = "2 x 224" if options.crops == 2 else "2 x 224 + 6 x 96"
    print(f"{title:36}{'images/s':>10}{'ms':>8}{'x PIL':>8}")
    for name, value in median.items():
        ratio = median["PIL, photometric work on the host"] / value
        print(f"{name:36}{1 / value:10.0f}{1000 * value:8.2f}{ratio:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
