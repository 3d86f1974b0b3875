"""Every reader of a file, and every kind of damage: one line with the path, what was found and what to do."""
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_larp

from common.errors import DamagedFile
from data.cache import ClipCache, RowCache
from data.clips import ClipDataset, Quarantine
from data.demo import DemoConfig, make_demo
from data.lists import VideoFile, list_csv, list_videos
from data.metadata import parse_name, read_annotations
from data.split_ucf import check_list
from models.larp_tokenizer import LARPTokenizer
from sampling.real_clips import video_lengths
from sampling.store import SampleStore, append_report
from training import checkpoint
from training.log import RunLog

VIDEO = "/videos/v_A_g09_c01.avi"


def rows(folder: Path) -> RowCache:
    return RowCache(folder, "rows", {}, 4, (3,), "float32", shard_rows=4)


def clips(folder: Path) -> ClipCache:
    return ClipCache(folder, {}, 2, 4)


def store(folder: Path) -> SampleStore:
    return SampleStore(folder, {"seed": 0}, 2)


def resume(path: Path) -> None:
    """As the training scripts go on from a checkpoint."""
    state = checkpoint.load(path)
    checkpoint.restore({"model": torch.nn.Linear(3, 2)}, state)
    assert state["config"]["dim"] == 3 and state["step"] == 1


def log(folder: Path, start: int) -> RunLog:
    return RunLog(folder, {}, start, 2, 1, "disabled")


# {reader: (write a good file under a folder, and name it; read it)}
def write_checkpoint(folder: Path) -> Path:
    return checkpoint.save(folder, 1, {"config": {"dim": 3}, "model": torch.nn.Linear(3, 2).state_dict()})


def write_rows(folder: Path) -> Path:
    rows(folder).write(0, np.ones((4, 3), np.float32))
    return rows(folder).paths()[0]


def write_clips(folder: Path) -> Path:
    clips(folder).write(0, [np.ones((2, 4, 4, 3), np.uint8), np.ones((1, 4, 4, 3), np.uint8)])
    return clips(folder).paths()[0]


def write_chunk(folder: Path) -> Path:
    store(folder).add([0, 1], torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8), [], label=torch.zeros(2))
    return next((folder / "chunks").glob("*.npz"))


def write_preview(folder: Path) -> Path:
    write_chunk(folder)
    return folder / "chunks" / "preview_00.npy"


def write_settings(folder: Path) -> Path:
    store(folder).open([0], False)
    return folder / "settings.json"


def write_metrics(folder: Path) -> Path:
    run = log(folder, 0)
    run.train(1, torch.device("cpu"), loss=1.0)
    run.close()
    return folder / "metrics.jsonl"


def write_report(folder: Path) -> Path:
    append_report(folder / "fvd_report.csv", {"num_samples": 2, "fvd": 1.5})
    return folder / "fvd_report.csv"


def write_text(name: str, text: str):
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def write_pretrained(name: str):
    def write(folder: Path) -> Path:
        tiny_larp(16, 4, 4).save_pretrained(folder)
        return folder / name

    return write


def write_demo(folder: Path) -> Path:
    (folder / "UCF-101").mkdir()
    return write_text("demo.json", json.dumps({"size": 1}))(folder / "UCF-101")


def read_demo(path: Path) -> None:
    with pytest.raises(FileExistsError, match="was made with other settings"):
        make_demo(path.parents[1], DemoConfig())


def read_lengths(path: Path) -> None:
    video_lengths(ClipDataset([VideoFile(VIDEO)], 1, 8, "larp"), path.parent)


def read_pretrained(path: Path) -> None:
    LARPTokenizer.from_pretrained(path.parent)


