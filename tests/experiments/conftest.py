import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import pytest

import fr_jax as fr
from fr_jax.data import image_sets
from fr_jax.data.pipelines import InputPipeline, input_pipeline
from fr_jax.experiments._run import program as program_module
from fr_jax.training import classification

Result: TypeAlias = tuple[int, str, str]
"""Exit code, stdout, stderr."""


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``(main, *arguments) -> Result``: a program in this process."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave an empty ``curves.png``: drawing takes as long as a small run."""
    monkeypatch.setattr(program_module, "plot_curves", lambda runs, path, **texts: Path(path).touch())


pipelines: dict[Any, InputPipeline] = {}
layer_flops = functools.cache(fr.layer_flops)  # of the same layers, which the same call of a model makes
digits, synthetic = functools.cache(image_sets._digits), functools.cache(image_sets._synthetic)
models = {name: functools.cache(fr.models.MODELS[name]) for name in ("mlp", "gpt")}


def same_pipeline(dataset: image_sets.Dataset, batch_size: int, **options: Any) -> InputPipeline:
    """``input_pipeline``, once for each different call: it is a function of the step and holds no state."""
    sums = (zlib.crc32(leaf) for leaf in (dataset.train_images, dataset.train_labels, dataset.test_images))
    key = dataset.source, *sums, batch_size, *sorted(options.items()), jax.config.jax_enable_x64
    if key not in pipelines:
        pipelines[key] = input_pipeline(dataset, batch_size, **options)
        if len(pipelines) > 8:
            del pipelines[next(iter(pipelines))]
    return pipelines[key]


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[None]:
    """The runs of one process share data sets, mini-batches, layers and what these cost: a third of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_sets, "_digits", digits)
        patch.setattr(image_sets, "_synthetic", synthetic)
        for name, model in models.items():
            patch.setitem(fr.models.MODELS, name, model)
        patch.setattr(fr, "layer_flops", lambda layers, inputs: layer_flops(tuple(layers), inputs))
        patch.setattr(classification, "input_pipeline", same_pipeline)
        yield
