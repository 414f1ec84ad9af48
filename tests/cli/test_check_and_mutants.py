"""`kvpager check` and `kvpager mutants`."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from kvpager.cli.app import app
from kvpager.testing import simulator
from kvpager.testing.histories import Failure


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments), prog_name="kvpager")


def test_check_prints_the_number_of_operations() -> None:
    result = call("check", "--operations", "5100", "--seed", "7", "--processes", "1")
    assert result.exit_code == 0
    assert "5,100 operations from 2 seeds, 0 failed" in result.output


def test_check_fails_if_a_property_is_violated(monkeypatch: pytest.MonkeyPatch) -> None:
    def violate(*arguments, **options):
        return Failure("blocks add up", "they do not", 0)

    monkeypatch.setattr(simulator, "_drive", violate)
    result = call("check", "--operations", "100", "--processes", "1")
    assert result.exit_code == 1
    assert "blocks add up: they do not" in result.output
    assert "1 failed" in result.output


@pytest.mark.parametrize("count", ["x", "0", "1.5", "1e30", "-3", "nan"])
def test_a_bad_count_is_refused(count: str) -> None:
    result = call("check", f"--operations={count}")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"kvpager: --operations={count}: not a ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("kvpager.blocks.fences", "release a block with an unfinished copy", 3),
        ("kvpager.storage.tiers.keyed", "offer a key whose slot has other bytes", 12),
    ],
)
def test_mutants_shows_what_killed_each(module: str, name: str, count: int) -> None:
    result = call("mutants", "--only", module, "--processes", "2")
    assert result.exit_code == 0
    assert name in result.output
    assert f"{count} of {count} killed" in result.output


def test_mutants_of_no_such_name_are_refused() -> None:
    result = call("mutants", "--only", "nothing of the kind")
    assert result.exit_code == 2
    assert "no mutant has this in its name or module" in result.output
