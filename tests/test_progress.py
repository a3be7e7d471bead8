"""Progress in a log: lines, no carriage returns."""

from ds4jax import terminal


def test_progress_in_a_log_is_lines(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    with terminal.meter(4 << 20, "loading", "B") as bar:
        bar.update(1 << 20)
        bar.set_postfix_str("well")
        bar.update(3 << 20)
    lines = "loading: 1.0 of 4.0 MiB\nloading: 4.0 of 4.0 MiB, well\n"
    assert capsys.readouterr() == ("", lines)
    with terminal.meter(3, "reading", "token", delay=9):
        pass
    assert list(terminal.counted([1, 2], terminal.meter(2, "reading", "chunk"))) == [1, 2]
    assert capsys.readouterr().err == "reading: 1 of 2 chunks\nreading: 2 of 2 chunks\n"
