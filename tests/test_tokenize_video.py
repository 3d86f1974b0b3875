"""scripts/tokenize_video.py with data/stream.py and data/tokens.py: files of any length, size and frame rate."""
import os
import re
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import LONG, ROOT, command, environment, tiny_larp
from PIL import Image
from safetensors.torch import load_file
from test_hub import COORDTOK

from common.cli import one_line_errors
from data.stream import blend, join_tiles, look, read_stream, starts, windows
from data.tokens import TokenReader, TokenWriter
from data.video import probe, read_frames, to_video
from models.coordtok import CoordTok
from scripts import tokenize_video
from training import checkpoint
from training.optim import Precision

CPU = torch.device("cpu")


def ffmpeg(*arguments) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def make(path, frames=40, size="48x36", rate="25", *more, audio=True):
    """A moving test picture with a tone."""
    seconds = frames / Fraction(rate)
    tone = ["-f", "lavfi", "-i", f"sine=440:duration={float(seconds)}"] if audio else []
    picture = f"testsrc2=size=96x72:rate={rate},scale={size.replace('x', ':')}"
    ffmpeg("-f", "lavfi", "-i", picture, *tone, "-frames:v", frames, "-c:v", "libx264", "-preset",
           "ultrafast", "-crf", "10", "-pix_fmt", "yuv444p", *more, path)
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    made = {"coordtok": CoordTok(**COORDTOK).eval(), "larp": tiny_larp(32, 8, 12)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {name: SimpleNamespace(model=model, path=folder / name) for name, model in made.items()}


def here(monkeypatch, *line) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenize_video.py", *map(str, line), "--device", "cpu"])
    tokenize_video.main()


@pytest.fixture
def convert(monkeypatch, tokenizers, tmp_path):
    """Encodes a video and decodes it; returns the file of tokens and the mp4."""
    def convert(video, kind, *more):
        tokens, out = tmp_path / f"{video.stem}.safetensors", tmp_path / f"{video.stem}_out.mp4"
        here(monkeypatch, "encode", video, "--tokenizer", tokenizers[kind].path, "--out", tokens, *more)
        here(monkeypatch, "decode", tokens, "--out", out)
        return tokens, out
    return convert


def codec_of(tokens, tokenizer) -> tuple:
    reader = TokenReader(tokens)
    about = reader.metadata
    codec = tokenize_video.Codec(tokenizer, *about["size"], about["fit"], about["overlap"], CPU,
                                 Precision("fp32", CPU), tile_overlap=about["tile_overlap"])
    return reader, codec


def test_windows_and_their_blend():
    """Every frame is shown; where windows agree the blend is the video, bit for bit but for rounding while it fades."""
    for length in (3, 8, 9, 14, 20, 21, 61):
        frames = [torch.full((2, 2, 3), i) for i in range(length)]
        cut = list(windows(iter(frames), 8, 2))
        assert [start for start, _ in cut] == starts(length, 8, 2)
        assert all(clip[:, 0, 0, 0].tolist() == list(range(start, start + len(clip))) for start, clip in cut)
        clips = [(start, clip.permute(3, 0, 1, 2).float()) for start, clip in cut]
        joined = torch.cat(list(blend(clips, 2)), dim=1)
        assert torch.allclose(joined[0, :, 0, 0], torch.arange(length).float(), atol=1e-5)
    steps = torch.cat(list(blend([(0, torch.zeros(1, 8, 1, 1)), (6, torch.ones(1, 8, 1, 1))], 2)), dim=1).flatten()
    torch.testing.assert_close(steps, torch.tensor([0.0] * 6 + [1 / 3, 2 / 3] + [1.0] * 6))
    picture = torch.rand(3, 2, 21, 30)
    tops, lefts = starts(21, 8, 2), starts(30, 8, 2)
    tiles = torch.stack([picture[:, :, top : top + 8, left : left + 8] for top in tops for left in lefts])
    torch.testing.assert_close(join_tiles(tiles, tops, lefts, 2), picture)


def test_token_files(tmp_path):
    with TokenWriter() as writer:
        rows = torch.randn(5, 2, 3)
        writer.append("a", rows[:2])
        writer.append("codes", torch.arange(6, dtype=torch.int32).view(2, 3))
        writer.append("a", rows[2:])
        (tmp_path / "sound").write_bytes(b"12345")
        writer.append_file("audio", tmp_path / "sound")
        writer.finish(tmp_path / "t.safetensors", {"fps": "25"})
    reader = TokenReader(tmp_path / "t.safetensors")
    assert torch.equal(reader.rows("a", 1, 3), rows[1:4]) and reader.metadata == {"fps": "25"}
    assert reader.copy_file("audio", tmp_path / "out") and (tmp_path / "out").read_bytes() == b"12345"
    assert torch.equal(load_file(tmp_path / "t.safetensors")["a"], rows)  # any reader of the format takes it
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:-9])
    for content in ((tmp_path / "t.safetensors").read_bytes(), b"", b"no tokens at all, but text"):
        (tmp_path / "t.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a token file: .*; give a file that"):
            TokenReader(tmp_path / "t.safetensors")


