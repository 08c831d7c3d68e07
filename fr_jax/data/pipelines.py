"""Batches for the first stage.

Images are gathered, cropped, flipped and normalised on its device by one jitted function; windows of a text are read
by the host, which need not hold the text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from fr_jax._arrays import place
from fr_jax._placement import default_sharding, without_context_mesh
from fr_jax.data.download import DataError
from fr_jax.data.image_sets import Dataset
from fr_jax.data.text import Corpus, Text
from fr_jax.types import Array, Batch

__all__ = ["InputPipeline", "check_length", "input_pipeline", "text_pipeline", "windows_in"]

Normalise: TypeAlias = Callable[[Array], Array]
Shardings: TypeAlias = tuple[Sharding, Sharding]
"""Two placements on the same devices: whole on each of them, and split along the first axis."""

PADDING = 4  # pixels on each side before a crop of the original size, as in the CIFAR experiments of the ResNet paper


class InputPipeline(NamedTuple):
    """Where a run's mini-batches come from.

    Attributes:
      steps_per_epoch: mini-batches of an epoch; the rest of the examples, fewer than a batch, sits that epoch out. Of
        a text, mini-batches with as many bytes as it has.
      train_batch: ``step -> Batch``. A pure function of the seed and of the step (epoch ``step // steps_per_epoch``),
        so a resumed run needs nothing but its step. It never waits for a device.
      test_batches: ``() -> iterator of (Batch, valid)``. Every batch has the same size; the last is filled up (with
        black images of class 0 and index 0, or the first window), and only its first ``valid`` examples count.
      position: ``() -> JSON value``, of data that are not a function of the step: what ``seek`` needs to go on behind
        the newest mini-batch. It is saved with each checkpoint.
      seek: ``(position, step) -> None``, called before the first step of a resumed run.
    """

    steps_per_epoch: int
    train_batch: Callable[[int], Batch]
    test_batches: Callable[[], Iterator[tuple[Batch, int]]]
    position: Callable[[], Any] | None = None
    seek: Callable[[Any, int], None] | None = None


def input_pipeline(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    sharding: Sharding | None = None,
    augment: bool | None = None,
    test_batch_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> InputPipeline:
    """Puts ``dataset`` on the first stage's device and makes its mini-batches there.

    Each epoch shuffles anew. To crop a training image is to pad it with 4 black pixels on each side and to cut out its
    own size at a random place; to flip it, to mirror it with probability 1/2. All images are scaled to [0, 1] and
    normalised. They stay on the device as uint8 (CIFAR-10: 184 MB), on each device of a mesh; of mapped ones
    (``np.memmap``) the host reads those of each mini-batch.

    Args:
      dataset: what :func:`fr_jax.data.load` returned.
      batch_size: B, examples of a mini-batch, over all devices of a mesh.
      seed: of the order and of the augmentation.
      sharding: the first stage's: a ``SingleDeviceSharding``, or a ``NamedSharding`` whose first axis splits the batch.
      augment: whether to crop, and to flip if ``dataset.flip``; by default, crop if ``dataset.crop``.
      test_batch_size: ``batch_size`` by default.
      dtype: of the inputs.

    Returns:
      The pipeline; inputs ``(B, H, W, C)``, targets ``(B,)`` and index ``(B,)`` int32, placed as ``sharding`` says.

    Raises:
      ValueError: a batch size that is not positive, not divisible by the number of devices that share a batch, or
        larger than the training set.

    Example:
      >>> from fr_jax import data
      >>> pipeline = data.input_pipeline(data.load("digits"), 128, seed=0)
      >>> pipeline.train_batch(0).inputs.shape
      (128, 32, 32, 3)
    """
    shardings = _shardings(sharding)
    test_batch_size = batch_size if test_batch_size is None else test_batch_size
    _check_batch_size("batch_size", batch_size, shardings[1], largest=len(dataset.train_labels))
    _check_batch_size("test_batch_size", test_batch_size, shardings[1])
    crop, flip = (dataset.crop, dataset.flip) if augment is None else (augment, augment and dataset.flip)
    normalise = functools.partial(_normalise, mean=dataset.mean, std=dataset.std, dtype=dtype)
    return InputPipeline(
        len(dataset.train_labels) // batch_size,
        _train_batches(dataset, batch_size, seed, crop, flip, normalise, shardings),
        _test_batches(dataset, test_batch_size, normalise, shardings),
    )


def text_pipeline(
    corpus: Corpus,
    batch_size: int,
    context: int,
    *,
    seed: int,
    sharding: Sharding | None = None,
    test_windows: int | None = None,
) -> InputPipeline:
    """Mini-batches of windows of a text: ``context`` bytes, and for each the byte that comes next.

    A training window begins at any byte, drawn anew for each step from the seed and the step's number. Test windows
    follow one another without overlap through the held-out text.

    Args:
      corpus: what :func:`fr_jax.data.text.load` returned.
      batch_size: B, windows of a mini-batch, over all devices of a mesh.
      context: T, bytes of a window.
      seed: of the windows to train on.
      sharding: the first stage's: a ``SingleDeviceSharding``, or a ``NamedSharding`` whose first axis splits the batch.
      test_windows: test on so many windows only, spread evenly over the held-out text.

    Returns:
      The pipeline; inputs and targets are int32 ``(B, T)``, without an index.

    Raises:
      DataError: one of the two texts is shorter than a window.
      ValueError: a batch size that is not positive, or not divisible by the number of devices that share a batch.

    Example:
      >>> from fr_jax import data
      >>> corpus = data.text.load(files=[data.text.__file__])
      >>> batch = data.text_pipeline(corpus, 16, 128, seed=0).train_batch(0)
      >>> batch.inputs.shape, bool((batch.inputs[:, 1:] == batch.targets[:, :-1]).all())
      ((16, 128), True)
    """
    _, rows = _shardings(sharding)
    _check_batch_size("batch_size", batch_size, rows)
    check_length(corpus, context)

    def batch_of(text: Text, starts: np.ndarray) -> Batch:
        windows = text.windows(starts, context + 1).astype(np.int32)
        return Batch(*place((windows[:, :-1].copy(), windows[:, 1:].copy()), rows, copy=False))

    def train_batch(step: int) -> Batch:
        # Raw bits, which are the same in every version of NumPy.
        drawn = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch_size)
        return batch_of(corpus.train, drawn % np.uint64(len(corpus.train) - context))

    def test_batches() -> Iterator[tuple[Batch, int]]:
        whole = windows_in(corpus.held_out, context)
        count = min(whole, test_windows or whole)
        for first in range(0, count, batch_size):
            valid = min(batch_size, count - first)
            # Those that fill up the last batch repeat the first window.
            chosen = np.pad(np.arange(first, first + valid), (0, batch_size - valid))
            yield batch_of(corpus.held_out, chosen * whole // count * context), valid

    return InputPipeline(max(1, windows_in(corpus.train, context) // batch_size), train_batch, test_batches)


def check_length(corpus: Corpus, context: int) -> None:
    """Raises DataError if a text is shorter than a window."""
    for name, text in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(text) <= context:
            raise DataError(
                f"the {name} text has {len(text):,} bytes; a window has context + 1 = {context + 1:,}. Give more "
                "text, or a smaller --context."
            )


def windows_in(text: Text, context: int) -> int:
    """How many windows of ``context`` bytes, and the byte after, follow one another in a text without overlap."""
    return max(0, len(text) - 1) // context


def _train_batches(
    dataset: Dataset, batch_size: int, seed: int, crop: bool, flip: bool, normalise: Normalise, shardings: Shardings
) -> Callable[[int], Batch]:
    whole, rows = shardings
    if isinstance(dataset.train_images, np.memmap):
        return _read_batches(dataset, batch_size, seed, crop, flip, normalise, shardings)
    steps_per_epoch = len(dataset.train_labels) // batch_size
    images = place(dataset.train_images, whole, copy=False)
    labels = place(dataset.train_labels, whole, copy=False)
    key = place(jax.random.key(seed), whole)

    @functools.partial(jax.jit, out_shardings=whole)
    def shuffled(key: Array, epoch: Array) -> Array:
        return jax.random.permutation(_fold(key, 0, epoch), len(dataset.train_labels))

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Array:
        return shuffled(key, place(np.uint32(epoch), whole))

    @functools.partial(jax.jit, out_shardings=rows)
    def gather(images: Array, labels: Array, order: Array, key: Array, where: Array) -> Batch:
        epoch, batch = where
        start = batch.astype(jnp.int32) * batch_size
        # Split here, so that each device gathers its rows only.
        index = jax.lax.with_sharding_constraint(jax.lax.dynamic_slice(order, (start,), (batch_size,)), rows)
        # From epoch and batch alone, so that a resumed run draws the same.
        inputs = _augmented(images, index, _fold(key, 1, epoch, batch), crop, flip)
        return Batch(normalise(inputs), labels[index], index)

    def train_batch(step: int) -> Batch:
        epoch, batch = divmod(step, steps_per_epoch)
        where = place(np.array([epoch, batch], np.uint32), whole)
        with without_context_mesh():
            return gather(images, labels, order(epoch), key, where)

    return train_batch


def _read_batches(
    dataset: Dataset, batch_size: int, seed: int, crop: bool, flip: bool, normalise: Normalise, shardings: Shardings
) -> Callable[[int], Batch]:
    """Of images that the host reads when they are needed; the order of an epoch is the host's, too."""
    whole, rows = shardings
    steps_per_epoch = len(dataset.train_labels) // batch_size
    key = place(jax.random.key(seed), whole)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(dataset.train_labels))

    @functools.partial(jax.jit, out_shardings=rows)
    def prepared(images: Array, key: Array, where: Array) -> Array:
        return normalise(_augmented(images, jnp.arange(batch_size), _fold(key, 1, *where), crop, flip))

    def train_batch(step: int) -> Batch:
        epoch, batch = divmod(step, steps_per_epoch)
        index = order(epoch)[batch * batch_size : (batch + 1) * batch_size].astype(np.int32)
        images, labels, index = place((dataset.train_images[index], dataset.train_labels[index], index), rows)
        return Batch(prepared(images, key, place(np.array([epoch, batch], np.uint32), whole)), labels, index)

    return train_batch


