"""Images to classify and text to predict, and the batches made from them.

Example:
  >>> from fr_jax import data
  >>> pipeline = data.input_pipeline(data.load("digits"), 128, seed=0)
  >>> pipeline.train_batch(0).inputs.shape
  (128, 32, 32, 3)
"""

from fr_jax.data import text
from fr_jax.data.download import DataError
from fr_jax.data.image_sets import DATASETS, Dataset, load
from fr_jax.data.iterators import iterator_pipeline
from fr_jax.data.pipelines import InputPipeline, input_pipeline, text_pipeline

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "InputPipeline",
    "input_pipeline",
    "iterator_pipeline",
    "load",
    "text",
    "text_pipeline",
]