@pytest.mark.parametrize("kind", ["coordtok", "larp"])
@pytest.mark.parametrize("frames", [8, 4])
@torch.no_grad()
def test_one_window_is_the_plain_model(convert, tokenizers, tmp_path, kind, frames):
    """Bit for bit; a shorter clip too."""
    tokens, _ = convert(make(tmp_path / "v.mp4", frames), kind, "--fit", "crop")
    reader, codec = codec_of(tokens, tokenizers[kind].model)
    found = torch.cat(list(blend(tokenize_video.decoded(reader, codec), codec.overlap)), dim=1)
    rule = "coordtok" if kind == "coordtok" else "larp"
    video = to_video(read_frames(str(tmp_path / "v.mp4"), range(frames))[None], 32, rule, CPU)
    model = tokenizers[kind].model
    if kind == "coordtok":
        plain = model.render(model.encode(video), None if frames == 8 else range(frames))
    else:
        held = torch.cat([video, video[:, :, -1:].expand(-1, -1, 8 - frames, -1, -1)], dim=2)
        plain = model.decode(model.encode(held))[:, :, :frames]
    assert torch.equal(found, plain[0])


@pytest.mark.parametrize("kind", ["coordtok", "larp"])
@pytest.mark.parametrize("fit", ["crop", "resize", "tile"])
def test_lengths_sizes_rates_and_sound_are_kept(convert, tmp_path, kind, fit):
    """Odd sizes, a rate that is no whole number, and no whole number of windows."""
    _, out = convert(make(tmp_path / "v.mp4", 45, "51x37", "30000/1001"), kind, "--fit", fit)
    found, info = probe(str(out)), look(out)
    assert (found.num_frames, info.fps, info.audio) == (45, Fraction(30000, 1001), "aac")
    assert (found.width, found.height) == ((32, 32) if fit == "crop" else (51, 37))


def steps_at_borders(video: torch.Tensor, borders: set[int]) -> float:
    """Mean change from frame to frame at the borders, over that elsewhere. video: (3, T, H, W)."""
    steps = video.double().diff(dim=1).abs().mean((0, 2, 3))
    at = torch.tensor([i in borders for i in range(len(steps))])
    return float(steps[at].mean() / steps[~at].mean())


