"""Every kind of image file against Pillow, every kind of broken one, and the statistics of crops."""

import inspect
import io
import math
import os
import pickle
import struct
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from hexa_jax.data import decode as module
from hexa_jax.data.decode import BadImage, crop_generator, decode, random_resized_crop, resize, resize_center_crop

GOLDEN_DRAWS = [0.6646594969509324, 0.48206518490776007, 0.9935102247335821]


def picture(width=60, height=44, seed=0) -> np.ndarray:
    """A smooth uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def rgb() -> Image.Image:
    return Image.fromarray(picture())


def with_alpha() -> Image.Image:
    alpha = np.random.default_rng(1).integers(0, 256, (44, 60, 1), np.uint8)
    return Image.fromarray(np.concatenate([picture(), alpha], -1))


KINDS = {
    "jpeg": lambda: encoded(rgb(), "JPEG", quality=95),
    "jpeg progressive": lambda: encoded(rgb(), "JPEG", progressive=True),
    "jpeg grey": lambda: encoded(rgb().convert("L"), "JPEG"),
    "jpeg cmyk": lambda: encoded(rgb().convert("CMYK"), "JPEG", quality=95),
    "jpeg with a thumbnail's bytes after its end": lambda: encoded(rgb(), "JPEG") + b"\0" * 100,
    "png": lambda: encoded(rgb(), "PNG"),
    "png grey": lambda: encoded(rgb().convert("L"), "PNG"),
    "png 1 bit": lambda: encoded(rgb().convert("1"), "PNG"),
    "png palette": lambda: encoded(rgb().convert("P"), "PNG"),
    "png palette transparent": lambda: encoded(rgb().convert("P"), "PNG", transparency=3),
    "png alpha": lambda: encoded(with_alpha(), "PNG"),
    "png grey alpha": lambda: encoded(with_alpha().convert("LA"), "PNG"),
    "webp": lambda: encoded(rgb(), "WEBP"),
    "webp lossless": lambda: encoded(rgb(), "WEBP", lossless=True),
    "webp alpha": lambda: encoded(with_alpha(), "WEBP", lossless=True, exact=True),
    "bmp": lambda: encoded(rgb(), "BMP"),
    "bmp palette": lambda: encoded(rgb().convert("P"), "BMP"),
    "tiff": lambda: encoded(rgb(), "TIFF"),
    "tiff lzw": lambda: encoded(rgb(), "TIFF", compression="tiff_lzw"),
    "jpeg of one pixel": lambda: encoded(rgb().resize((1, 1)), "JPEG"),
    "png of one pixel": lambda: encoded(rgb().resize((1, 1)), "PNG"),
    "jpeg of one row": lambda: encoded(rgb().resize((300, 1)), "JPEG"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_pillow_reads(kind):
    data = KINDS[kind]()
    image = decode(data, kind)
    expected = pillow(data)
    assert image.shape == expected.shape and image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_allclose(image.astype(int), expected, atol=2)


def test_reads_the_first_frame_of_an_animation():
    frames = [Image.fromarray(picture(seed=i)).convert("P") for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode(data, "gif").astype(int), pillow(data), atol=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_applies_the_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(rgb(), kind, exif=exif)
    image = decode(data, kind)
    assert image.shape == ((44, 60, 3) if orientation == 3 else (60, 44, 3))
    np.testing.assert_allclose(image.astype(int), pillow(data), atol=2)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_cut(suffix, channels):
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), np.uint16)
    data = cv2.imencode(suffix, deep)[1].tobytes()
    expected = np.broadcast_to(np.rint(deep / 257.0), (20, 30, 3))[..., ::-1]
    np.testing.assert_allclose(decode(data, "deep").astype(int), expected, atol=0)


def test_pixels_pass_through():
    image = picture()
    assert decode(image, "array") is image


def large_picture(kind: str) -> bytes:
    noisy = np.clip(picture(320, 240).astype(int) + np.random.default_rng(0).integers(-20, 20, (240, 320, 3)), 0, 255)
    return encoded(Image.fromarray(noisy.astype(np.uint8)), kind)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.97, 0.5, 0.02])
def test_truncated_files_are_refused(kind, share, capfd):
    data = large_picture(kind)
    with pytest.raises(BadImage, match="some/path"):
        decode(data[: int(len(data) * share)], "some/path")
    assert capfd.readouterr() == ("", "")


def test_truncated_jpeg_with_the_end_marker_of_a_thumbnail():
    thumbnail = encoded(rgb(), "JPEG")
    data = large_picture("JPEG")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    np.testing.assert_array_equal(decode(data, "whole"), decode(large_picture("JPEG"), "plain"))
    with pytest.raises(BadImage, match="no end-of-image marker"):
        decode(data[:-100], "cut")


def test_broken_files_are_refused_with_a_reason(capfd):
    png = bytearray(large_picture("PNG"))
    png[3000] ^= 0xFF
    cases = [
        (b"", "empty file"),
        (b"<html>404 Not Found</html>", "not a JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC file"),
        (bytes(png), "checksum"),
        (b"\xff\xd8", "truncated or corrupt JPEG"),
        (b"\xff\xd8\xff\xd9", "truncated or corrupt JPEG"),
        (b"\xff\xd8\xff", "truncated or corrupt JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated or corrupt PNG"),
        (b"BM\0\0", "truncated or corrupt BMP"),
        (b"II*\0\xff\xff\xff\x7f", "truncated or corrupt TIFF"),
        (b"GIF89a", "truncated or corrupt GIF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "truncated or corrupt WEBP"),
    ]
    for data, reason in cases:
        with pytest.raises(BadImage, match=reason) as caught:
            decode(data, "a/b c.jpg")
        assert str(caught.value).startswith("a/b c.jpg: ") and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_damaged_jpeg_that_ends_properly_loads_as_in_pillow():
    jpeg = large_picture("JPEG")
    damaged = jpeg[: jpeg.index(b"\xff\xda") + 400] + b"\xff\xd9"
    np.testing.assert_allclose(decode(damaged, "damaged").astype(int), pillow(damaged), atol=2)


def test_noise_never_escapes_as_another_error():
    generator = np.random.default_rng(0)
    originals = [large_picture(kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")]
    for trial in range(300):
        data = bytearray(originals[trial % len(originals)])
        for position in generator.integers(0, min(len(data), 200 if trial % 2 else 10**9), 4):
            data[position] = generator.integers(0, 256)
        try:
            image = decode(bytes(data), "noisy")
        except BadImage:
            continue
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


def test_float_pixels_are_refused():
    data = cv2.imencode(".tif", picture().astype(np.float32))[1].tobytes()
    with pytest.raises(BadImage, match="pixels of type float32"):
        decode(data, "float.tif")


def bomb(kind: str) -> bytes:
    """A valid header that declares 60,000 x 60,000 pixels."""
    data, side = bytearray(encoded(rgb(), kind)), 60_000
    if kind == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, side, side)
    elif kind == "PNG":
        struct.pack_into(">II", data, 16, side, side)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif kind == "GIF":
        struct.pack_into("<HH", data, 6, side, side)
    elif kind == "BMP":
        struct.pack_into("<ii", data, 18, side, -side)
    elif kind == "TIFF":
        (directory,) = struct.unpack_from("<I", data, 4)
        for entry in range(struct.unpack_from("<H", data, directory)[0]):
            offset = directory + 2 + 12 * entry
            if struct.unpack_from("<H", data, offset)[0] in (256, 257):
                struct.pack_into("<HII", data, offset + 2, 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_decompression_bombs_are_refused_by_their_header(kind):
    begin = time.perf_counter()
    with pytest.raises(BadImage, match="60000 x 60000 pixels, more than the limit"):
        decode(bomb(kind), "bomb")
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
def test_limit_holds_for_webp(monkeypatch, options):
    data = encoded(rgb(), "WEBP", **options)
    monkeypatch.setattr(module, "MAX_PIXELS", 60 * 44)
    decode(data, "just fits")
    monkeypatch.setattr(module, "MAX_PIXELS", 60 * 44 - 1)
    with pytest.raises(BadImage, match="60 x 44 pixels"):
        decode(data, "too large")


def heif(kind, **options) -> bytes:
    """A picture in one of the two formats that share a container."""
    if kind == "HEIF":
        pytest.importorskip(
            "pillow_heif", reason="pillow-heif is not installed: pip install -e '.[dev]'"
        ).register_heif_opener()
    return encoded(rgb(), kind, quality=90, **options)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_reads_heic_and_avif(kind, monkeypatch, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (heif(kind), heif(kind, exif=exif)):
        np.testing.assert_array_equal(decode(data, "x"), pillow(data))
        for share in (0.97, 0.5, 0.02):
            with pytest.raises(BadImage):
                decode(data[: int(len(data) * share)], "cut")
    if kind == "AVIF":  # pillow-heif leaves the orientation out when it writes
        assert decode(data, "x").shape == (60, 44, 3)
    monkeypatch.setattr(module, "MAX_PIXELS", 60 * 44 - 1)
    with pytest.raises(BadImage, match=r"2639 .a decompression bomb"):
        decode(data, "too large")
    assert capfd.readouterr().err == ""


def test_formats_that_need_a_package_name_it(monkeypatch):
    data = {".heic": heif("HEIF"), ".avif": heif("AVIF")}
    monkeypatch.setattr(
        module, "missing_formats", lambda: {".heic": "HEIC needs a package", ".avif": "AVIF needs a newer Pillow"}
    )
    for ending, image in data.items():
        with pytest.raises(BadImage, match=rf"a{ending}: {ending[1:].upper()} needs a"):
            decode(image, f"a{ending}")


def test_bad_image_crosses_processes():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "empty file")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "empty file", "a.jpg: empty file")


def test_crop_generator_is_a_function_of_its_four_integers():
    def draws(*key):
        return crop_generator(*key).random(8).tolist()

    keys = [(s, e, i, c) for s in (0, 1, -1, 2**40) for e in (0, 1) for i in (0, 1, 2**33) for c in (0, 1, 7)]
    assert draws(*keys[5]) == draws(*keys[5])
    assert len({tuple(draws(*key)) for key in keys}) == len(keys)
    first = np.array([crop_generator(0, 0, i, 0).random() for i in range(4000)])
    assert abs(first.mean() - 0.5) < 0.02 and abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    # Golden: a resumed run on another machine must see the same crops.
    np.testing.assert_allclose(draws(1, 2, 3, 4)[:3], GOLDEN_DRAWS, rtol=1e-12)


def coordinates(height: int, width: int) -> np.ndarray:
    """float32 [H, W, 3]: each pixel holds its own x and y, so that a crop tells its box."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([x, y, np.zeros_like(x)], -1)


