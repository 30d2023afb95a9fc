"""Text that cannot be read, has no end, is something else, or leaves nothing to train on."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from case import Case, Workspace

SENTENCES = ["the quick brown fox jumps over the lazy dog", "five boxing wizards pack my box", "liquor jugs"]


def _prepare(write: Callable[[Path], object], name: str, *overrides: str) -> Callable[[Workspace], list[str]]:
    """The command that prepares what `write` leaves at the path `name` beside good text."""

    def build(workspace: Workspace) -> list[str]:
        write(workspace.text / name)
        return workspace.train(*overrides, script="prepare_data")

    return build


def _alone(write: Callable[[Path], object], name: str, *overrides: str) -> Callable[[Workspace], list[str]]:
    """The same of that path alone."""

    def build(workspace: Workspace) -> list[str]:
        path = workspace.folder / name
        write(path)
        return workspace.train(f"data.sources=[{path}]", *overrides, script="prepare_data")

    return build


def _sources(*overrides: str) -> Callable[[Workspace], list[str]]:
    return lambda workspace: workspace.train(*overrides, script="prepare_data")


def _lines(*lines: str | bytes) -> Callable[[Path], object]:
    """Good JSON lines, and these behind them: the first of these is line 3."""
    good = [json.dumps({"text": text}).encode() for text in SENTENCES[:2]]
    return lambda path: path.write_bytes(
        b"\n".join([*good, *(line.encode() if isinstance(line, str) else line for line in lines)]) + b"\n"
    )


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the system takes short paths only
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _huge_number(path: Path) -> None:
    _lines(f'{{"a": {"7" * 5000}}}')(path)


def _table(**columns) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def _not_utf8(path: Path) -> None:
    strings = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\3\0\0\0\5\0\0\0"), pa.py_buffer(b"foxd\xff"))
    pq.write_table(pa.table({"text": strings}), path)


def _cut_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": SENTENCES * 100}), path)
    path.write_bytes(path.read_bytes()[:-200])


def _damaged_page(path: Path) -> None:
    pq.write_table(pa.table({"text": [f"{text} {i}" for i in range(300) for text in SENTENCES]}), path)
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)


def _cut(compress: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    content = compress("\n".join(f"{text} {i}" for i in range(3000) for text in SENTENCES).encode())
    return lambda path: path.write_bytes(content[: len(content) // 2])


def _bomb(path: Path) -> None:
    """Half a gigabyte of NUL bytes in half a megabyte."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(32):
            file.write(bytes(16 << 20))


def _empty_beside_good(workspace: Workspace) -> list[str]:
    (workspace.folder / "empty.txt").write_text("\n \n")
    sources = f"data.sources=[{workspace.text},{workspace.folder / 'empty.txt'}]"
    return workspace.train(sources, script="prepare_data")


def _twice(workspace: Workspace) -> list[str]:
    return workspace.train(f"data.sources=[{workspace.text},{workspace.text}/]", script="prepare_data")


def _folder_and_file_in_it(workspace: Workspace) -> list[str]:
    return workspace.train(f"data.sources=[{workspace.text},{workspace.text / '3.txt'}]", script="prepare_data")


def _no_training_block(workspace: Workspace) -> list[str]:
    return workspace.train("data.weights=[0.001]", script="prepare_data")


def _cache_is_a_file(script: str) -> Callable[[Workspace], list[str]]:
    def build(workspace: Workspace) -> list[str]:
        workspace.cache.write_text("mine")
        return workspace.train(script=script)

    return build


def _blocks_too_few(workspace: Workspace) -> list[str]:
    return workspace.train("data.heldout_fraction=0.9", "train.global_batch_size=512")


def _named(name: str, *says: str, build: Callable[[Workspace], list[str]]) -> Case:
    return Case(f"text_{name}", build, says=says, ranks=1)


def _text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


