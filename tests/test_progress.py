"""Progress with and without a terminal."""

import io

from sif_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    progress = Progress("sft", total=4, start=1, stream=stream)
    for _ in range(3):
        progress.advance(loss=0.5)
    progress.close()
    assert "sft: 100%" in stream.getvalue()
    assert "4/4" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()


def test_a_log_file_gets_whole_lines_now_and_then_and_the_last():
    stream = io.StringIO()
    progress = Progress("grpo", total=3, stream=stream, line_every_s=3600.0)
    for _ in range(3):
        progress.advance(reward=1.25)
    progress.close()
    assert stream.getvalue() == "grpo: 3/3  ETA 00:00  reward 1.25\n"


def test_the_eta_is_the_mean_step_time_times_the_steps_left(monkeypatch):
    clock = iter([100.0, 104.0, 108.0])
    monkeypatch.setattr("sif_jax.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress("sft", total=30, start=10, stream=stream, line_every_s=1.0)
    progress.advance()
    progress.advance()
    assert stream.getvalue().splitlines() == ["sft: 11/30  ETA 01:16", "sft: 12/30  ETA 01:12"]
