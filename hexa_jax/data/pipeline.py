"""The host's part of the input: order of examples, decoding, cropping, batching.

Row r of step t of pass p is a function of (seed, p, t, r) only. grain gets this map and runs it in
threads or processes; its own shuffling and sharding would make the batch depend on the number of
processes. Pass 0 is DeepCluster's first pass; epoch e of training is pass e + 1, for all methods.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from hexa_jax.core.batch import Batch
from hexa_jax.data.crops import Resolution, crop_number
from hexa_jax.data.decode import BadImage, crop_generator, decode, random_resized_crop
from hexa_jax.data.source import DataError
from hexa_jax.parallel.mesh import Layout, shard_batch

ORDER_STREAM, SHUFFLE_STREAM = 1, 2
WORKER_DEATHS = 3  # after which a run gives up
HANDFUL = 10  # unreadable images that end no run


@functools.lru_cache(maxsize=2)
def pass_order(seed: int, pass_number: int, num_examples: int) -> np.ndarray:
    """int64 [num_examples]: a random order of all examples, different for each pass."""
    return np.random.default_rng([seed, ORDER_STREAM, pass_number]).permutation(num_examples)


def key_rows(seed: int, pass_number: int, step: int, batch_size: int, block: int) -> np.ndarray:
    """Return int64 [batch_size]: the row whose example each key slot shows.

    Shuffled within blocks of consecutive rows.
    """
    generator = np.random.default_rng([seed, SHUFFLE_STREAM, pass_number, step])
    order = generator.permuted(np.tile(np.arange(block), (batch_size // block, 1)), axis=1)
    return (order + block * np.arange(batch_size // block)[:, None]).reshape(-1)


@dataclasses.dataclass(frozen=True)
class HostSteps:
    """Random access to this process's part of every step: the source of grain's data set.

    Element s is step s % steps_per_epoch of pass s // steps_per_epoch, as a dict of NumPy arrays
    [M, local, ...] and `bad`, the indices of examples that could not be read.

    Attributes:
        source: random-access examples; None when the images live on the device, which then need no
            pixels from here.
        labels: int32 [num_examples] of a resident data set; else labels are read with the images.
        bad: indices known to be unreadable, with replacements already in place (resident data
            sets).
        rows: [M, local] from `mesh.local_rows`.
        max_failures: consecutive unreadable images after which to give up.
        crop_sets: sets of crops of each image: the method's own, and those that hard views ask for.
    """

    source: Any
    num_examples: int
    labels: np.ndarray | None
    resolutions: tuple[Resolution, ...]
    key_crops: int
    layout: Layout
    rows: np.ndarray
    seed: int
    num_steps: int
    max_failures: int
    bad: frozenset[int] = frozenset()
    crop_sets: int = 1

    def __len__(self) -> int:
        return self.num_steps

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return self.num_examples // self.layout.batch_size

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        pass_number, step = divmod(int(number), self.steps_per_epoch)
        batch_size = self.layout.batch_size
        order = pass_order(self.seed, pass_number, self.num_examples)
        index = order[step * batch_size : (step + 1) * batch_size].astype(np.int32)
        rows = self.rows.reshape(-1)
        element: dict[str, np.ndarray] = {
            "index": index[rows],
            "row": rows.astype(np.int32),
            "label": np.full(len(rows), -1, np.int32)
            if self.labels is None
            else self.labels[index[rows]],
        }
        shuffled = rows
        if self.key_crops:
            slots = key_rows(self.seed, pass_number, step, batch_size, self.layout.shuffle_block)
            shuffled = slots[rows]
            element["key_index"] = index[shuffled]
            element["key_row"] = np.argsort(slots).astype(np.int32)[rows]
        if self.source is None:
            element["valid"] = np.array([int(i) not in self.bad for i in element["index"]])
            element["label"] = np.where(element["valid"], element["label"], -1)
            element["bad"] = np.empty(0, np.int32)
        else:
            element |= self._pixels(index, rows, shuffled, pass_number)
        lead = self.rows.shape
        return {
            name: leaf if name == "bad" else leaf.reshape(*lead, *leaf.shape[1:])
            for name, leaf in element.items()
        }

    def _pixels(
        self, index: np.ndarray, rows: np.ndarray, shuffled: np.ndarray, pass_number: int
    ) -> dict:
        """Crops of the rows, and key crops in shuffled order; each image is decoded once."""
        sets = range(self.crop_sets)
        shapes = [(len(rows), len(sets) * r.count, r.size, r.size, 3) for r in self.resolutions]
        crops = [np.empty(shape, np.uint8) for shape in shapes]
        key_size = self.resolutions[0].size
        keys = np.empty((len(rows), self.key_crops, key_size, key_size, 3), np.uint8)
        slot_of = {int(row): slot for slot, row in enumerate(shuffled)} if self.key_crops else {}
        position_of = {int(row): position for position, row in enumerate(rows)}
        valid, bad = np.ones(len(rows), bool), []
        label = np.full(len(rows), -1, np.int32)
        # a block that spans processes brings rows of others
        for row in sorted(position_of.keys() | slot_of.keys()):
            image, row_label, failed = read_or_replace(
                self.source, int(index[row]), self.max_failures
            )
            bad += failed
            cut = functools.partial(self._cut, image, pass_number, int(index[row]))
            if row in position_of:
                for crop_set in sets:
                    number = crop_number(self.resolutions, self.key_crops, crop_set)
                    for r, resolution in enumerate(self.resolutions):
                        place = crop_set * resolution.count
                        for v in range(resolution.count):
                            crops[r][position_of[row], place + v] = cut(number + v, resolution)
                        number += resolution.count
            if row in slot_of:
                number = sum(resolution.count for resolution in self.resolutions)
                keys[slot_of[row], 0] = cut(number, self.resolutions[0])
            if row in position_of:
                valid[position_of[row]] = not failed
                label[position_of[row]] = -1 if failed else row_label
        pixels: dict[str, np.ndarray] = {f"crops{r}": leaf for r, leaf in enumerate(crops)}
        pixels |= {"valid": valid, "label": label, "bad": np.array(bad, np.int32)}
        return pixels | ({"key_crops": keys} if self.key_crops else {})

    def _cut(
        self, image: np.ndarray, pass_number: int, index: int, crop: int, resolution: Resolution
    ) -> np.ndarray:
        generator = crop_generator(self.seed, pass_number, index, crop)
        return random_resized_crop(
            image,
            generator,
            resolution.size,
            resolution.scale,
            resolution.ratio,
            resolution.flip,
            resolution.vertical_flip,
            resolution.quarter_turns,
        )


def read_or_replace(
    source: Any, index: int, max_failures: int
) -> tuple[np.ndarray, int, list[int]]:
    """Read example `index` or the next readable one: pixels, label, and what failed.

    Raises:
        DataError: more than `max_failures` in a row cannot be read.
    """
    failed: list[int] = []
    while True:
        candidate = (index + len(failed)) % len(source)
        try:
            example = source[candidate]
            return (
                decode(example["image"], source.name(candidate)),
                int(example.get("label", -1)),
                failed,
            )
        except (BadImage, OSError) as error:
            failed.append(candidate)
            if len(failed) > min(max_failures, len(source) - 1):
                raise DataError(
                    f"{len(failed)} images in a row cannot be read, the last is {error}"
                ) from error


def tolerated(max_fraction: float, num_examples: int) -> int:
    """How many of `num_examples` may be unreadable: the fraction of them, but at least a handful.

    A handful is 10 images, or 5 % where there are fewer than 200: of a thousand photographs, a
    fraction that suits a million would tolerate one. A fraction of 0 tolerates none.
    """
    handful = min(HANDFUL, num_examples // 20)
    return max(int(max_fraction * num_examples), handful) if max_fraction else 0


class BadImages:
    """Counts unreadable examples, names each once, and stops the run when there are too many."""

    def __init__(self, source: Any, max_fraction: float):
        self.source, self.max_fraction = source, max_fraction
        self.limit = tolerated(max_fraction, len(source))
        self.seen: set[int] = set()

    def add(self, indices: Any) -> None:
        """Raises DataError when more of the data set have failed than `tolerated` allows."""
        for index in indices:
            if int(index) not in self.seen:
                self.seen.add(int(index))
                logging.warning(
                    "cannot read %s: its slot is filled by the next readable image",
                    self.source.name(index),
                )
        if len(self.seen) > self.limit:
            raise DataError(
                f"{len(self.seen)} of {len(self.source)} images cannot be read, which is more than "
                f"the {self.limit} "
                f"that --config.data.max_bad_fraction={self.max_fraction:g} allows; "
                f"the last is {self.source.name(max(self.seen))}"
            )


def resident_images(source: Any, bad_images: BadImages, max_failures: int) -> np.ndarray:
    """Read the whole data set as uint8 [N, H, W, 3], replacing unreadable examples.

    Raises:
        DataError: images of different sizes, or too many unreadable ones.
    """
    images = None
    for index in range(len(source)):
        image, _, failed = read_or_replace(source, index, max_failures)
        bad_images.add(failed)
        if images is None:
            images = np.empty((len(source), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise DataError(
                f"data.on_device needs images of one size: {source.name(index)} is "
                f"{image.shape[1]}x{image.shape[0]}, "
                f"the first is {images.shape[2]}x{images.shape[1]}"
            )
        images[index] = image
    assert images is not None
    return images


class InputLost(RuntimeError):
    """Data workers keep dying; one line."""


class Elements(Protocol):
    """Random access to the elements of a run, such as HostSteps; picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, np.ndarray]: ...


