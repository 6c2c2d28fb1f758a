"""Pixels on the host: decoding, random resized crops, evaluation's center crop.

Every random number of a crop comes from `crop_generator(seed, epoch, index, crop)`, so a crop
depends on those four integers only, and on no worker, process or order of visits.
"""

import io
import math

import cv2
import numpy as np
from PIL import ImageOps
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from hexa_jax.data.formats import missing_formats
from hexa_jax.data.source import one_line

cv2.setNumThreads(0)  # worker processes are the parallelism; OpenCV's own threads only fight them
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

MAX_PIXELS = 178_956_970  # Pillow's limit: twice what fits in 256 MiB of RGB
READERS = {
    b"\xff\xd8": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}  # by how files begin
_MASK = (1 << 64) - 1


class BadImage(ValueError):
    """An image that cannot be read; the message is one line with its name and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return BadImage, (self.name, self.reason)  # crosses from worker processes


def decode(data: bytes | np.ndarray, name: str, turn: bool = True) -> np.ndarray:
    """An image file's bytes as pixels, the way torchvision and Pillow's `convert("RGB")` read it.

    Grey and palette images become RGB, CMYK is converted, alpha is dropped (not blended; only
    TIFF's alpha is blended on black, by the TIFF library), 16 bits are divided by 257, the EXIF
    orientation is applied, animations give frame one. A JPEG with damage inside, but whole, loads
    as in Pillow; libjpeg itself then writes a line to stderr.

    Args:
      data: JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC bytes; or pixels, uint8 [H, W, 3], which
          pass through.
      name: what to call the image in an error, its path for example.
      turn: whether to apply the EXIF orientation.
    Returns:
      uint8 [H, W, 3], RGB.
    Raises:
      BadImage: the bytes are empty, truncated, corrupt or of another format, or hold more than
          `MAX_PIXELS` pixels.
    """
    if isinstance(data, np.ndarray):
        return data
    header_size(data, name)
    if data[4:8] == b"ftyp":
        return _decode_with_pillow(data, name, turn)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | (0 if turn else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise BadImage(name, "corrupt or truncated image data")
    if image.dtype == np.uint16:
        # rounds; OpenCV's own way to 8 bits drops the low byte
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    if image.dtype != np.uint8:
        raise BadImage(name, f"pixels of type {image.dtype} (8 or 16 bits per channel can be read)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def crop_generator(seed: int, epoch: int, index: int, crop: int) -> np.random.Generator:
    """Return the random generator of one crop of one example in one epoch.

    Philox is a function of (key, counter), made for being keyed: the seed is the key and the other
    integers are the high words of the counter, so streams never overlap and nothing is hashed.
    """
    key = np.array([seed & _MASK, 0], np.uint64)
    counter = np.array([0, crop & _MASK, index & _MASK, epoch & _MASK], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def random_resized_crop(
    image: np.ndarray,
    generator: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    quarter_turns: bool = False,
) -> np.ndarray:
    """Cut and resize a random crop, then mirror and turn it, as torchvision does.

    Ten tries of a box with area U(scale) of the image and log-uniform aspect ratio; then the
    largest central box whose ratio is allowed. The box is resized with `resize`.

    Args:
      image: uint8 [H, W, 3].
      generator: from `crop_generator`.
      size: side S of the result, in pixels.
      scale: smallest and largest share of the image's area.
      ratio: smallest and largest width / height.
      flip: probability of mirroring left and right.
      vertical_flip: probability of mirroring top and bottom.
      quarter_turns: whether to turn by 0, 1, 2 or 3 quarters counter-clockwise, each as likely.
    Returns:
      uint8 [S, S, 3].
    """
    mirrored = generator.random() < flip
    top, left, height, width = _crop_box(image.shape[0], image.shape[1], generator, scale, ratio)
    crop = resize(image[top : top + height, left : left + width], size, size)
    if mirrored:
        crop = cv2.flip(crop, 1)
    if vertical_flip or quarter_turns:
        # Drawn last and both together, so that neither setting changes the numbers that other draws
        # see.
        u_vertical, u_turn = generator.random(2).tolist()
        if u_vertical < vertical_flip:
            crop = cv2.flip(crop, 0)
        if quarter_turns and (turns := int(4 * u_turn)):
            crop = np.ascontiguousarray(np.rot90(crop, turns))
    return crop


def resize_center_crop(image: np.ndarray, short_side: int, crop: int) -> np.ndarray:
    """Resize the short side to `short_side`, and cut out the central square of side `crop`.

    Args:
      image: uint8 [H, W, 3].
      short_side: 256 for the usual ImageNet evaluation.
      crop: 224 for the same; at most `short_side`.
    Returns:
      uint8 [crop, crop, 3].
    Raises:
      ValueError: `crop` is larger than `short_side`.
    """
    if crop > short_side:
        raise ValueError(
            f"a centre crop of {crop} pixels does not fit a short side of {short_side}"
        )
    image = resize_short_side(image, short_side)
    top, left = round((image.shape[0] - crop) / 2), round((image.shape[1] - crop) / 2)
    return np.ascontiguousarray(image[top : top + crop, left : left + crop])


def resize_short_side(image: np.ndarray, short_side: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to a short side; the long one is rounded down."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    return resize(image, short_side * height // shorter, short_side * width // shorter)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] to [height, width, 3], anti-aliased when shrinking, bilinear when growing.

    Shrinking is bilinear to k times the size wanted, k the nearest integer to the shrinkage and at
    least 2, then the mean of k x k pixels: on photos closer to Pillow's anti-aliased bilinear,
    which the reference recipes use, than OpenCV's INTER_AREA, in half the time. Growing is plain
    bilinear, as in those recipes: cubic overshoots at edges.
    """
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    if height <= image.shape[0] and width <= image.shape[1]:
        k = max(2, round(max(image.shape[0] / height, image.shape[1] / width)))
        image = cv2.resize(image, (k * width, k * height), interpolation=cv2.INTER_LINEAR)
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _crop_box(
    height: int,
    width: int,
    generator: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random box, by torchvision's rule."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        u_area, u_ratio, u_top, u_left = generator.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def header_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) that an image file's bytes declare, before any EXIF orientation.

    Nothing is decoded, but a JPEG without its end and a PNG whose checksums do not match are found.

    Raises:
        BadImage: what must not reach the decoder: other formats, decompression bombs, truncated
            files.
    """
    if len(data) == 0:
        raise BadImage(name, "empty file")
    file, reader = io.BytesIO(data), _reader(data, name)
    try:
        if reader is TiffImageFile:
            width, height = _tiff_size(file)  # Pillow refuses kinds of pixels that OpenCV reads
        else:
            image = reader(file, "")
            width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(
                name,
                f"{width} x {height} pixels, more than the limit of {MAX_PIXELS} (a decompression "
                "bomb?)",
            )
        if reader is JpegImageFile:
            # Pillow has read up to the coded data, in which FF D9 can only be the end of image.
            if data.rfind(b"\xff\xd9", file.tell()) < 0:
                raise BadImage(name, "truncated JPEG (no end-of-image marker)")
        elif reader is PngImageFile:
            image.verify()  # else libpng would print its error to stderr
    except BadImage:
        raise
    except Exception as error:  # damaged headers make Pillow raise almost anything
        raise BadImage(name, f"truncated or corrupt {reader.format}: {one_line(error)}") from None
    return height, width


def _tiff_size(file: io.BytesIO) -> tuple[int, int]:
    """(width, height) of a TIFF file's first image."""
    directory = ImageFileDirectory_v2(file.read(8))
    file.seek(directory.next)
    directory.load(file)
    return int(directory[IMAGEWIDTH]), int(directory[IMAGELENGTH])


def _reader(data: bytes, name: str) -> type[ImageFile]:
    """Pillow's class for a format.

    `Image.open` would also choose one, but try every format there is, and warn of sizes that are
    allowed here.
    """
    if data[4:8] == b"ftyp":
        return _heif_reader(data, name)
    for start, reader in READERS.items():
        if data.startswith(start) and (reader is not WebPImageFile or data[8:12] == b"WEBP"):
            return reader
    raise BadImage(name, "not a JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC file")


def _heif_reader(data: bytes, name: str) -> type[ImageFile]:
    """Pillow's class for AVIF or HEIC, which share a container; its first box names the brands."""
    length = int.from_bytes(data[:4], "big")
    brands = data[8 : min(length, 256)]
    if b"avif" in brands or b"avis" in brands:
        if ".avif" in missing_formats():
            raise BadImage(name, missing_formats()[".avif"])
        return AvifImageFile
    if not any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")):
        raise BadImage(name, "not a JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC file")
    if ".heic" in missing_formats():
        raise BadImage(name, missing_formats()[".heic"])
    from pillow_heif.as_plugin import HeifImageFile

    return HeifImageFile


def _decode_with_pillow(data: bytes, name: str, turn: bool) -> np.ndarray:
    """uint8 [H, W, 3] of formats that OpenCV reads in some builds only."""
    try:
        image = _reader(data, name)(io.BytesIO(data), "")
        image.load()
        return np.array((ImageOps.exif_transpose(image) if turn else image).convert("RGB"))
    except BadImage:
        raise
    except Exception as error:  # of libavif and libheif
        raise BadImage(name, f"corrupt or truncated image data: {one_line(error)}") from None
