"""Save and restore the training state: asynchronous, atomic, verified by checksums.

A checkpoint is a folder `step_00001200` that orbax fills. It counts once it holds `MANIFEST.json`,
which is written last, with the size and checksum of every file, the path, shape and dtype of every
leaf, and the caller's metadata. Orbax restores a flipped byte without complaint, so files are first
compared with the manifest. No other module imports orbax.

The folder may be in a bucket: orbax and the manifest's code write there directly, and nothing is
renamed.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hexa_jax.checkpoint import lost_references, tree_io
from hexa_jax.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    is_transient,
    one_line,
    read_manifest,
    verify,
    write_manifest,
)
from hexa_jax.core.console import with_aliases
from hexa_jax.parallel import processes
from hexa_jax.storage import gcs, workdir_sync

PATIENCE = 3  # failures in a row that a run outlives, if their reason may pass
HUNG = 1200.0  # seconds after which a save is given up
PAUSE = 2.0  # seconds before a save that must not fail is tried again; doubles each time

# orbax writes under the long name first
_FOLDER = re.compile(r"step_(\d+)(?:_(\d+))?(?:\.orbax-checkpoint-tmp.*)?")
# numbers barriers; the same on every process, because all save in the same order
_saves = itertools.count()
_log = logging.getLogger(__name__)

lost_references.mend()
# Drop orbax's progress lines, and the tracebacks of its threads: those errors arrive here as
# exceptions anyway.
logging.getLogger("absl").addFilter(
    lambda record: (
        "orbax" not in record.pathname
        or (record.levelno >= logging.WARNING and not record.exc_info)
    )
)


class _Folder(NamedTuple):
    step: int
    # a step saved again goes into a new folder, so the old one lives until the new one is complete
    attempt: int
    path: Any  # local, or in a bucket, as `gcs.path_of` gives it

    @property
    def complete(self) -> bool:
        return gcs.exists(self.path / MANIFEST)


class Checkpoints:
    """The checkpoints of one run, in a directory that the first save makes.

    Kept are the newest `keep_last`, those whose step is divisible by `keep_every`, and the one of
    step `best`, which the caller sets before the save of that step. With several processes all make
    the same calls in the same order, and all see the directory. A directory in the mirror of a
    bucket stands for the one in the bucket.
    """

    def __init__(
        self, directory: str | os.PathLike, *, keep_last: int = 3, keep_every: int | None = None
    ):
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise CheckpointError(
                f"keep_last ({keep_last}) and keep_every ({keep_every}) must be at least 1"
            )
        self.directory = gcs.path_of(with_aliases(os.fspath(directory)))
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.best: int | None = None
        self._saved_best: int | None = None  # stays until a better one is complete
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._failures = 0  # in a row
        self._failed_folder: _Folder | None = None

    def save(self, step: int, tree: Any, metadata: dict | None = None) -> None:
        """Save in the background; on return the arrays of `tree` may be donated or deleted.

        Wait first for the save before it. If that failed transiently, a warning says so; older
        checkpoints are intact. With several processes every failure counts as lasting: to agree
        on it, they would need the storage that fails. If `step` was saved before, the old
        checkpoint goes once the new one is complete.

        Args:
            step: number of the checkpoint, at least 0.
            tree: pytree of arrays and numbers; of typed keys the `jax.random.key_data`.
            metadata: what JSON can hold; it comes back with the tree.

        Raises:
            CheckpointError: this save cannot start, or the one before it failed, and the failure
                lasts or is the (PATIENCE + 1)th in a row.
        """
        self._settle()
        step = int(step)
        named = tree_io.named(tree)
        manifest = {"step": step, "metadata": metadata or {}, "leaves": tree_io.specs(named)}
        manifest = json.loads(json.dumps(manifest))  # a copy
        # a save given up on may still write there
        taken = [*self._folders(), *filter(None, [self._failed_folder])]
        attempts = [folder.attempt for folder in taken if folder.step == step]
        attempt = processes.broadcast_from_main(max(attempts, default=-1) + 1)
        folder = _Folder(step, attempt, self._path(step, attempt))
        context = ocp.Context()
        context.array.saving.enable_write_sharding_file = False  # `like` brings the shardings
        # it compiles slices of every shape; small states lose
        context.array.saving.use_replica_parallel = False
        # Orbax asks the wall clock, which may jump meanwhile; `wait` asks the monotonic one.
        context.asynchronous.timeout_secs = 30 * 24 * 3600
        # a failed mkdir would leave threads waiting
        context.asynchronous.create_directories_asynchronously = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with context:
                # Orbax refuses arrays without elements, and trees without arrays.
                arrays = {name: leaf for name, leaf in named.items() if leaf.size}
                response = ocp.save_async(folder.path, arrays or {"(none)": np.zeros(1)})
        except Exception as error:
            failed = self._failed(folder, error)
            if not failed.passing:
                raise failed from error
            self._error = failed
            return
        arguments = (folder, manifest, response, f"hexa_jax_{next(_saves)}", self.best)
        self._thread = threading.Thread(target=self._finish, args=arguments, daemon=True)
        self._thread.start()

    def save_now(self, step: int, tree: Any, metadata: dict | None = None) -> None:
        """Save and wait, for the last save of a run.

        A transient failure is tried again, PATIENCE times.
        """
        for attempt in range(PATIENCE + 1):
            try:
                self.save(step, tree, metadata)
                self.wait()
                return
            except CheckpointError as error:
                if not error.passing or attempt == PATIENCE:
                    raise
                pause = PAUSE * 2**attempt
                _log.warning("%s; trying again in %g s", error, pause)
                time.sleep(pause)

    def wait(self) -> None:
        """Wait until the last save is on disk. The end of the process would cut it off.

        Raises:
            CheckpointError: it failed; raised once, and older checkpoints are intact.
        """
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.join(HUNG)
            if thread.is_alive():
                raise CheckpointError(
                    f"a save in {self.directory} has not ended after {HUNG / 60:g} minutes: "
                    "does the storage answer?"
                )
        error, self._error = self._error, None
        if error is not None:
            raise error

    close = wait  # for `contextlib.closing`

    def _settle(self) -> None:
        """Wait for the last save; log up to PATIENCE transient failures in a row, raise others."""
        try:
            self.wait()
        except CheckpointError as error:
            self._failures += 1
            if not error.passing or self._failures > PATIENCE:
                raise
            _log.warning("%s; the run goes on, and the next save is due now", error)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending, without verifying checksums."""
        return sorted({folder.step for folder in self._folders() if folder.complete})

    def metadata(self, step: int) -> dict:
        """Return the metadata saved with `step`.

        Raises:
            CheckpointError: there is none, or its manifest is damaged.
        """
        for folder in reversed(self._folders()):
            if folder.step == step and folder.complete:
                return read_manifest(folder.path)["metadata"]
        raise self._no_such(step)

    def restore(self, step: int, like: Any, *, partial: bool = False) -> tuple[int, Any, dict]:
        """Restore the checkpoint of one step; the rest is as in `restore_latest`."""
        if (restored := self._restore(like, partial, step)) is None:
            raise self._no_such(step)
        return restored

    def restore_latest(self, like: Any, *, partial: bool = False) -> tuple[int, Any, dict] | None:
        """Restore the newest intact checkpoint, skipping damaged ones with a warning.

        Args:
            like: pytree of `jax.ShapeDtypeStruct` (without sharding: the first device) or of
                arrays. It gives structure, leaf types and shardings; the devices need not be those
                that saved.
            partial: whether the checkpoint may hold leaves that `like` lacks; they are not read.

        Returns:
            (step, tree with the structure of `like`, metadata), or None where no checkpoint is
            complete.

        Raises:
            CheckpointError: every complete checkpoint is damaged, or `like` has other leaves,
                shapes or dtypes.
        """
        return self._restore(like, partial)

    def _path(self, step: int, attempt: int) -> Any:
        return self.directory / (f"step_{step:08d}" + (f"_{attempt}" if attempt else ""))

    def _folders(self) -> list[_Folder]:
        """Return all checkpoints, complete or not, oldest first."""
        with gcs.told(self.directory):
            try:
                entries = [entry.name for entry in self.directory.iterdir()]
            except (FileNotFoundError, NotADirectoryError):
                entries = []
        matches = [match for match in map(_FOLDER.fullmatch, entries) if match]
        return sorted(
            _Folder(int(match[1]), int(match[2] or 0), self.directory / match[0])
            for match in matches
        )

    def _no_such(self, step: int) -> CheckpointError:
        return CheckpointError(
            f"{self.directory} holds no checkpoint of step {step}; it holds {self.steps()}"
        )

    def _restore(
        self, like: Any, partial: bool, only: int | None = None
    ) -> tuple[int, Any, dict] | None:
        """Restore the newest intact checkpoint; of step `only`, if that is given."""
        self.wait()
        folders = [folder for folder in self._folders() if only in (None, folder.step)]
        step, attempt = (-2 if any(folder.complete for folder in folders) else -1), 0
        # not every host need hash every file
        for folder in reversed(folders if jax.process_index() == 0 else []):
            try:
                with gcs.told(folder.path):
                    verify(folder.path)
                step, attempt, _ = folder
                break
            except CheckpointError as error:
                _log.warning("skipping a checkpoint that is not intact: %s", error)
        step, attempt = map(processes.broadcast_from_main, (step, attempt))
        if step == -2:
            tried = sorted({folder.step for folder in folders})
            raise CheckpointError(
                f"no intact checkpoint in {self.directory} (tried {tried}); remove it to start anew"
            )
        return None if step == -1 else _load(self._path(step, attempt), like, partial)

    def _finish(
        self, folder: _Folder, manifest: dict, response: Any, barrier: str, best: int | None
    ) -> None:
        """Wait for orbax, write the manifest, delete old checkpoints: the background thread."""
        try:
            response.result()  # all processes have written
            try:
                if jax.process_index() == 0:
                    workdir_sync.upload()  # what belongs to the steps so far, before they count
                    write_manifest(folder.path, manifest)
                    self._delete_old(folder, best)
            finally:  # the other processes wait here, also where the manifest failed
                asyncio.run(ocp.multihost.sync_global_processes("manifest", operation_id=barrier))
            if not folder.complete:
                raise OSError("the first process could not write the manifest")
            self._failures = 0
        except Exception as error:
            self._error = self._failed(folder, error)

    def _failed(self, folder: _Folder, error: Exception) -> CheckpointError:
        """Free the space of a failed save; return the error to raise for it."""
        self._failed_folder = folder
        with contextlib.suppress(Exception):
            for leftover in self._folders() if jax.process_index() == 0 else []:
                if leftover[:2] == folder[:2] and not leftover.complete:
                    _remove(leftover.path, ignore_errors=True)
        failed = CheckpointError(
            f"cannot save step {folder.step} in {self.directory}: {one_line(error)}"
        )
        failed.passing = jax.process_count() == 1 and is_transient(error)
        return failed

    def _delete_old(self, saved: _Folder, best: int | None) -> None:
        """Delete what is neither among the newest, nor a k-th, nor the best, nor newer."""
        steps = [step for step in self.steps() if step <= saved.step]
        if best in steps:
            self._saved_best = best
        kept = {*steps[-self.keep_last :], self._saved_best}
        kept |= {step for step in steps if self.keep_every and step % self.keep_every == 0}
        for folder in self._folders():
            replaced = folder.step == saved.step and folder.path != saved.path
            old = folder.step <= saved.step and folder.step not in kept
            try:
                with gcs.told(folder.path, "cannot be deleted"):
                    if (replaced or old) and folder.complete:
                        # First: a kill in the middle leaves nothing that looks complete.
                        (folder.path / MANIFEST).unlink()
                    if not folder.complete:
                        _remove(folder.path)
            except (OSError, gcs.RemoteError) as error:
                reason = one_line(error)
                _log.warning("cannot delete the old checkpoint %s: %s", folder.path, reason)


def _remove(path: Any, ignore_errors: bool = False) -> None:
    path.rmtree() if gcs.is_remote(path) else shutil.rmtree(path, ignore_errors)


def _load(path: Any, like: Any, partial: bool = False) -> tuple[int, Any, dict]:
    """Read a verified checkpoint into the structure and shardings of `like`.

    With `partial`, only those leaves that `like` has.
    """
    manifest = read_manifest(path)
    wanted = tree_io.named(like)
    saved = {
        name: spec for name, spec in manifest["leaves"].items() if name in wanted or not partial
    }
    tree_io.check_same(path, saved, tree_io.specs(wanted))
    targets = tree_io.targets(wanted)
    try:
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with context:
            arrays = ocp.load(path, targets) if targets else {}
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    return manifest["step"], tree_io.placed(like, arrays), manifest["metadata"]