def host_iterator(
    steps: Elements, start: int, workers: int, threads: int, buffer: int
) -> Iterator[dict]:
    """Iterate over the steps from `start` on, read ahead by grain.

    An element is a function of its number, so when a worker process dies (the system kills the
    largest when memory is short), new ones begin where it was missed.

    Raises:
        InputLost: that happened more than WORKER_DEATHS times.
    """
    position, deaths = start, 0
    while True:
        try:
            # Closed also where a run ends early: what workers had ready lies in shared memory that
            # nobody else would free.
            with contextlib.closing(_grain(steps, position, workers, threads, buffer)) as elements:
                # Never up to the StopIteration: its traceback would keep the last element.
                while position < len(steps):
                    element = next(elements)
                    position += 1
                    yield element
                    del element  # else its memory stays in use while the next one is read
            return
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            deaths += 1
            reason = str(error).splitlines()[0]
            if deaths > WORKER_DEATHS:
                raise InputLost(
                    f"{reason} It is the {deaths}th; the same command resumes from the last "
                    "checkpoint. If memory is "
                    "short, use fewer config.runtime.workers or a smaller config.runtime.prefetch"
                ) from None
            logging.warning("%s Starting workers again at element %d", reason, position)


def _grain(
    steps: Elements, start: int, workers: int, threads: int, buffer: int
) -> grain.DatasetIterator:
    dataset = grain.MapDataset.source(steps)[start:]
    options = grain.ReadOptions(num_threads=max(threads, 1), prefetch_buffer_size=max(buffer, 1))
    if workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    iterable = dataset.to_iter_dataset(options)
    if workers:
        # grain's workers read absl flags, which a notebook or a benchmark never parses
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=max(1, buffer // workers)
            ),
            worker_init_fn=_end_with_parent,
        )
    return iter(iterable)


