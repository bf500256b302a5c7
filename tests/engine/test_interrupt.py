"""Ctrl-C: marked, acted on at a safe point, never swallowed."""

import gc
import os
import signal
import threading

import pytest

from expedit_d2.cli.workloads import load_workload
from expedit_d2.comparison import Comparison, Options, Store, compare, tune
from expedit_d2.comparison import session as session_module
from expedit_d2.comparison.tuning import Target
from expedit_d2.engine.interrupt import check_interrupt, interruptible
from expedit_d2.evaluation import Agreement
from expedit_d2.settings import Settings
from support.repository import VITDET, load_tool

pytestmark = pytest.mark.slow

QUIET = Options(timed_images=0, progress=False)
SETTINGS = {"half": Settings(alpha=1, ratio=0.5), "late": Settings(alpha=2, ratio=0.5)}


@pytest.fixture(autouse=True)
def listening():
    """A job that a shell starts in the background is born deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Closing:
    """As a data loader: runs code when it is collected, whose exceptions are only printed."""

    def __del__(self):
        press()


def test_ctrl_c_waits_for_a_safe_point():
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        press()
        steps.append("the step is finished")
        check_interrupt()
        steps.append("never")
    assert steps == ["the step is finished"]
    check_interrupt()  # taken once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_a_destructor_is_not_lost():
    with pytest.raises(KeyboardInterrupt), interruptible():
        Closing()
        gc.collect()
        check_interrupt()


def test_a_second_ctrl_c_is_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible():
        press()
        press()
        pytest.fail("ran on after the second one")
    check_interrupt()


def test_at_the_latest_at_the_end():
    with pytest.raises(KeyboardInterrupt), interruptible():
        press()


def test_the_outermost_counts():
    with pytest.raises(KeyboardInterrupt), interruptible():
        with interruptible():
            press()
        check_interrupt()


def test_other_threads_and_ignored_signals_are_left_alone():
    found = []

    def work():
        with interruptible():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            found.append(signal.getsignal(signal.SIGINT))
            press()
            check_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [signal.default_int_handler, signal.SIG_IGN]


def press_at(monkeypatch, run: int, image: int) -> None:
    """Ctrl-C at an image of a run, in a destructor."""
    seen = [0, 0]

    class Pressed(Agreement):
        def process(self, inputs, outputs):
            super().process(inputs, outputs)
            if not getattr(self, "begun", False):
                self.begun, seen[0], seen[1] = True, seen[0] + 1, 0
            seen[1] += 1
            if seen == [run, image]:
                Closing()

    monkeypatch.setattr(session_module, "Agreement", Pressed)


def test_comparing_ends_with_what_is_finished(confident_opts, monkeypatch):
    workload = load_workload(VITDET, confident_opts)
    press_at(monkeypatch, run=2, image=1)
    partial = compare(workload, SETTINGS, QUIET)
    assert [row.name for row in partial.rows] == ["plain"]
    assert partial.unfinished == ["half", "late"]


def test_tuning_ends_with_what_is_finished(confident_opts, monkeypatch, tmp_path):
    workload = load_workload(VITDET, confident_opts)
    with monkeypatch.context() as patch:
        press_at(patch, run=4, image=2)  # plain, plain and half in the sweep, late
        tuning = tune(workload, SETTINGS, Target(agreement=1), 3, 1, QUIET, Store(tmp_path))
    assert tuning.interrupted and tuning.best is None
    assert [row.name for row in tuning.sweep.rows] == ["plain", "half"]
    again = tune(workload, SETTINGS, Target(agreement=1), 3, 1, QUIET, Store(tmp_path))
    assert not again.interrupted and len(again.sweep.rows) == 3


def test_the_tool_says_so_and_keeps_the_table(confident_opts, monkeypatch, tmp_path, capsys):
    press_at(monkeypatch, run=2, image=1)
    options = ["--config-file", VITDET, "--timed", "0", "--output", str(tmp_path)]
    options += ["--setting", "half: alpha=1 ratio=0.5", "--", *confident_opts]
    with pytest.raises(SystemExit) as stopped:
        load_tool("compare").run(options)
    assert stopped.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err
    stored = Comparison.from_json((tmp_path / "vitdet.json").read_text())
    assert stored.unfinished == ["half"]


def test_ctrl_c_while_drawing_keeps_the_report(confident_opts, monkeypatch, tmp_path, capsys):
    tool = load_tool("compare")

    def draw(*args):
        press()
        check_interrupt()

    monkeypatch.setattr(tool, "draw_pictures", draw)
    options = ["--config-file", VITDET, "--timed", "0", "--first", "1", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        tool.run([*options, "--setting", "alpha=1 ratio=0.5", "--", *confident_opts])
    assert stopped.value.code == 130 and "Saved to" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "vitdet.html").read_text()