@pytest.mark.parametrize("kind", ["coordtok", "larp"])
@torch.no_grad()
def test_no_seam_between_windows(convert, tokenizers, tmp_path, kind):
    """The changes while one window fades into the next are no larger than inside windows; cut hard they are."""
    path = make(tmp_path / "v.mp4", 8 + 20 * 6, audio=False)
    ratios = []
    for overlap in (2, 0):
        tokens, _ = convert(path, kind, "--fit", "crop", "--overlap", overlap)
        reader, codec = codec_of(tokens, tokenizers[kind].model)
        video = torch.cat(list(blend(tokenize_video.decoded(reader, codec), codec.overlap)), dim=1)
        places = starts(128, 8, overlap)[1:]
        ratios.append(steps_at_borders(video, {start - 1 + i for start in places for i in range(overlap + 1)}))
    assert ratios[0] <= 1.05
    assert ratios[0] < ratios[1]


def test_turned_and_variable_videos_come_back_upright_and_in_time(convert, tmp_path):
    make(tmp_path / "wide.mp4", 20)
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "wide.mp4", "-c", "copy", tmp_path / "tall.mp4")
    _, out = convert(tmp_path / "tall.mp4", "larp")
    assert (probe(str(out)).height, probe(str(out)).width) == (48, 36)
    ffmpeg("-i", make(tmp_path / "steady.mp4", 60, audio=False), "-vf", "select=not(mod(n\\,7))+gt(n\\,30)",
           "-fps_mode", "vfr", tmp_path / "variable.mp4")
    info = look(tmp_path / "variable.mp4")
    assert not info.constant
    _, out = convert(tmp_path / "variable.mp4", "larp")
    assert abs(look(out).seconds - info.seconds) <= 1 / 25 + 0.01