READERS = {
    "checkpoint": (write_checkpoint, resume),
    "config.json": (write_pretrained("config.json"), read_pretrained),
    "model.safetensors": (write_pretrained("model.safetensors"), read_pretrained),
    "rows": (write_rows, lambda path: rows(path.parents[1]).read(np.array([0]))),
    "clips": (write_clips, lambda path: clips(path.parents[1]).length(0)),
    "chunk": (write_chunk, lambda path: store(path.parents[1]).collect()),
    "preview": (write_preview, lambda path: store(path.parents[1]).previews()),
    "settings.json": (write_settings, lambda path: store(path.parent).open([0], False)),
    "lengths.json": (write_text("lengths.json", json.dumps({VIDEO: 5})), read_lengths),
    "metrics.jsonl": (write_metrics, lambda path: log(path.parent, 1).close()),
    "fvd_report.csv": (write_report, lambda path: append_report(path, {"num_samples": 1, "fvd": 2.5})),
    "list.csv": (write_text("list.csv", f"id,path,action,label\n0,{VIDEO},A,0\n"),
                 lambda path: list_csv(str(path), want_labels=True)),
    "list.txt": (lambda folder: write_text("list.txt", f"{write_text('x.avi', 'video')(folder)}\n")(folder),
                 lambda path: list_videos(str(path))),
    "annotations": (write_text("train.csv", "label,youtube_id,time_start,time_end,split\nA,x,0,10,train\n"),
                    lambda path: read_annotations([path])),
    "trainlist": (write_text("trainlist01.txt", "A/v_A_g09_c01.avi 1\n"),
                  lambda path: check_list(path, {Path(VIDEO): parse_name(VIDEO)}, 1)),
    "demo.json": (write_demo, read_demo),
}
# Where the rest of the file may be as good as the whole: a line cut short by a kill is dropped; a byte of a name or of
# values is another name or value to readers without checksums.
TAKES = {"empty": {"metrics.jsonl"}, "cut": {"metrics.jsonl", "fvd_report.csv"},
         "flipped": {"checkpoint", "model.safetensors", "clips", "list.csv"}}


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flipped(content: bytes) -> bytes:
    """All bits of one byte in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "cut": cut,
    "flipped": flipped,
    "a list": lambda content: b"[1, 2]\n",
    "a number": lambda content: b"5\n",
    "not UTF-8": lambda content: b"\xff\xfe{\x00}\x00\n\x00",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_named_in_one_line(tmp_path, reader, damage):
    write, read = READERS[reader]
    path = write(tmp_path)
    read(path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    text = None
    try:
        read(path)
    except (ValueError, OSError) as error:
        text = str(error)
    if text is None:
        assert reader in TAKES.get(damage, ())
        return
    assert text.startswith(str(path)) and "\n" not in text and not re.search("Errno|invalid literal|codec", text), text
    assert re.search("delete|mend|make it anew|give|fetch it again|choose|expected", text), text


def test_the_quarantine_takes_any_content(tmp_path):
    """It is a list of names, which may be of any bytes: lines that are none of a run's videos change nothing."""
    for damage in DAMAGE.values():
        (tmp_path / "bad.txt").write_bytes(damage(f"{VIDEO}\ta reason\n".encode()))
        quarantine = Quarantine(tmp_path / "bad.txt")
        assert "other.avi" not in quarantine
        quarantine.add("other.avi", "a reason")
        assert "other.avi" in Quarantine(tmp_path / "bad.txt")


@pytest.mark.parametrize(("content", "found"), [
    ({"model": {}}, "2 tensors do not fit this model: weight is missing, bias is missing"),
    ({"model": [1]}, "3 tensors do not fit this model"),
    ({"model": 5}, "TypeError"),
    ({"model": torch.nn.Linear(4, 2).state_dict()}, "weight is (2, 4) and not (2, 3)"),
    ({}, "has no 'model', but format, step, rng"),
    ({"model": torch.nn.Linear(3, 2).state_dict(), "config": {}}, "has no 'dim', but nothing"),
    ({"model": torch.nn.Linear(3, 2).state_dict(), "config": [1]}, "its config is a list"),
])
def test_checkpoints_of_something_else(tmp_path, content, found):
    path = checkpoint.save(tmp_path, 1, content)
    with pytest.raises(DamagedFile, match=re.escape(found)) as error:
        resume(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_what_is_restored_must_fit(tmp_path):
    state = checkpoint.load(checkpoint.save(tmp_path, 1, {"optimizer": {"state": {}}, "scaler": 5}))
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    for name, part in {"optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu")}.items():
        with pytest.raises(DamagedFile, match=rf"step_0000001.pt cannot be read as .* its {name} does not fit"):
            checkpoint.restore({name: part}, state)


@pytest.mark.parametrize("value", ["1,024", "a"])
def test_a_table_saved_by_a_spreadsheet(tmp_path, value):
    path = write_report(tmp_path)
    with open(path, "a", newline="") as file:
        csv.writer(file).writerow([value, "2.5"])
    with pytest.raises(DamagedFile, match=rf"fvd_report.csv cannot be read as a table .*{value}.*: mend it|mend it"):
        append_report(path, {"num_samples": 1, "fvd": 2.5})
