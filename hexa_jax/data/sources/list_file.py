"""`list:FILE.txt`: image files that a text file lists, with their labels if it has any."""

import os

from hexa_jax.data.source import DataError, StoredSource
from hexa_jax.data.sources.folder import read_file
from hexa_jax.data.sources.paths import Names, classes_of_texts, readable
from hexa_jax.data.sources.registry import Options, register


class ListSource(StoredSource):
    """The image files that a text file lists, in its order.

    Each line is a path, relative to the list's own folder or absolute, and optionally a tab and a
    label: a whole number, or the name of a class. Empty lines are ignored.

    Args:
        path: of the list.

    Raises:
        DataError: the list is missing, is no text, is empty, or its first files do not exist.
    """

    def __init__(self, path: str):
        origin = f"list:{path}"
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            problem = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
            raise DataError(f"{origin} {problem}") from None
        if b"\0" in content:
            raise DataError(f"{origin} is no text file")
        lines = [line.rstrip(b"\r") for line in content.split(b"\n")]
        rows = [line.split(b"\t") for line in lines if line.strip()]
        if not rows:
            raise DataError(f"{origin} lists nothing")
        odd = next((row for row in rows if len(row) > 2), None)
        if odd:
            raise DataError(
                f"{origin}: {os.fsdecode(odd[0])} has {len(odd)} columns, not a path and a label"
            )
        kept, self.skipped_note = readable([row[0] for row in rows], origin)
        rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
        self._directory, self._paths = (
            os.path.dirname(os.path.abspath(path)),
            Names(row[0] for row in rows),
        )
        self._check_first(origin)
        texts = [row[1].strip().decode(errors="replace") if len(row) > 1 else "" for row in rows]
        super().__init__(*classes_of_texts(texts))

    def _check_first(self, origin: str) -> None:
        """Check that some file of a list is found; single missing files are bad images."""
        if any(os.path.exists(self.name(index)) for index in range(min(10, len(self)))):
            return
        first = self.name(0)
        words = self._paths[0].rsplit(maxsplit=1)
        spaced = len(words) == 2 and os.path.exists(os.path.join(self._directory, words[0]))
        hint = (
            "a label follows a tab, not a space"
            if spaced
            else "paths are relative to the list's folder"
        )
        raise DataError(f"{origin}: {first} does not exist, nor do those after it: {hint}")

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self._directory, self._paths[index])


def open_list(where: str, options: Options) -> ListSource:
    """Return the files that a text file lists."""
    return ListSource(options.path(where))


register(
    "list",
    open_list,
    usage="list:FILE.txt",
    summary="image files, one path a line, relative to the list's own folder; a tab and a label (a class's "
    "name or number) may follow",
    suffixes=(".txt", ".tsv", ".lst"),
    paths=True,
)