def _augmented(images: Array, index: Array, key: Array, crop: bool, flip: bool) -> Array:
    if not (crop or flip):
        return images[index]
    shift_key, flip_key = jax.random.split(key)
    reach = PADDING if crop else 0
    shift = jax.random.randint(shift_key, (len(index), 2), -reach, reach + 1)
    mirrored = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (len(index),))
    return _cropped(images, index, shift, mirrored)


def _test_batches(
    dataset: Dataset, batch_size: int, normalise: Normalise, shardings: Shardings
) -> Callable[[], Iterator[tuple[Batch, int]]]:
    whole, rows = shardings
    count = len(dataset.test_labels)
    if isinstance(dataset.test_images, np.memmap):
        return _read_test_batches(dataset, batch_size, normalise, rows)
    padded = lambda a: np.pad(a, ((0, -count % batch_size), *((0, 0),) * (a.ndim - 1)))
    arrays = (dataset.test_images, dataset.test_labels, np.arange(count, dtype=np.int32))
    examples = Batch(*place(tuple(map(padded, arrays)), whole, copy=False))

    @functools.partial(jax.jit, out_shardings=rows)
    def cut(examples: Batch, start: Array) -> Batch:
        part = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, batch_size), examples)
        batch = jax.lax.with_sharding_constraint(part, rows)
        return batch._replace(inputs=normalise(batch.inputs))

    def test_batches() -> Iterator[tuple[Batch, int]]:
        for start in range(0, count, batch_size):
            with without_context_mesh():
                batch = cut(examples, place(np.int32(start), whole))
            yield batch, min(batch_size, count - start)

    return test_batches


