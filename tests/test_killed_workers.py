"""Many workers on one study, some of which are killed at any moment: nothing is run twice, on any storage, and nothing is lost but what
was killed both times that it ran."""

import sys
import time

import killed_workers
import pytest
from killed_workers import assert_nothing_is_lost_or_double, search_with_kills

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")]


@pytest.fixture(autouse=True)
def importable():
    with killed_workers.importable():
        yield


@pytest.fixture(scope="module")
def server():
    with killed_workers.postgres() as running:
        yield running


def test_of_200_trials_none_is_lost_for_one_kill_and_none_is_run_twice_on_postgresql(tmp_path, server):
    ended, killed = search_with_kills(server.url, 200, tmp_path / "begun", kills=20, alike=False)
    assert killed >= 10 and set(ended) == {0, -9}
    interrupted, lost = assert_nothing_is_lost_or_double(server.url, 200, tmp_path / "begun")
    assert interrupted and 2 * len(lost) <= killed


@pytest.mark.parametrize("kind", ["sqlite:///study.db", "folder/study.log"])
def test_the_same_on_storages_that_are_files(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a relative path: the lock of a journal has to be found by it
    (tmp_path / "folder").mkdir()
    ended, killed = search_with_kills(kind, 30, tmp_path / "begun", kills=6)
    assert killed and set(ended) == {0, -9}
    _, lost = assert_nothing_is_lost_or_double(kind, 30, tmp_path / "begun")
    assert 2 * len(lost) <= killed


def test_a_server_that_is_away_for_seconds_costs_no_worker_and_no_trial(tmp_path, server):
    stops = ["fast", "immediate"]  # told to end, and killed

    def stop_and_start(begun):
        if stops and begun >= 40 - 15 * len(stops):
            server.stop(stops.pop(0))
            time.sleep(3)
            server.start()

    ended, _ = search_with_kills(server.url, 40, tmp_path / "begun", kills=0, meanwhile=stop_and_start, name="away", seconds=0.1)
    assert ended == [0] * 4 and not stops
    interrupted, lost = assert_nothing_is_lost_or_double(server.url, 40, tmp_path / "begun", name="away")
    begun = (tmp_path / "begun").read_text().splitlines()
    assert not interrupted and not lost and len(begun) == len(set(begun)) == 40