CASES = [
    # No regular files.
    _named("fifo_in_folder", "data.sources", "pipe.txt", "named pipe", build=_prepare(os.mkfifo, "pipe.txt")),
    _named("fifo", "data.sources", "pipe.txt", "named pipe", build=_alone(os.mkfifo, "pipe.txt")),
    _named("fifo_json", "pipe.jsonl.gz", "named pipe", build=_prepare(os.mkfifo, "pipe.jsonl.gz")),
    _named("socket", "data.sources", "s.txt", "socket", build=_prepare(_socket, "s.txt")),
    _named("device", "zero.txt", "a device", build=_prepare(lambda path: path.symlink_to("/dev/zero"), "zero.txt")),
    _named("device_itself", "data.sources", "/dev/zero", build=_sources("data.sources=[/dev/zero]")),
    _named("circle_of_links", "loop.txt", "symbolic links", build=_prepare(_circle, "loop.txt")),
    _named("circle_alone", "loop.txt", "symbolic links", build=_alone(_circle, "loop.txt")),
    _named(
        "link_to_nothing",
        "gone.txt",
        "which does not exist",
        build=_prepare(lambda path: path.symlink_to("/nowhere/at/all"), "gone.txt"),
    ),
    # Names.
    _named("no_such_user", "data.sources", "no user of that name", build=_sources("data.sources=[~nosuchuser/text]")),
    _named(
        "name_of_5000_characters",
        "data.sources",
        "5005 characters",
        build=_sources(f"data.sources=[/{'x' * 5000}.txt]"),
    ),
    _named("nul_in_name", "data.sources", "U+0000", build=_sources('data.sources=["a\\0b.txt"]')),
    _named("empty_name", "data.sources", "found nothing", build=_sources("data.sources=['']")),
    _named("no_source", "data.sources", "empty list", build=_sources("data.sources=[]")),
    _named(
        "folder_without_text",
        "data.sources",
        "holds no",
        build=_alone(lambda path: (path.mkdir(), (path / "a.pdf").write_text("x")), "papers"),
    ),
    _named("twice", "data.sources", "name each text once", build=_twice),
    _named("folder_and_file_in_it", "3.txt", "name each text once", build=_folder_and_file_in_it),
    _named("one_of_two_is_empty", "empty.txt", "holds no text", build=_empty_beside_good),
    _named("name_is_not_utf8", "is not text", build=_prepare(_text(b"\0"), os.fsdecode(b"\xff.txt"))),
    # JSON lines.
    _named(
        "json_huge_number",
        "a.jsonl:3:",
        "thousands of digits",
        build=_alone(_huge_number, "a.jsonl"),
    ),
    _named("json_half_a_pair", "a.jsonl:3:", "ud800", build=_alone(_lines('{"text": "fox \\ud800 dog"}'), "a.jsonl")),
    _named("json_nested", "a.jsonl:3:", "too deeply", build=_alone(_lines("[" * 200_000), "a.jsonl")),
    _named("json_torn", "a.jsonl:3:", "not valid JSON", build=_alone(_lines('{"text": "fo'), "a.jsonl")),
    _named("json_list", "a.jsonl:3:", "expected an object", build=_alone(_lines("[1]"), "a.jsonl")),
    _named("json_no_column", "text_column", "a.jsonl:3", "'txt'", build=_alone(_lines('{"txt": "fox"}'), "a.jsonl")),
    _named("json_number", "text_column", "a.jsonl:3", "int", build=_alone(_lines('{"text": 7}'), "a.jsonl")),
    _named("json_nul", "a.jsonl", "NUL byte", "line 3", build=_alone(_lines(b'{"text": "\0"}'), "a.jsonl")),
    _named("json_latin1", "a.jsonl", "not UTF-8", "line 3", build=_alone(_lines(b'{"text": "\xe9"}'), "a.jsonl")),
    _named(
        "json_bom_of_utf16",
        "a.jsonl",
        "not text: a NUL byte",
        "line 1",
        build=_alone(_text('{"text": "fox"}\n'.encode("utf-16")), "a.jsonl"),
    ),
    _named(
        "json_in_workers",
        "a.jsonl:3:",
        "too deeply",
        build=_prepare(_lines("[" * 200_000), "a.jsonl", "data.workers=2", "data.shard_bytes=1000"),
    ),
    _named("empty_column_name", "data.text_column", "empty", build=_sources("data.text_column=")),
    # Parquet.
    _named("parquet_not_utf8", "a.parquet", "not UTF-8", build=_alone(_not_utf8, "a.parquet")),
    _named("parquet_cut", "a.parquet", "not a readable parquet", build=_alone(_cut_parquet, "a.parquet")),
    _named("parquet_damaged_page", "a.parquet", build=_alone(_damaged_page, "a.parquet")),
    _named("parquet_no_column", "'txt'", "found: txt", build=_alone(_table(txt=SENTENCES), "a.parquet")),
    _named("parquet_numbers", "text_column", "int64", build=_alone(_table(text=[1, 2, 3]), "a.parquet")),
    _named("parquet_lists", "text_column", "list", build=_alone(_table(text=[[1, 2, 3]]), "a.parquet")),
    _named("parquet_is_text", "a.parquet", "not a readable", build=_alone(_text("fox"), "a.parquet")),
    _named("parquet_empty", "a.parquet", build=_alone(_text(""), "a.parquet")),
    # Compressed.
    _named("gz_cut", "a.txt.gz", "cannot read", "gzip", build=_alone(_cut(gzip.compress), "a.txt.gz")),
    _named("bz2_cut", "a.txt.bz2", "cannot read", "bz2", build=_alone(_cut(bz2.compress), "a.txt.bz2")),
    _named("xz_cut", "a.txt.xz", "cannot read", "xz", build=_alone(_cut(lzma.compress), "a.txt.xz")),
    _named("gz_is_text", "a.txt.gz", "gzip", build=_alone(_text("the fox"), "a.txt.gz")),
    _named("bz2_is_text", "a.txt.bz2", "bz2", build=_alone(_text("the fox"), "a.txt.bz2")),
    _named("xz_is_text", "a.txt.xz", "xz", build=_alone(_text("the fox"), "a.txt.xz")),
    _named("zst_is_text", "a.txt.zst", build=_alone(_text("the fox"), "a.txt.zst")),
    _named("gz_bomb", "a.txt.gz", "NUL byte", build=_alone(_bomb, "a.txt.gz")),
    # Dumps.
    _named("xml_torn", "a.xml", "dump", build=_alone(_text("<mediawiki><page><title>a"), "a.xml")),
    _named("xml_is_text", "a.xml", "dump", build=_alone(_text("the fox"), "a.xml")),
    _named(
        "xml_encoding",
        "a.xml",
        "dump",
        build=_alone(_text('<?xml version="1.0" encoding="klingon"?><mediawiki/>'), "a.xml"),
    ),
    _named(
        "xml_encoding_of_many_bytes",
        "a.xml",
        "dump",
        build=_alone(_text('<?xml version="1.0" encoding="shift_jis"?><mediawiki/>'), "a.xml"),
    ),
    _named("xml_nested", "a.xml", build=_alone(_text("<a>" * 100_000), "a.xml")),
    _named(
        "xml_of_entities",
        "a.xml",
        "dump",
        build=_alone(
            _text(
                '<!DOCTYPE a [<!ENTITY e0 "fox">'
                + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
                + "]><a>&e11;</a>"
            ),
            "a.xml",
        ),
    ),
    # Nothing to train on, nowhere to put it.
    _named("heldout_takes_all", "data.heldout_fraction", "0.99", build=_sources("data.heldout_fraction=0.99")),
    _named("weights_leave_nothing", "data.weights", build=_no_training_block),
    _named("one_document", "at least 2", build=_alone(_text("the fox"), "a.txt")),
    _named("white_space", "holds no text", build=_alone(_text(" \n" * 1000), "a.txt")),
    _named("cache_is_a_file", "data.cache_dir", "cannot", build=_cache_is_a_file("prepare_data")),
    _named("cache_in_proc", "data.cache_dir", "cannot", build=_sources("data.cache_dir=/proc/cache")),
    Case("text_cache_is_a_file_for_a_run", _cache_is_a_file("train"), says=["data.cache_dir"]),
    Case("text_blocks_too_few", _blocks_too_few, says=["data.sources", "data.heldout_fraction", "held out"]),
    Case(
        "text_fifo_for_a_run",
        lambda w: (os.mkfifo(w.text / "pipe.txt"), w.train())[1],
        says=["data.sources", "pipe.txt", "named pipe"],
    ),
]
