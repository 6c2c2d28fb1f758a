"""A workdir in a bucket: a local folder kept equal to it, owned by one run at a time.

Checkpoints are the exception: orbax writes them to the bucket itself, from all processes. All other
files are small and written by the first process, as if the workdir were local: they are fetched at
the start, and uploaded before each checkpoint counts, every UPLOAD_SECONDS, and at the end, however
the run ends. (Cells of a `tables` run are processes of their own, with their checkpoints in the
local folder only: a cell that was stopped begins anew elsewhere.)

A bucket has no lock that a dead process lets go. The owner instead writes its lease, a file, again
every BEAT_SECONDS, and removes it at the end. Whoever finds a lease watches it for LEASE_SECONDS:
if it changes, its owner is at work; if not, the owner is dead, and the lease is removed. A new
lease is only ever created where there is none, which a bucket decides atomically.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from hexa_jax.core import console
from hexa_jax.core.console import log
from hexa_jax.core.preemption import Terminated
from hexa_jax.parallel import processes
from hexa_jax.storage import gcs

UPLOAD_SECONDS = 60
BEAT_SECONDS = 15
LEASE_SECONDS = 60
OWNER = ".owner.json"
CHECKPOINTS = "checkpoints"
_LOCAL_ONLY = (".lock", "unfinished")  # and *.tmp: names that become others in a moment
_LARGE = 2**28  # bytes; files that are not read into memory at once, and do not grow
_log = logging.getLogger(__name__)
_current: "list[Mirror]" = []


@contextlib.contextmanager
def local_workdir(path: str) -> Iterator[str]:
    """Give the folder to work in: `path` itself, or the mirror of one in a bucket.

    Raises:
        RemoteError: the bucket cannot be read or written, or another run is in there.
    """
    if not gcs.is_remote(path):
        yield path
        return
    mirror = Mirror(path)
    previous = signal.signal(signal.SIGTERM, _terminated) if processes.is_single_process() else None
    try:
        mirror.open()
        yield str(mirror.folder)
    except BaseException:
        try:
            mirror.close()
        except Exception as error:  # what went wrong first is what counts
            _log.warning("%s", error)
        raise
    else:
        mirror.close()
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def upload() -> None:
    """Upload what is new, if the workdir is in a bucket."""
    for mirror in _current:
        mirror.upload()


def _terminated(*_: Any) -> NoReturn:
    raise Terminated("SIGTERM; the same command goes on from what is saved")


class Mirror:
    """A local folder that stands for one in a bucket.

    Attributes:
        url: of the folder in the bucket.
        folder: the local one, temporary.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.bucket = gcs.filesystem(url)
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="hexa_jax_"))
        self.folder = self.root / self.url.rpartition("/")[2]
        # what the bucket holds: (mtime in ns, bytes) of the local file when it was uploaded
        self._known: dict[str, tuple[int, int]] = {}
        self._token = ""
        self._ended, self._uploading = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        """Become the owner, and fetch the files.

        With several processes all watch, the first owns, and all fetch.

        Raises:
            RemoteError: the bucket cannot be read or written, or another run is in there.
        """
        console.aliases[str(self.folder)] = self.url
        self._watch()
        processes.broadcast_from_main(0)  # all have seen that nobody is there
        if processes.is_main_process():
            self._create_lease()
        there = {name: size for name, (size, _) in gcs.files(self.url).items() if name != OWNER}
        there = {name: size for name, size in there.items() if CHECKPOINTS not in name.split("/")}
        self.folder.mkdir()
        gcs.copy_files(self.url, self.folder, there)
        self._known = self._files()
        if processes.is_main_process():
            _current.append(self)
            self._repeat(BEAT_SECONDS, self._heartbeat)
            self._repeat(UPLOAD_SECONDS, self.upload)

    def upload(self) -> None:
        """Make the bucket's files equal to the local ones.

        Raises:
            RemoteError: the bucket cannot be written to.
        """
        with self._uploading, gcs.told(self.url, "cannot be written to"):
            self._heartbeat()
            files = self._files()
            changed = {name for name in files if self._known.get(name) != files[name]}
            # Parts of features are valid because of the file beside them: old ones go before that
            # one changes.
            parts = {name for name in changed if ".npz" in name}
            for name in (self._known.keys() - files) | (self._known.keys() & parts):
                with contextlib.suppress(FileNotFoundError):
                    self.bucket.rm_file(f"{self.url}/{name}")
                del self._known[name]
            # result.json is last: it says that a run is finished.
            for name in sorted(changed, key=lambda name: (name.endswith("result.json"), name)):
                path, target = self.folder / name, f"{self.url}/{name}"
                with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                    if files[name][1] > _LARGE:
                        self.bucket.put_file(str(path), target)
                    else:
                        self.bucket.pipe_file(target, path.read_bytes())
                    self._known[name] = files[name]

    def close(self) -> None:
        """Upload, remove the lease, then the local folder.

        Raises:
            RemoteError: the upload fails; the local folder stays.
        """
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self in _current:
            _current.remove(self)
            try:
                self.upload()
            except gcs.RemoteError as error:
                raise gcs.RemoteError(f"{error}; the files are in {self.root}") from None
        if self._token:
            with contextlib.suppress(Exception):  # then the next owner waits
                self.bucket.rm_file(f"{self.url}/{OWNER}")
        shutil.rmtree(self.root, ignore_errors=True)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Return (mtime in ns, bytes) of the local files that belong in the bucket."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            local = name.name in _LOCAL_ONLY or name.suffix == ".tmp" or CHECKPOINTS in name.parts
            with contextlib.suppress(FileNotFoundError):
                if not local and path.is_file():
                    found[str(name)] = (path.stat().st_mtime_ns, path.stat().st_size)
        return found

    def _repeat(self, seconds: float, action: Callable[[], None]) -> None:
        def loop() -> None:
            while not self._ended.wait(seconds):
                try:
                    action()
                except Exception as error:
                    _log.warning("%s; trying again", error)

        self._threads.append(threading.Thread(target=loop, name="mirror", daemon=True))
        self._threads[-1].start()

    # ---- Who owns the workdir --------------------------------------------------------------------

    def _watch(self) -> None:
        """Return when there is no lease; that of a dead owner is removed.

        Raises:
            RemoteError: the owner is alive.
        """
        if (before := self._owner()) is None:
            return
        owner = f"{self.url} is signed by {before['by']}"
        log(f"{owner}: waiting {LEASE_SECONDS} s to see whether it is alive")
        end = time.monotonic() + LEASE_SECONDS
        while (now := self._owner()) is not None:
            if now != before:
                raise gcs.RemoteError(f"workdir {self.url} is in use by {now['by']}")
            if time.monotonic() >= end:
                break
            time.sleep(LEASE_SECONDS / 20)
        if now is not None and processes.is_main_process():
            with gcs.told(self.url, "cannot be written to"), contextlib.suppress(FileNotFoundError):
                self.bucket.rm_file(f"{self.url}/{OWNER}")

    def _owner(self) -> dict[str, Any] | None:
        """Return the lease in the bucket, None where there is none."""
        with gcs.told(self.url):
            try:
                return json.loads(self.bucket.cat_file(f"{self.url}/{OWNER}"))
            except FileNotFoundError:
                return None

    def _create_lease(self) -> None:
        """Become the owner, or raise RemoteError where another run was first."""
        token = uuid.uuid4().hex
        self._write_lease(token, mode="create")
        owner = self._owner()
        if owner is not None and owner["token"] != token:
            raise gcs.RemoteError(f"workdir {self.url} is in use by {owner['by']}")
        self._token = token

    def _write_lease(self, token: str, mode: str = "overwrite") -> None:
        by = f"process {os.getpid()} on {socket.gethostname()}"
        lease = json.dumps({"by": by, "token": token, "at": time.time()}).encode()
        # Where a lease exists already, it is another run's, or this one's from a request that was
        # made twice: `_create_lease` reads which.
        with gcs.told(self.url, "cannot be written to"), contextlib.suppress(FileExistsError):
            self.bucket.pipe_file(f"{self.url}/{OWNER}", lease, mode=mode)

    def _heartbeat(self) -> None:
        """Renew the lease; end the process if another run took it while this one was silent."""
        owner = self._owner()
        if owner is not None and owner["token"] != self._token:
            message = f"hexa_jax: {self.url} was taken over by {owner['by']}: stopping"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        self._write_lease(self._token)