def _read_test_batches(
    dataset: Dataset, batch_size: int, normalise: Normalise, rows: Sharding
) -> Callable[[], Iterator[tuple[Batch, int]]]:
    count, prepared = len(dataset.test_labels), jax.jit(normalise, out_shardings=rows)

    def test_batches() -> Iterator[tuple[Batch, int]]:
        for start in range(0, count, batch_size):
            valid = min(batch_size, count - start)
            padded = lambda a, valid=valid: np.pad(a, ((0, batch_size - valid), *((0, 0),) * (a.ndim - 1)))
            part = slice(start, start + valid)
            found = (
                dataset.test_images[part],
                dataset.test_labels[part],
                np.arange(start, start + valid, dtype=np.int32),
            )
            images, *others = place(tuple(map(padded, found)), rows)
            yield Batch(prepared(images), *others), valid

    return test_batches


def _cropped(images: Array, index: Array, shift: Array, mirrored: Array) -> Array:
    """Windows of the images' own size, moved by ``shift`` (rows, columns), black where they reach beyond the edge."""
    # One gather straight out of the data set: half the time of dm-pix's random_crop and random_flip_left_right under
    # vmap (0.2 against 0.45 ms for 128 images of CIFAR-10 on two CPU cores), and one package fewer.
    height, width = images.shape[1:3]
    forward = jnp.arange(width)[None]
    row = (shift[:, :1] + jnp.arange(height)[None])[:, :, None]
    column = (shift[:, 1:] + jnp.where(mirrored[:, None], forward[:, ::-1], forward))[:, None, :]
    windows = images.at[index[:, None, None], row, column].get(mode="clip", wrap_negative_indices=False)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside[..., None], windows, 0)


def _normalise(images: Array, mean: np.ndarray, std: np.ndarray, dtype: DTypeLike) -> Array:
    scaled = images.astype(jnp.float32) / 255
    return ((scaled - mean[None, None, None]) / std[None, None, None]).astype(dtype)


def _fold(key: Array, *data: int | Array) -> Array:
    return functools.reduce(jax.random.fold_in, data, key)


def _shardings(sharding: Sharding | None) -> Shardings:
    if sharding is None:
        sharding = default_sharding()
    if isinstance(sharding, NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        return whole, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    if isinstance(sharding, SingleDeviceSharding):
        return sharding, sharding
    raise ValueError(
        f"the first stage's sharding is a {type(sharding).__name__}; it must be a SingleDeviceSharding or a "
        "NamedSharding whose first axis splits the batch: take it from fr_jax.placement"
    )


def _check_batch_size(name: str, size: int, rows: Sharding, largest: int | None = None) -> None:
    devices = len(rows.device_set)
    shares = devices // rows.shard_shape((devices,))[0]
    if size < 1 or size % shares or (largest is not None and size > largest):
        at_most = "" if largest is None else f", at most the {largest:,} training examples"
        raise ValueError(
            f"{name} is {size}; it must be a positive multiple of {shares} (the devices that share a mini-batch)"
            f"{at_most}. Try {max(shares, min(size, largest or size) // shares * shares)}"
        )
