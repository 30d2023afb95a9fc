"""Tags and log files of ranks: streams by themselves, and a real job of two."""

import io
import subprocess
import sys

import pytest

from homodistil.distributed.rank_log import HELD_CHARS, RankLog, Tagged
from homodistil.errors import UserError

TWO_STREAMS = """
import sys
from pathlib import Path
from homodistil.distributed.rank_log import keep_in, tag_lines
tag_lines(); tag_lines()
print("before"); print("to\\nthe other", file=sys.stderr)
keep_in(Path(sys.argv[1]))
print("after", flush=True)
"""


def _tagged(*writes: str) -> str:
    stream = io.StringIO()
    tagged = Tagged(stream, "[rank 1 far] ", RankLog())
    for text in writes:
        assert tagged.write(text) == len(text)
    return stream.getvalue()


def test_every_line_is_tagged_once():
    assert _tagged("a", "b\nc\n", "\n", "d") == "[rank 1 far] ab\n[rank 1 far] c\n\n[rank 1 far] d"


def test_a_bar_that_is_drawn_again_keeps_its_tag():
    assert _tagged("\r10%", "\r20%", "\n") == "\r[rank 1 far] 10%\r[rank 1 far] 20%\n"


def test_characters_that_only_python_takes_for_line_ends_stay_inside():
    assert _tagged("a\u2028b\x0bc\n") == "[rank 1 far] a\u2028b\x0bc\n"


def test_the_log_has_the_last_state_of_a_bar_and_is_bounded_before_there_is_a_file(tmp_path):
    log = RankLog()
    log.add("\r10%\r20%")
    log.add("\r30%\nnext\n")
    log.add("x" * (HELD_CHARS + 1) + "\n" + "lost\n")
    log.open(tmp_path / "logs" / "rank.txt")
    log.add("later\n")
    lines = (tmp_path / "logs" / "rank.txt").read_text().splitlines()
    assert lines[:2] == ["30%", "next"] and lines[-1] == "later" and "lost" not in lines


@pytest.mark.process
@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_tags_its_streams_and_keeps_what_it_said(rank, tmp_path):
    env = {"RANK": str(rank), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", TWO_STREAMS, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    is_tagged = [line.startswith(f"[rank {rank} ") for line in (done.stdout + done.stderr).splitlines()]
    assert is_tagged == [rank != 0] * 4
    kept = (tmp_path / f"rank-{rank:05d}.txt").read_text().splitlines()
    assert kept == ["before", "to", "the other", "after"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match="logs.*cannot be written"):
        RankLog().open(tmp_path / "logs" / "rank.txt")
