"""`make matrix`: which environments it makes, and what it tells of their tests."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests import matrix

ROOT = Path(__file__).resolve().parents[2]

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good" />
<testcase classname="tests.test_a" name="test_bad[1]"><failure message="no" /></testcase>
<testcase classname="tests.test_a" name="test_broken"><error message="no" /></testcase>
<testcase classname="tests.test_b" name="test_left_out"><skipped message="no GPU" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """One environment, which is neither made nor run: its report says how its tests ended."""
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    made = matrix.Environment("3.12", ("torch==2.11.0", "transformers==5.17.0"))
    monkeypatch.setattr(matrix, "ENVIRONMENTS", (made,))
    monkeypatch.setattr(matrix, "make", lambda environment: None)
    monkeypatch.setattr(matrix, "versions", lambda environment: "Python 3.12.1, torch 2.11.0")
    return made


def ends_with(monkeypatch, report):
    commands = []

    def ran(command, **options):
        commands.append([str(part) for part in command])
        (path,) = (part for part in commands[-1] if part.startswith("--junitxml="))
        if report:
            Path(path.partition("=")[2]).write_text(report)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(matrix.subprocess, "run", ran)
    return commands


def test_the_table_counts_tests_and_names_those_that_failed(environment, monkeypatch, capsys):
    ends_with(monkeypatch, REPORT)
    assert matrix.main([]) == 1
    said = capsys.readouterr().out
    assert "| Python 3.12.1, torch 2.11.0 | 1 | 2 | 1 | 0 |" in said
    assert "py3.12-torch2.11-transformers5.17: tests.test_a::test_bad[1]" in said
    assert "tests.test_a::test_broken" in said


def test_the_status_is_0_where_tests_ran_and_none_failed(environment, monkeypatch):
    ends_with(monkeypatch, '<testsuites><testcase classname="a" name="b" /></testsuites>')
    assert matrix.main([]) == 0


@pytest.mark.parametrize("report", ["", "<testsuites></testsuites>"])
def test_an_environment_in_which_nothing_ran_has_failed(environment, monkeypatch, report):
    ends_with(monkeypatch, report)
    assert matrix.main([]) == 1


def test_an_environment_that_cannot_be_made_has_failed(environment, monkeypatch, capsys):
    def make(environment):
        raise OSError("Python 3.12 was not found")

    monkeypatch.setattr(matrix, "make", make)
    assert matrix.main([]) == 1
    assert "Python 3.12 was not found" in capsys.readouterr().out


def test_arguments_after_two_dashes_go_to_pytest(environment, monkeypatch):
    commands = ends_with(monkeypatch, REPORT)
    matrix.main(["py3.12", "--processes", "1", "--", "tests/storage", "-k", "grow"])
    assert commands[0][-3:] == ["tests/storage", "-k", "grow"]


def test_an_unknown_environment_is_refused_with_the_names_of_all():
    with pytest.raises(SystemExit, match=r"'py2.7'.*py3.13-torch2.14"):
        matrix.main(["py3.13", "py2.7"])


def test_an_environment_is_made_once_for_the_same_requirements(environment, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    packages = environment.folder / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    commands = []
    monkeypatch.setattr(matrix, "python", lambda version: sys.executable)
    monkeypatch.setattr(matrix.subprocess, "run", lambda *command, **_: commands.extend(command))
    matrix.make(environment)
    assert len(commands) == 2
    assert "torch==2.11.0" in commands[1]
    matrix.make(environment)
    assert len(commands) == 2
    matrix.make(environment._replace(requirements=("torch==2.11.1", "transformers==5.17.0")))
    assert "torch==2.11.1" in commands[-1]


def test_a_python_that_is_not_there_is_named():
    assert matrix.python(f"{sys.version_info.major}.{sys.version_info.minor}")
    with pytest.raises(OSError, match=r"Python 9\.9 was not found"):
        matrix.python("9.9")


def test_the_matrix_has_the_oldest_and_newest_releases():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = {environment.python for environment in matrix.ENVIRONMENTS}
    classifiers = {f"Programming Language :: Python :: {version}" for version in pythons}
    assert classifiers <= set(project["classifiers"])
    assert f">={min(pythons, key=Version)}" == project["requires-python"]
    installed: dict[str, set[Version]] = {}
    for environment in matrix.ENVIRONMENTS:
        for requirement in environment.requirements:
            name, _, version = requirement.partition("==")
            installed.setdefault(name, set()).add(Version(version))
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["transformers"], *extras["triton"]):
        oldest = Requirement(text)
        if oldest.specifier:
            (bound,) = oldest.specifier
            assert min(installed[oldest.name]).release[:2] == Version(bound.version).release[:2]
    from kvpager.integrations.huggingface.releases import NEWEST_TESTED

    assert max(installed["transformers"]).release[:2] == Version(NEWEST_TESTED).release