def test_boxes_follow_torchvisions_rule():
    height, width, scale, ratio = 300, 400, (0.2, 1.0), (3 / 4, 4 / 3)
    boxes = np.array([module._crop_box(height, width, crop_generator(0, 0, i, 0), scale, ratio) for i in range(4000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, aspect = h * w / (height * width), w / h
    assert area.min() > 0.19 and area.max() > 0.9
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    # Boxes that fit are not biased: small ones (all fit) have a uniform area and a log-uniform aspect ratio.
    small = area < 0.5
    np.testing.assert_allclose(np.quantile(area[small], [0.25, 0.5, 0.75]), [0.275, 0.35, 0.425], atol=0.02)
    np.testing.assert_allclose(np.log(aspect[small]).mean(), 0, atol=0.02)
    np.testing.assert_allclose(np.log(aspect[small]).std(), math.log(16 / 9) / math.sqrt(12), atol=0.01)
    for offset, room in ((top, height - h), (left, width - w)):  # placed uniformly
        share = offset[room > 20] / room[room > 20]
        np.testing.assert_allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


@pytest.mark.parametrize(
    "size, box",
    [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10)), ((1, 1), (0, 0, 1, 1)), ((1, 50), (0, 24, 1, 1))],
)
def test_long_images_fall_back_to_the_centre(size, box):
    assert module._crop_box(*size, crop_generator(0, 0, 0, 0), (0.9, 1.0), (3 / 4, 4 / 3)) == box


def test_crop_shows_its_box_and_half_are_mirrored():
    image = coordinates(200, 300)
    mirrored = 0
    for i in range(400):
        crop = random_resized_crop(image, crop_generator(3, 1, i, 1), 32)
        assert crop.shape == (32, 32, 3)
        generator = crop_generator(3, 1, i, 1)
        flip = generator.random() < 0.5
        top, left, h, w = module._crop_box(200, 300, generator, (0.2, 1.0), (3 / 4, 4 / 3))
        x = crop[16, :, 0][::-1] if flip else crop[16, :, 0]
        centers = left + (np.arange(32) + 0.5) * w / 32 - 0.5
        np.testing.assert_allclose(x[1:-1], centers[1:-1], atol=0.1)
        np.testing.assert_allclose(crop[1:-1, 16, 1], (top + (np.arange(32) + 0.5) * h / 32 - 0.5)[1:-1], atol=0.1)
        mirrored += flip
    assert 160 < mirrored < 240
    unflipped = random_resized_crop(image, crop_generator(0, 0, 0, 0), 16, flip=0.0)
    np.testing.assert_array_equal(
        random_resized_crop(image, crop_generator(0, 0, 0, 0), 16, flip=1.0), unflipped[:, ::-1]
    )


def test_crops_are_turned_and_flipped_without_changing_the_box():
    image, seen = picture(90, 70), set()
    for i in range(200):
        generator = crop_generator(3, 1, i, 1)
        upright = random_resized_crop(image, generator, 16)
        u_vertical, u_turn = generator.random(2)
        both = random_resized_crop(image, crop_generator(3, 1, i, 1), 16, vertical_flip=0.5, quarter_turns=True)
        np.testing.assert_array_equal(both, np.rot90(upright[::-1] if u_vertical < 0.5 else upright, int(4 * u_turn)))
        assert both.flags.c_contiguous
        seen.add((u_vertical < 0.5, int(4 * u_turn)))
        only = random_resized_crop(image, crop_generator(3, 1, i, 1), 16, vertical_flip=0.5)
        np.testing.assert_array_equal(only, upright[::-1] if u_vertical < 0.5 else upright)
    assert len(seen) == 8


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (500, 375)])
def test_any_image_can_be_cropped(size):
    crop = random_resized_crop(np.full((*size, 3), 77, np.uint8), crop_generator(0, 0, 0, 0), 24)
    assert crop.shape == (24, 24, 3) and crop.dtype == np.uint8 and (crop == 77).all()
    assert crop.flags.c_contiguous


