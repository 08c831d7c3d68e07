"""Data sets prepared by TensorFlow Datasets (TFDS): finds, reads (without TensorFlow if possible) and prepares them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fr_jax.data._official import Arrays, OfficialData
from fr_jax.data.download import DataError


def folder() -> Path:
    """The data folder of TFDS: ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find(name: str, data_dir: Path) -> Path | None:
    """The newest prepared copy of ``name`` in the TFDS folder ``data_dir``, such as ``data_dir/cifar10/3.0.2``."""
    copies = [info.parent for info in data_dir.glob(f"{name}/[0-9]*/dataset_info.json")]
    return max(copies, key=lambda copy: [int(n) if n.isdigit() else -1 for n in copy.name.split(".")], default=None)


def can_prepare() -> bool:
    """Whether TensorFlow is installed, which TFDS needs to prepare a copy."""
    return importlib.util.find_spec("tensorflow") is not None


def read(copy: Path, official: OfficialData) -> Arrays:
    """Reads a prepared copy: ``array_record`` files without TensorFlow, ``tfrecord`` files with it.

    Raises:
      DataError: the format of the copy needs TensorFlow, which is not installed, or the copy is damaged.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(copy)
        train = _stack(_examples(builder, "train"), official.train_size, official)
        test = _stack(_examples(builder, "test"), official.test_size, official)
    except DataError as error:
        raise DataError(f"{copy} {error}") from None
    except Exception as error:  # TFDS and array_record raise RuntimeError, plain Exception and others
        raise DataError(
            f"{copy} could not be read as a TFDS copy ({type(error).__name__}: {error}). Delete it and prepare it again"
        ) from error
    return Arrays(*train, *test)


def prepare(name: str) -> None:
    """Downloads ``name`` and prepares it in the folder of TFDS. Needs TensorFlow."""
    import tensorflow_datasets as tfds

    _keep_tensorflow_off_the_accelerator()
    # array_record, so that the next run reads it without TensorFlow.
    tfds.builder(name, data_dir=folder(), file_format="array_record").download_and_prepare()


def _examples(builder: Any, split: str) -> Iterable[dict[str, Any]]:
    try:
        return builder.as_data_source(split)
    except NotImplementedError:  # tfrecord: without random access, which TFDS needs to read a copy by itself
        pass
    if not can_prepare():
        raise DataError(
            f"is a TFDS copy in the format {builder.info.file_format.value}, which only TensorFlow reads. Install it "
            "(pip install 'fr_jax[tfds]'), or prepare the copy with file_format='array_record'"
        )
    import tensorflow_datasets as tfds

    _keep_tensorflow_off_the_accelerator()
    return tfds.as_numpy(builder.as_dataset(split=split))


def _stack(examples: Iterable[dict[str, Any]], count: int, official: OfficialData) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(example["image"], int(example["label"])) for example in examples]
    shapes = {image.shape for image, _ in pairs}
    wrong = {label for _, label in pairs if not 0 <= label < official.num_classes}
    if len(pairs) != count or shapes != {official.image_shape} or wrong:
        raise DataError(
            f"is damaged: a split holds {len(pairs):,} images of shape {shapes} and labels {wrong or '{}'} outside "
            f"0..{official.num_classes - 1}; it must hold {count:,} of shape {official.image_shape} and no such label. "
            "Prepare it again"
        )
    return np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs], np.int32)


def _keep_tensorflow_off_the_accelerator() -> None:
    # TensorFlow would reserve all memory of the GPU, and leave none for JAX.
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