@atexit.register
def _free_shared_memory() -> None:
    """Free what finished elements hold of shared memory, before the program ends.

    grain leaves that to a thread that just stops there, and Python would warn of leaked objects.
    """
    pool = getattr(SharedMemoryArray, "_del_thread_pool", None)
    if pool is not None:
        SharedMemoryArray._del_thread_pool = None  # from here on they are freed at once
        pool.close()
        pool.join()


def _end_with_parent(*_: int) -> None:
    """End a worker when its parent is gone.

    A parent that was killed tells nobody, and grain's workers would wait for ever.
    """

    def watch(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, args=[multiprocessing.parent_process()], daemon=True).start()


def device_batches(
    iterator: Iterator[dict],
    mesh: jax.sharding.Mesh,
    layout: Layout,
    bad_images: BadImages,
    labels: np.ndarray,
) -> Generator[Batch, None, None]:
    """Batches on the devices, two ahead, so that the transfer of one overlaps the step before it.

    Labels that pass by are written into `labels` [num_examples], for statistics on the host.
    """

    def to_batch(element: dict) -> Batch:
        bad_images.add(element.pop("bad"))
        labels[element["index"].reshape(-1)] = element["label"].reshape(-1)
        placed = {name: shard_batch(mesh, layout, leaf) for name, leaf in element.items()}
        names = sorted(name for name in placed if name.startswith("crops"))
        crops = tuple(placed.pop(name) for name in names)
        return Batch(crops=crops, **placed)

    ahead: collections.deque[Batch] = collections.deque()
    for element in iterator:
        ahead.append(to_batch(element))
        if len(ahead) > 2:
            yield ahead.popleft()
    yield from ahead
