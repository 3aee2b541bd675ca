"""Output paths that cannot be written are refused in one sentence, and checking a path creates nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from eagle_ds.config.outputs import PICTURES, check_output_file, check_output_folder


def test_writable_paths_pass_and_nothing_is_created(tmp_path: Path) -> None:
    check_output_folder(tmp_path, "--out")
    check_output_folder(tmp_path / "new" / "deeper", "--out")
    check_output_file(tmp_path / "new" / "plan.png", "--plot", PICTURES)
    assert not list(tmp_path.iterdir())


def test_relative_paths_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_output_file(Path("plan.png"), "--plot")
    check_output_folder(Path("new/deeper"), "--out")


def test_a_file_where_a_folder_is_expected_is_refused_and_vice_versa(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError,
        match=rf"^--out {tmp_path}/file/x: {tmp_path}/file is a file, where a folder was expected; give",
    ):
        check_output_folder(tmp_path / "file" / "x", "--out")
    with pytest.raises(
        ValueError,
        match=rf"^--json {tmp_path}: this is a folder, where a file was expected; name a file in it",
    ):
        check_output_file(tmp_path, "--json")


def test_a_file_without_write_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    check_output_file(tmp_path / "a.png", "--plot")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything
    with pytest.raises(
        ValueError, match=rf"^--plot {tmp_path}/a.png: no permission to write this file; give another name"
    ):
        check_output_file(tmp_path / "a.png", "--plot")


def test_a_picture_without_a_known_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the name of a picture ends with .png, .svg or .pdf"):
        check_output_file(tmp_path / "plan", "--plot", PICTURES)


def test_a_folder_without_write_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, os.strerror(13), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        ValueError,
        match=rf"^--plot {tmp_path}/new/a.png: nothing can be written in {tmp_path} \(Permission denied\)",
    ):
        check_output_file(tmp_path / "new" / "a.png", "--plot", PICTURES)
