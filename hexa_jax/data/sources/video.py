"""`video:GLOB`: frames of video files, one every `config.data.video_seconds` seconds."""

import math
import os
from fractions import Fraction
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.source import DataError, StoredSource, missing_package, one_line
from hexa_jax.data.sources.paths import folder_classes, without_common_folder
from hexa_jax.data.sources.registry import Options, register

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".mts")


class VideoSource(StoredSource):
    """Frames of videos at 0, k, 2 k ... seconds, in the order of the files' names.

    A frame is decoded when it is wanted, from the key frame before it on. A file that cannot be
    opened counts as one unreadable image.

    Args:
        paths: of the videos.
        seconds: k.
        labels: whether the folders of the files are classes, see `folder_classes`.

    Raises:
        DataError: PyAV is missing, or k is not positive.
    """

    def __init__(self, paths: list[str], seconds: float = 1.0, labels: str = "auto"):
        try:
            import av  # noqa: F401
        except ImportError:
            raise missing_package("video", "av", ", PyAV") from None
        if not 0 < seconds < math.inf:
            raise DataError(f"config.data.video_seconds={seconds} must be positive")
        self._paths, self._seconds = paths, seconds
        frames = [self._count(path) for path in paths]
        self._ends = np.cumsum(frames, dtype=np.int64)
        folders = without_common_folder([os.fsencode(os.path.abspath(path))[1:] for path in paths])
        origin = f"video:{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        found = folder_classes(folders, labels, origin)
        self.labels_note = found.note
        super().__init__(
            None if found.labels is None else np.repeat(found.labels, frames), found.class_names
        )

    def _count(self, path: str) -> int:
        import av

        try:
            with av.open(path) as container:
                stream = container.streams.video[0]
                if stream.duration is not None:
                    length = float(stream.duration * (stream.time_base or Fraction(0)))
                else:
                    length = (container.duration or 0) / av.time_base
        except (av.FFmpegError, OSError, IndexError):
            return 1  # reading it says what is wrong
        return max(1, math.ceil(length / self._seconds - 1e-6))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[str, float]:
        """(path, time in seconds)."""
        video = int(np.searchsorted(self._ends, index, side="right"))
        return self._paths[video], self._seconds * (
            index - (int(self._ends[video - 1]) if video else 0)
        )

    def read(self, index: int) -> np.ndarray:
        import av

        path, time = self._place(index)
        try:
            with av.open(path) as container:
                if not container.streams.video:
                    raise BadImage(path, "no video in it")
                stream = container.streams.video[0]
                # the input's own threads and processes are the parallelism
                stream.codec_context.thread_count = 1
                base, start = stream.time_base or Fraction(1), stream.start_time or 0
                container.seek(start + int(time / base), stream=stream, backward=True)
                chosen: Any = None
                for frame in container.decode(stream):
                    chosen = frame
                    if frame.pts is None or float((frame.pts - start) * base) >= time - 1e-6:
                        break
                if chosen is None:
                    raise BadImage(self.name(index), "no frame there")
                pixels = chosen.to_ndarray(format="rgb24")
                return np.ascontiguousarray(np.rot90(pixels, round(chosen.rotation / 90)))
        except (av.FFmpegError, OSError) as error:
            raise BadImage(self.name(index), f"unreadable video: {one_line(error)}") from None

    def name(self, index: int) -> str:
        path, time = self._place(index)
        return f"{path} at {time:g} s"


def open_video(where: str, options: Options) -> VideoSource:
    """Return the frames of the videos that a pattern names; of a folder, all videos in it."""
    folder = options.path(where)
    if not os.path.isdir(folder):
        return VideoSource(options.files(where, ".mp4"), options.video_seconds, options.labels)
    paths = sorted(
        os.path.join(below, name)
        for below, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")
    )
    if not paths:
        raise DataError(
            f"video:{folder} holds no video ({', '.join(s[1:] for s in VIDEO_SUFFIXES)})"
        )
    return VideoSource(paths, options.video_seconds, options.labels)


register(
    "video",
    open_video,
    usage="video:GLOB",
    summary="frames of videos, one every `config.data.video_seconds` seconds; needs `pip install av` (PyAV)",
    suffixes=VIDEO_SUFFIXES,
    paths=True,
)
