"""Tests of the one bar of a call: its phases, the time left, and that it moves while nothing is counted."""

import threading
import time

import pytest

from stride_lightning.runtime import progress
from stride_lightning.runtime.progress import announce, call, counting, expect, on_one_bar, track


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(progress, "BEAT", 1000.0)
    return clock


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(progress, "BEAT", 0.01)


def left():
    return progress._current.get().left()


def test_quick_calls_show_nothing(capsys):
    with call():
        assert list(track(range(3), "Quick")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_all_phases_stand_on_one_bar_that_is_gone_at_the_end(fast, capsys):
    with call():
        for phase in ("Reading", "Scores"):
            for _ in track(range(4), phase):
                time.sleep(0.05)
        assert progress._current.get() is not None
    shown = capsys.readouterr().err
    assert "\n" not in shown.strip("\r\n ")
    assert "Reading" in shown
    assert "Scores" in shown
    assert progress._current.get() is None
    assert shown.split("\r")[-1].strip() == ""


def test_a_bar_moves_while_nothing_is_counted(fast, capsys):
    """The one item of a phase takes all its time."""
    with counting(1, "Eigenvectors"):
        time.sleep(0.3)
    assert capsys.readouterr().err.count("Eigenvectors") > 5


def test_time_left_by_the_work_of_phases_to_come(clock):
    with call():
        with counting(2, "Reading") as bar:
            bar.update(2)
            assert left() is None  # what else will come is not known
        expect("Fitting", items=4, work=3.0)
        expect("Scores", items=10, work=1.0)
        assert left() is None  # nor how fast it will be
        with counting(4, "Fitting") as bar:
            clock.now += 6
            bar.update(1)
            assert left() == pytest.approx(3 * 6 + 10 * 2)
            clock.now += 1.5
            assert left() == pytest.approx(3 * 6 + 10 * 2 - 1.5)
            clock.now += 18 - 1.5
            bar.update(3)
            assert left() == pytest.approx(10 * 2)
        with counting(10, "Scores") as bar:
            clock.now += 5
            bar.update(1)
            assert left() == pytest.approx(9 * 5)  # by its own pace from now on


def test_preparations_in_the_first_item_are_not_expected_again(clock):
    with counting(10, "Retraining") as bar:
        clock.now += 30
        bar.update(1)
        clock.now += 2
        bar.update(1)
        assert left() == pytest.approx(8 * 2)


def test_phases_that_run_several_times(clock):
    with call():
        expect("Scores", items=6)
        for part in range(3):
            with counting(2, "Scores") as bar:
                clock.now += 4
                bar.update(2)
                assert left() == pytest.approx(2 * (4 - 2 * part))


def test_what_was_done_before_takes_no_time(clock):
    """As parts that an interrupted run left."""
    with counting(10, "Retraining") as bar:
        bar.skip(6)
        clock.now += 3
        bar.update(1)
        assert left() == pytest.approx(9)


def test_of_unknown_numbers_no_time_is_told(clock):
    with counting(0, "Building the index") as bar:
        clock.now += 1
        bar.update(5)
        assert left() is None


def test_phases_inside_a_phase_belong_to_it(clock):
    with counting(2, "Self-influence") as outer:
        with counting(100, "Queries") as inner:
            clock.now += 5
            inner.update(100)
        outer.update(1)
        assert left() == pytest.approx(5)


def test_threads_share_a_phase():
    with counting(800, "Retraining") as bar:
        threads = [threading.Thread(target=lambda: [bar.update(1) for _ in range(100)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert left() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_bar_goes_when_something_fails(error, fast, capsys):
    def fail():
        with call(), counting(3, "Scores"):
            time.sleep(0.05)
            raise error

    before = threading.active_count()
    with pytest.raises(error):
        fail()
    assert progress._current.get() is None
    assert threading.active_count() == before


@pytest.mark.parametrize("quiet", ["asked for", "another rank"])
def test_no_bar(quiet, fast, capsys, monkeypatch):
    if quiet == "another rank":
        monkeypatch.setattr(progress, "rank", lambda: 1)
    show = quiet != "asked for"
    with call(show=show), counting(1, "Scores", show=show):
        time.sleep(0.05)
    announce("Long work.", show=show)
    assert capsys.readouterr().err == ""


def test_functions_on_one_bar(clock):
    @on_one_bar
    def work(*, show_progress=True):
        """Its own words."""
        return progress._current.get()

    assert work.__doc__ == "Its own words."
    assert work(show_progress=False) is None
    assert work() is not None
