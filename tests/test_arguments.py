import dataclasses
import re

import pytest
import torch

from models.coordtok import CoordTokConfig
from training.arguments import Parser, add_coordtok, coordtok_config, one_line_errors


def parse(*argv):
    parser = Parser("test")
    add_coordtok(parser)
    parser.add_argument("--path_type", default="Linear")
    return parser.parse_args(list(argv))


def test_dashes_and_underscores_are_alike():
    assert parse("--path-type", "GVP").path_type == "GVP"
    assert parse("--path-type=a-b").path_type == "a-b"


def test_unknown_and_abbreviated_flags_are_errors(capsys):
    for flag in ("--enc_embed_dimm", "--enc_embed"):
        with pytest.raises(SystemExit):
            parse(flag, "8")
    assert "unrecognized arguments" in capsys.readouterr().err


def test_file_then_environment_then_flags(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text("path_type: GVP\nimg_size: 32\n")
    assert parse("--config", str(config)).path_type == "GVP"
    monkeypatch.setenv("VT_PATH_TYPE", "VP")
    assert parse("--config", str(config)).path_type == "VP"
    assert parse("--config", str(config), "--path_type", "Linear").path_type == "Linear"
    config.write_text("path_typ: GVP\n")
    with pytest.raises(SystemExit):
        parse("--config", str(config))


def test_defaults_are_the_published_model():
    assert CoordTokConfig(**coordtok_config(parse())) == CoordTokConfig()


def test_a_checkpoint_carries_the_architecture():
    carried = dataclasses.asdict(CoordTokConfig(enc_num_layers=3, video_shape=(16, 64, 64)))
    assert coordtok_config(parse(), carried, "x.pt") == carried
    assert coordtok_config(parse("--enc_num_layers", "3", "--num_frames", "16"), carried, "x.pt") == carried
    with pytest.raises(ValueError, match="--enc_num_layers 4 was given, but x.pt has 3"):
        coordtok_config(parse("--enc_num_layers", "4"), carried, "x.pt")
    with pytest.raises(ValueError, match="--img_size 128 was given, but x.pt has 64"):
        coordtok_config(parse("--img_size", "128"), carried, "x.pt")


def test_errors_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback ...\nValueError: no video in x")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: no video in x\n"


@pytest.mark.parametrize(("error", "line"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nx"), "not enough memory: CUDA out of "),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory: .enforce fail. D"),
    (MemoryError("Unable to allocate 9 GiB"), "not enough memory: Unable to allocate 9 GiB: lower the batch size"),
])
def test_lack_of_memory_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    assert stopped.value.code == 1 and re.fullmatch(f"error: {line}.*\n", capsys.readouterr().err)


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "error: interrupted by Ctrl-C\n"
