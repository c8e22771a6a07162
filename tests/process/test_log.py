"""A run's log goes on where its checkpoint was."""

from pathlib import Path

from smidgen.process.log import _open


def test_a_log_that_goes_on_ends_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"kept\nlost\n")
    with _open(path, kept=5) as log:
        assert log.tell() == 5
        log.write(b"more\n")
    assert path.read_bytes() == b"kept\nmore\n"
