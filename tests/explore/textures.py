"""Random pictures, and what becomes of a picture in other files."""

import cv2
import numpy as np


def texture(number, height=60, width=80):
    """uint8 [height, width, 3] RGB, a smooth random picture that is like no other number's."""
    coarse = np.random.default_rng([11, number]).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def reencoded(image, quality):
    """What is left of an image after JPEG."""
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], -1)


def resized(image, factor):
    """An image of other size."""
    grown = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=grown)