def test_a_damaged_tail_is_cut(convert, tmp_path, capsys):
    path = make(tmp_path / "v.avi", 60, audio=False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    _, out = convert(path, "larp")
    assert re.search(r"v.avi is damaged after frame \d+ \(.*\): the rest is left out", capsys.readouterr().out)
    assert 8 < probe(str(out)).num_frames < 60


@pytest.fixture
def both(convert, monkeypatch, tokenizers, tmp_path):
    """The mp4 files of decode and of compare."""
    def both(video):
        here(monkeypatch, "compare", video, "--tokenizer", tokenizers["larp"].path, "--out", tmp_path / "compared.mp4")
        return convert(video, "larp")[1], tmp_path / "compared.mp4"
    return both


def sound_seconds(path) -> float:
    """How long the sound of a file lasts."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a", "-ac", "1", "-ar",
                           "8000", "-f", "s16le", "-"], check=True, capture_output=True)
    return len(done.stdout) / 16000


def test_sound_of_a_damaged_video_is_cut_with_it(both, tmp_path):
    path = make(tmp_path / "v.avi", 60)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    path.write_bytes(content)
    for out in both(path):
        assert 8 < probe(str(out)).num_frames < 50
        assert abs(sound_seconds(out) - probe(str(out)).num_frames / 25) < 0.06


@pytest.mark.parametrize("picture, sound", [(0, 1), (0.52, 0)])
def test_sound_keeps_its_offset_to_the_picture(both, tmp_path, picture, sound):
    """From starts in seconds. What is heard before the first picture is cut."""
    ffmpeg("-itsoffset", picture, "-f", "lavfi", "-i", "testsrc2=size=48x36:duration=2",
           "-itsoffset", sound, "-f", "lavfi", "-i", "sine=440:duration=2", "-c:a", "aac", tmp_path / "v.mkv")
    for out in both(tmp_path / "v.mkv"):
        assert abs(sound_seconds(out) - (1 if sound else 1.48)) < 0.06
        assert abs(look(out).offset - sound) < 0.03
    assert abs(look(tmp_path / "v.mkv").offset - (sound - picture)) < 0.03


def test_sound_that_mp4_does_not_hold_becomes_aac(both, tmp_path):
    for out in both(make(tmp_path / "v.mkv", 20, "48x36", "25", "-c:a", "wmav2")):
        assert look(out).audio == "aac"


def test_sound_that_cannot_be_added_is_left_out(convert, monkeypatch, capsys, tmp_path):
    """The pictures are not lost: here with the sound of a file that an older version encoded."""
    monkeypatch.setattr("data.stream.IN_MP4", {"wmav2"})
    finish = TokenWriter.finish
    monkeypatch.setattr(TokenWriter, "finish", lambda self, path, about: finish(
        self, path, {name: about[name] for name in about if name not in ("audio_offset", "sar")}))
    _, out = convert(make(tmp_path / "v.mkv", 20, "48x36", "25", "-c:a", "wmav2"), "larp")
    assert "the audio cannot be added" in capsys.readouterr().out and look(out).audio is None
    assert probe(str(out)).num_frames == 20 and len(list(tmp_path.glob(".*"))) == 0


def test_the_shape_of_pixels_is_kept(both, tmp_path):
    """Of a turned video as it is shown."""
    make(tmp_path / "v.mp4", 8, "48x36", "25", "-vf", "setsar=2/1")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "v.mp4", "-c", "copy", tmp_path / "tall.mp4")
    assert [look(out).sar for out in both(tmp_path / "v.mp4")] == ["2/1"] * 2
    assert [look(out).sar for out in both(tmp_path / "tall.mp4")] == ["1/2"] * 2


@pytest.mark.parametrize("kind", ["coordtok", "larp"])
@torch.no_grad()
def test_chosen_frames_alone(convert, tokenizers, monkeypatch, tmp_path, kind):
    """Of LARP as in the whole video; CoordTok decodes them by themselves, and no other patches."""
    tokens, _ = convert(make(tmp_path / "v.mp4", 29, audio=False), kind, "--fit", "crop", "--overlap", 2)
    model, points = tokenizers[kind].model, []
    if kind == "coordtok":
        decode = CoordTok.decode
        monkeypatch.setattr(CoordTok, "decode", lambda self, planes, index: points.append(index.shape[1]) or decode(
            self, planes, index))
    wanted = [0, 6, 7, 12, 20, 21, 22, 28]
    here(monkeypatch, "decode", tokens, "--out", tmp_path / "frames", "--frames", *wanted)
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [f"frame_{i:07d}.png" for i in wanted]
    reader, codec = codec_of(tokens, model)
    if kind == "coordtok":
        assert set(points) == {16}
        return
    video = tokenize_video.to_frames(torch.cat(list(blend(tokenize_video.decoded(reader, codec), 2)), dim=1))
    for i in wanted:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "frames" / f"frame_{i:07d}.png")), video[i].numpy()), i


def test_compare(monkeypatch, tokenizers, tmp_path, capsys):
    path = make(tmp_path / "v.mp4", 21)
    for kind, fit in (("larp", "resize"), ("coordtok", "tile"), ("larp", "crop")):
        here(monkeypatch, "compare", path, "--tokenizer", tokenizers[kind].path, "--fit", fit)
        out = tmp_path / "v_compared.mp4"
        found = probe(str(out))
        assert found.num_frames == 21 and look(out).audio
        assert (found.width, found.height) == ((64, 32) if fit == "crop" else (96, 36))
        lines = out.with_suffix(".csv").read_text().splitlines()
        assert lines[0] == "frame,psnr,ssim" and len(lines) == 22
        assert re.search(r"21 frames, psnr [\d.]+, ssim -?[\d.]+, [\d.]+ bits a pixel", capsys.readouterr().out)
    left = read_frames(str(out), [20])[0, :, :32].float() / 255
    given = to_video(read_frames(str(path), [20])[None], 32, "larp", CPU)[0, :, 0].permute(1, 2, 0)
    assert (left - given).abs().mean() < 0.06  # mp4 halves the colour planes


@pytest.mark.parametrize("kind", ["coordtok", "larp"])
@pytest.mark.parametrize("size", ["64x48", "176x144"])
def test_decoded_tiles_are_those_of_compare(convert, monkeypatch, tokenizers, tmp_path, kind, size):
    """Bit for bit, as they go to the writer. Clips and tiles of these tokenizers overlap by different numbers."""
    path, written = make(tmp_path / "v.mp4", 10, size, audio=False), []
    monkeypatch.setattr(tokenize_video.StreamWriter, "write", lambda self, frames: written.append(frames))
    monkeypatch.setattr(tokenize_video.StreamWriter, "__exit__", lambda *_: None)
    convert(path, kind, "--fit", "tile")
    found = torch.cat(written)
    written.clear()
    here(monkeypatch, "compare", path, "--tokenizer", tokenizers[kind].path, "--fit", "tile")
    assert torch.equal(found, torch.cat(written)[:, :, found.shape[2] :])


@pytest.mark.parametrize("kind", [pytest.param("coordtok", marks=LONG), "larp"])
def test_memory_does_not_grow_with_the_video(tokenizers, tmp_path, kind):
    """Ten times the frames, within 5 %: of encoding and of decoding."""
    peaks = {}
    for frames in (60, 600):
        video, tokens = make(tmp_path / f"{frames}.mp4", frames, "240x136", "30"), tmp_path / f"{frames}.safetensors"
        for action, line in (("encode", [video, "--tokenizer", tokenizers[kind].path, "--out", tokens]),
                             ("decode", [tokens, "--out", tmp_path / "out.mp4"])):
            process = subprocess.Popen(command("scripts/tokenize_video.py", action, *line, "--device", "cpu"), cwd=ROOT,
                                       env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0
            peaks.setdefault(action, []).append(usage.ru_maxrss)
    for short, long in peaks.values():
        assert long <= 1.05 * short


def test_mistakes_get_one_line(monkeypatch, capsys, tokenizers, tmp_path):
    path = make(tmp_path / "v.mp4", 8, audio=False)
    (tmp_path / "no.mp4").write_bytes(b"no video")
    ffmpeg("-f", "lavfi", "-i", "sine=440:duration=0.2", tmp_path / "tone.mp4")
    for line, message in (
        (["encode", path], "encode needs --tokenizer"),
        (["encode", tmp_path / "none.mp4", "--tokenizer", tokenizers["larp"].path], "none.mp4: no such file"),
        (["encode", tmp_path / "no.mp4", "--tokenizer", tokenizers["larp"].path], "ffmpeg finds no video in it"),
        (["encode", tmp_path / "tone.mp4", "--tokenizer", tokenizers["larp"].path],
         "tone.mp4: ffmpeg finds no video in it (it holds Audio: aac)"),
        (["encode", path, "--tokenizer", tokenizers["larp"].path, "--overlap", 5], "--overlap is 5, expected at most"),
        (["decode", path], "cannot be read as a token file"),
    ):
        monkeypatch.setattr(sys, "argv", ["tokenize_video.py", *map(str, line), "--device", "cpu"])
        with pytest.raises(SystemExit), one_line_errors():
            tokenize_video.main()
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("action, out, message", [
    ("encode", "v.mp4", "v.mp4 is the input, and would be overwritten: give --out another name"),
    ("encode", "link", "link is the input"),
    ("compare", "v.mp4", "v.mp4 is the input"),
    ("decode", "v.mp4", "v.mp4 is the input"),
    ("compare", "x.csv", "x.csv is to be an mp4 file: give a name that ends in .mp4"),
    ("decode", "x.avi", "x.avi is to be an mp4 file"),
    ("encode", ".", "is a folder, expected a file: give a name in it"),
    ("decode", ".", "is a folder, expected a file"),
    ("encode", "/proc/x/y.safetensors", "the folder /proc/x cannot be written to (No such file or directory)"),
    ("encode", "v.mp4/y.safetensors", "v.mp4 cannot be written to (File exists)"),
    ("frames", "v.mp4", "v.mp4 is a file, expected a folder for the frames"),
])
def test_out_is_looked_at_before_the_work(monkeypatch, capsys, tmp_path, action, out, message):
    """The input is never overwritten; nothing is read, so that no tokenizer is needed."""
    (tmp_path / "v.mp4").write_bytes(b"input")
    (tmp_path / "link").symlink_to("v.mp4")
    more = ["--frames", 0] if action == "frames" else []
    with pytest.raises(SystemExit), one_line_errors():
        here(monkeypatch, "decode" if more else action, tmp_path / "v.mp4", "--out", tmp_path / out, *more)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "v.mp4").read_bytes() == b"input"


def test_the_way_there_and_back_keeps_the_input(monkeypatch, tokenizers, tmp_path):
    """Without --out, too."""
    path = make(tmp_path / "v.mp4", 8, audio=False)
    content = path.read_bytes()
    here(monkeypatch, "encode", path, "--tokenizer", tokenizers["larp"].path)
    here(monkeypatch, "decode", tmp_path / "v.safetensors")
    assert path.read_bytes() == content and (tmp_path / "v_decoded.mp4").exists()


def test_decode_takes_fit_and_overlap_from_the_file(convert, monkeypatch, capsys, tmp_path):
    """A flag that differs is an error, and so is a quality that x264 lacks."""
    tokens, _ = convert(make(tmp_path / "v.mp4", 8, audio=False), "larp")
    for line, message in (
        (["--fit", "crop"], "--fit crop was given, but .*v.safetensors has resize: leave the flag out"),
        (["--overlap", 3], "--overlap 3 was given, but .*v.safetensors has 1: leave the flag out"),
        (["--crf", 52], r"--crf is 52, expected a number in \[0, 51\]"),
    ):
        with pytest.raises(SystemExit), one_line_errors():
            here(monkeypatch, "decode", tokens, *line)
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    here(monkeypatch, "decode", tokens, "--fit", "resize", "--overlap", 1)


def test_another_tokenizer_does_not_decode(convert, monkeypatch, tokenizers, tmp_path):
    tokens, _ = convert(make(tmp_path / "v.mp4", 8, audio=False), "larp")
    torch.manual_seed(1)
    CoordTok(**COORDTOK).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was encoded by a tokenizer of SHA-256 .* give --tokenizer"):
        here(monkeypatch, "decode", tokens, "--tokenizer", tmp_path / "other")


def test_frames_are_those_of_the_loader(tmp_path):
    path = make(tmp_path / "v.mp4", 12, audio=False)
    frames = torch.stack([frame.clone() for frame in read_stream(path, look(path))])
    assert torch.equal(frames, read_frames(str(path), range(12)))


def test_the_page_own_videos_runs(monkeypatch, tokenizers, tmp_path):
    """The commands of docs/own_videos.md on files and exports, with CoordTok; test_own_videos.py runs the others."""
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "own_videos.md").read_text(), re.DOTALL)
    make(tmp_path / "VIDEO.mp4", 21)
    monkeypatch.chdir(tmp_path)
    os.symlink(tokenizers["coordtok"].path, "TOKENIZER")
    os.symlink(tokenizers["coordtok"].path, "CHECKPOINT")
    scripts = {"scripts/tokenize_video.py": tokenize_video.main, "training.checkpoint": checkpoint.main}
    for language, content in blocks:
        if language == "python":
            exec(content, {"video": torch.rand(1, 3, 8, 32, 32)})
            continue
        for line in content.splitlines():
            words = line.removeprefix("python ").removeprefix("-m ").split()
            if words[0] in scripts:
                monkeypatch.setattr(sys, "argv", words)
                scripts[words[0]]()
    assert {"DECODED.mp4", "COMPARED.mp4", "COMPARED.csv", "EXPORTED", "COPY"} <= {p.name for p in tmp_path.iterdir()}
    assert len(list((tmp_path / "FRAMES").iterdir())) == 3
