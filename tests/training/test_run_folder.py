import json
import os
import pathlib

import pytest

from fr_jax.training.run_folder import RunFolder, WorkdirError


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def old_run(path: pathlib.Path, *, finished: bool = True) -> RunFolder:
    folder = RunFolder(path)
    for place in (folder.checkpoints, folder.profile, folder.events):
        place.mkdir(parents=True)
        (place / "file").write_text("old")
    folder.config.write_text(json.dumps({"K": 4}))
    folder.metrics.write_text('{"step": 1}\n')
    folder.curves.write_text("old")
    (path / "notes.txt").write_text("the user's own")
    if finished:
        folder.summary.write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["new", "new/and/deep"])
def test_a_new_or_an_empty_folder_is_free(tmp_path, name):
    RunFolder(tmp_path).check_free(resume=False, overwrite=False)
    folder = RunFolder(tmp_path / name)
    folder.check_free(resume=False, overwrite=False)
    assert not folder.path.exists()
    folder.claim({"K": 4}, overwrite=False)
    assert folder.saved_config() == {"K": 4}


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_a_run_is_refused_and_left_alone(tmp_path, finished):
    folder = old_run(tmp_path / "run", finished=finished)
    before = contents(folder.path)
    kind = "a finished run" if finished else "an unfinished run"
    with pytest.raises(WorkdirError, match=f"holds {kind}, .*--resume.*--workdir.*--overwrite"):
        folder.check_free(resume=False, overwrite=False)
    folder.check_free(resume=True, overwrite=False)
    folder.check_free(resume=False, overwrite=True)
    assert contents(folder.path) == before


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path):
    folder = old_run(tmp_path / "run")
    folder.claim({"K": 2}, overwrite=True)
    assert set(contents(folder.path)) == {"config.json", "notes.txt"}
    assert folder.saved_config() == {"K": 2}


def test_going_on_deletes_the_summary_only(tmp_path):
    folder = old_run(tmp_path / "run")
    before = contents(folder.path)
    folder.claim({"K": 4}, overwrite=False)
    after = contents(folder.path)
    assert set(before) - set(after) == {"summary.json"}
    assert all(after[name] == before[name] for name in after if name != "config.json")


@pytest.mark.parametrize("name", ["file", "file/below", "link"])
def test_a_file_in_the_way_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(WorkdirError, match=f"{name.split('/')[0]} is not a folder"):
        RunFolder(tmp_path / name).check_free(resume=False, overwrite=False)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # for root everything is permitted
    with pytest.raises(WorkdirError, match=f"no permission for {tmp_path}"):
        RunFolder(tmp_path / "new").check_free(resume=False, overwrite=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_damaged_config_is_named(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.config.write_text(text)
    with pytest.raises(WorkdirError, match=r"config.json cannot be read .*--overwrite"):
        folder.saved_config()


def test_resuming_compares_settings(tmp_path):
    folder = old_run(tmp_path / "run")
    folder.check_same({"K": 4}, lambda saved, now: [])
    with pytest.raises(WorkdirError, match=r"other settings: K is 2 and was 4; something\. Repeat the settings"):
        folder.check_same({"K": 2}, lambda saved, now: [f"K is {now['K']} and was {saved['K']}", "something"])
    RunFolder(tmp_path / "nothing").check_same({"K": 2}, lambda saved, now: ["never asked"])


def test_resuming_with_damaged_metrics_is_refused(tmp_path):
    folder = old_run(tmp_path / "run")
    folder.metrics.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(WorkdirError, match=r"line 2 of .*metrics.jsonl is damaged"):
        folder.check_same({"K": 4}, lambda saved, now: [])


def test_a_second_process_is_kept_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    # flock belongs to the open file, so a second one in this process stands for another process.
    with folder.locked(), pytest.raises(WorkdirError, match="another process is training in"), folder.locked():
        pytest.fail("two processes hold the folder")
    with folder.locked():
        assert not list(folder.path.iterdir())
