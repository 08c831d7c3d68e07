"""What is trained: the data, the loss, and the numbers that tell how well it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fr_jax.data.pipelines import InputPipeline
from fr_jax.types import Array, PyTree

__all__ = ["ACCURACY", "Headline", "Task"]


class Headline(NamedTuple):
    """The number that a run is judged by.

    Attributes:
      name: of the metric, without ``train_`` or ``test_``: ``"accuracy"``, ``"bits_per_byte"``.
      fraction: the fraction of correct answers, in [0, 1]: higher is better, and comparisons show the error in
        percent. Otherwise lower is better, and the number is shown as it is.

    Example:
      >>> ACCURACY.text(0.75), ACCURACY.compared(0.75), ACCURACY.label
      ('75.00%', 25.0, 'error (%)')
      >>> bits = Headline("bits_per_byte")
      >>> bits.text(2.5), bits.compared(2.5), bits.label
      ('2.5000', 2.5, 'bits per byte')
    """

    name: str
    fraction: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Headline:
        """The headline in a run's ``config.json``; runs of fr_jax 0.1 have none and are judged by accuracy."""
        return cls(**config["headline"]) if "headline" in config else ACCURACY

    @property
    def words(self) -> str:
        """The name for people."""
        return self.name.replace("_", " ")

    @property
    def compared_name(self) -> str:
        """What tables and comparisons show: ``"error"``, or the name."""
        return "error" if self.fraction else self.name

    @property
    def label(self) -> str:
        """``compared_name`` for people, with its unit."""
        return "error (%)" if self.fraction else self.words

    def compared(self, value: Any) -> Any:
        """The value, or an array of values, that tables and comparisons show: lower is better."""
        return 100 * (1 - value) if self.fraction else value

    def text(self, value: float) -> str:
        """The value for people."""
        return f"{value:.2%}" if self.fraction else f"{value:.4f}"

    def better(self, value: float, other: float | None) -> float:
        """The better of the two; ``other`` may be missing."""
        if other is None:
            return value
        return max(value, other) if self.fraction else min(value, other)


ACCURACY = Headline("accuracy", fraction=True)


class Task(NamedTuple):
    """A problem to train a network on. The training loop, its reports and its files know nothing else of it.

    Attributes:
      dataset: the name of the data set.
      source: one line for people: which data this is and where it came from.
      pipeline: makes the mini-batches.
      loss: ``(outputs, targets) -> scalar``, the ``loss_fn`` of every method.
      metrics: ``(outputs, targets) -> {name: scalar}`` of a training mini-batch, the ``metrics_fn`` of every method;
        the rows of ``metrics.jsonl`` have their means as ``train_<name>``.
      evaluate: ``(predict, state) -> {"loss": ..., name: ...}`` over the test set, with ``predict`` of the
        ``Algorithm``; the rows have them as ``test_<name>``. The headline is among them.
      headline: the number that a run is judged by.
      unit: what training consumes, in the plural: ``"images"``, ``"tokens"``. Rows have ``<unit>_per_s``.
      units_per_step: how many of them are in a mini-batch.
      examples: number of training examples; ``Batch.index`` is below it. None: mini-batches have no index.
      num_classes: number of classes, for methods that show the targets to a synthesizer.
      checksum: of the data, where they may differ under the same name; a run is resumed on the same data only.
      sample: ``(predict, state) -> text``, what the trained network makes, for people; all processes call it.
    """

    dataset: str
    source: str
    pipeline: InputPipeline
    loss: Callable[[PyTree, PyTree], Array]
    metrics: Callable[[PyTree, PyTree], dict[str, Array]]
    evaluate: Callable[[Callable[[Any, PyTree], PyTree], Any], dict[str, float]]
    headline: Headline
    unit: str
    units_per_step: int
    examples: int | None
    num_classes: int | None = None
    checksum: int | None = None
    sample: Callable[[Callable[[Any, PyTree], PyTree], Any], str] | None = None
