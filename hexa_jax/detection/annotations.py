"""Read VOC's annotation files: an image's size, and boxes, names and difficulty of objects."""

import pathlib
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

import numpy as np

from hexa_jax.data.source import DataError, one_line

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Scene(NamedTuple):
    """The objects of an image, as they were written.

    Attributes:
        size: (height, width) in pixels; None where it is not said.
        names: of the m objects' classes.
        boxes: float32 [m, 4] (x1, y1, x2, y2), continuous pixel coordinates; they may lie outside
            of the image.
        difficult: bool [m].
    """

    size: tuple[int, int] | None
    names: list[str]
    boxes: np.ndarray
    difficult: np.ndarray


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuse a document type before its entities could be declared.

    Annotations need none, and some are bombs.
    """

    def doctype(self, name: str, public: str | None, system: str | None) -> NoReturn:
        raise ElementTree.ParseError(
            "it has a document type (DTD), which annotations have no need for"
        )


def read_annotation(path: pathlib.Path) -> Scene:
    """Read an annotation file.

    VOC counts pixels from 1 and includes both corners: 1, 1, 2, 1 is the box 0, 0, 2, 1.

    Raises:
        DataError: it is missing or no well-formed XML, or a corner is no number or in the wrong
            order; one line with the file.
    """
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: encodings
        raise DataError(f"{path} is no well-formed annotation: {one_line(error)}") from None
    objects = root.findall("object")
    corners = np.array([_corners(path, thing) for thing in objects], np.float64).reshape(-1, 4)
    return Scene(
        _size(path, root),
        [_text(path, thing, "name") for thing in objects],
        (corners - [1, 1, 0, 0]).astype(np.float32),
        np.array([_difficult(path, thing) for thing in objects], bool),
    )


def _text(path: pathlib.Path, element: Any, name: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise DataError(f"{path}: {element.tag} without {name}")
    return text


def _number(path: pathlib.Path, element: Any, name: str) -> float:
    text = _text(path, element, name)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e9:  # nor NaN
        raise DataError(f"{path}: {name} is {text!r}, which is no number of pixels")
    return value


def _corners(path: pathlib.Path, thing: Any) -> list[float]:
    box = thing.find("bndbox")
    if box is None:
        raise DataError(f"{path}: object without bndbox")
    x1, y1, x2, y2 = values = [_number(path, box, name) for name in CORNERS]
    if x1 > x2 or y1 > y2:
        raise DataError(
            f"{path}: the corners {x1:g}, {y1:g} and {x2:g}, {y2:g} of a box are in the wrong order"
        )
    return values


def _difficult(path: pathlib.Path, thing: Any) -> bool:
    text = (thing.findtext("difficult") or "0").strip()
    if text not in ("0", "1"):
        raise DataError(f"{path}: difficult is {text!r}, neither 0 nor 1")
    return text == "1"


def _size(path: pathlib.Path, root: Any) -> tuple[int, int] | None:
    size = root.find("size")
    if size is None or size.find("width") is None or size.find("height") is None:
        return None
    height, width = int(_number(path, size, "height")), int(_number(path, size, "width"))
    return (height, width) if min(height, width) > 0 else None  # some tools write 0 for "unknown"