@pytest.mark.parametrize("size", [(224, 224), (160, 200), (96, 96), (500, 400), (300, 100)])
def test_resize_does_not_alias(size):
    """Within a few levels of Pillow's anti-aliased bilinear, where plain bilinear is far off."""
    generator = np.random.default_rng(0)
    image = cv2.GaussianBlur(generator.integers(0, 256, (333, 400, 3), np.uint8), (0, 0), 1.0)
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)).astype(float)

    def error(result):
        return np.sqrt(((result - expected) ** 2).mean())

    plain = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert error(resize(image, *size)) < max(3.5, 0.6 * error(plain))


def test_center_crop_is_central_and_keeps_proportions():
    for height, width in ((300, 400), (400, 300), (64, 64), (20, 90)):
        crop = resize_center_crop(coordinates(height, width), 64, 56)
        assert crop.shape == (56, 56, 3)
        step = min(height, width) / 64  # half a pixel off where the margin is odd
        np.testing.assert_allclose(crop[..., :2].mean((0, 1)), [(width - 1) / 2, (height - 1) / 2], atol=0.51 * step)
        np.testing.assert_allclose(np.diff(crop[28, 5:-5, 0]).mean(), step, rtol=0.03)
        np.testing.assert_allclose(np.diff(crop[5:-5, 28, 1]).mean(), step, rtol=0.03)
    image = picture(32, 32)
    np.testing.assert_array_equal(resize_center_crop(image, 32, 32), image)
    with pytest.raises(ValueError, match="64 pixels does not fit a short side of 32"):
        resize_center_crop(image, 32, 64)


def test_module_is_quiet_and_light():
    code = "import sys, hexa_jax.data.decode; print([m for m in ('jax', 'tensorflow') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (process.stdout.strip(), process.stderr) == ("[]", "")
    assert "cv2.setNumThreads(0)" in inspect.getsource(module)
