"""Where measuring programs leave their results, ``fr_jax.experiments._cli.results``, and where they refuse to run."""

import os

import pytest

from fr_jax import distributed
from fr_jax.experiments import balance, chain_rule
from fr_jax.experiments._bench import pinned
from fr_jax.experiments._cli.results import check_file, check_folder, write_beside
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments.memory import __main__ as memory
from fr_jax.experiments.scaling import __main__ as scaling
from fr_jax.experiments.speed import __main__ as speed
from fr_jax.experiments.theorems import __main__ as theorems
from fr_jax.experiments.throughput import __main__ as throughput

PROGRAMS = (balance, chain_rule, memory, scaling, speed, theorems, throughput)


def test_a_file_gets_its_folder_and_is_not_replaced_unasked(tmp_path):
    output = tmp_path / "new" / "folder" / "speed.json"
    check_file(output, overwrite=False)
    write_beside(output, {"a": 1}, b"picture")
    assert output.with_suffix(".png").read_bytes() == b"picture"
    with pytest.raises(SettingsError, match=r"folder has speed.json, speed.png already. Add --overwrite"):
        check_file(output, overwrite=False)
    check_file(output, overwrite=True)
    output.unlink()
    with pytest.raises(SettingsError, match=r"folder has speed.png already"):
        check_file(output, overwrite=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.png", "x.png does not end in .json; .* Try --output .*/x.png.json"),
        ("folder", "folder is a folder; .* Try --output .*/folder/result.json"),
        ("file/x.json", "x.json cannot be in a folder: .* Choose another"),
    ],
)
def test_what_cannot_be_a_file_is_refused(tmp_path, name, said):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError, match=said):
        check_file(tmp_path / name, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    check_folder(None, ["a"], overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match="cannot be written"):
        check_folder(tmp_path, ["a"], overwrite=False)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__.rpartition(".")[2])
def test_programs_for_one_process_refuse_more(program, monkeypatch, capsys):
    monkeypatch.setenv(distributed.NUM_PROCESSES, "2")
    assert program.main(["--pytorch", "none"] if program is throughput else []) == 2
    assert "Start it without fr_jax.launch." in capsys.readouterr().err


def test_pinned_is_k_processes_of_a_core_each(monkeypatch):
    assert pinned.placed_on(False, 2)["placement"] == "devices of one process"
    monkeypatch.setattr(pinned, "cores_by_process", lambda: [[3], [5]])
    assert pinned.placed_on(True, 2) == {"placement": "one pinned process a stage", "cores_by_process": [[3], [5]]}
    for found in ([[3], [5], [7]], [[3], [3]], [[3, 4], [5]], [[3]], [[3, 4], []], [None, None]):
        monkeypatch.setattr(pinned, "cores_by_process", lambda found=found: found)
        with pytest.raises(SettingsError, match="--pinned needs 2 processes with a core each for --K 2; these are"):
            pinned.placed_on(True, 2)


def test_pinned_gives_each_process_one_core(monkeypatch):
    """Of a machine with more cores than stages, each stage has one and not an equal share."""
    affinity, started = [set(range(16))], []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity[0])
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: affinity.__setitem__(0, set(cores)))
    monkeypatch.setattr(pinned.launch, "start", lambda *given, **options: started.append((*given, affinity[0])))
    monkeypatch.setattr(pinned.launch, "wait", lambda group: 7)
    assert pinned.start_pinned("speed", speed.SpeedSettings(), speed.SpeedSettings(K=3, pinned=True)) == 7
    assert started == [(["-m", "fr_jax.experiments.speed", "--K", "3", "--pinned"], 3, {0, 1, 2})] and affinity == [
        set(range(16))
    ]


def test_pinned_where_processes_cannot_be_pinned(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(SettingsError, match=r"does not pin processes to cores; Linux does. Drop --pinned"):
        pinned.start_pinned("speed", speed.SpeedSettings(), speed.SpeedSettings(pinned=True))
