"""Crashes and damage: a `DiskStore` serves what was saved, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.disk_campaign import NUM_SLOTS, crashes
from tests.support.disk_damage import DAMAGE, damaged, flips
from tests.support.disk_faults import FAULTS
from tests.support.power_loss import power_losses

pytestmark = pytest.mark.slow


def test_killed_processes_leave_a_full_store_without_a_wrong_block(tmp_path: Path) -> None:
    *_, tally = crashes(tmp_path / "kv", kills=50, seed=1)
    assert tally.runs == 50
    assert (tally.wrong, tally.bad) == (0, 0)
    assert tally.served == tally.offered
    assert tally.least >= 0.9 * NUM_SLOTS


def test_a_power_loss_serves_no_wrong_block(tmp_path: Path) -> None:
    *_, tally = power_losses(tmp_path / "kv", losses=200, seed=6)
    assert tally.runs == 200
    assert tally.wrong == 0
    assert tally.served > 0.5 * tally.offered
    assert tally.bad > 0  # torn blocks were found
    assert tally.returned == 0  # dropped blocks


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_frames_are_not_checked(tmp_path: Path, fault: str) -> None:
    tallies = crashes(tmp_path / "kv", kills=40, seed=2, fault=fault, verify=False)
    assert any(tally.wrong for tally in tallies)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_serves_no_wrong_block(tmp_path: Path, fault: str) -> None:
    *_, tally = crashes(tmp_path / "kv", kills=6, seed=3, fault=fault)
    assert tally.wrong == 0


def test_every_flipped_bit_of_a_frame_or_a_block_is_refused(tmp_path: Path) -> None:
    results = list(flips(tmp_path / "kv", count=500, seed=4))
    assert results == [(True, True)] * 500


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_directory_serves_no_wrong_block(tmp_path: Path, kind: str) -> None:
    tally = damaged(tmp_path, kind, count=3, seed=5)
    assert tally.runs == 3
    assert tally.wrong == 0
