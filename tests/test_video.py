import errno
import gc
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import decord
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import data.video
from data.video import (
    FrameError,
    StorageError,
    VideoError,
    VideoInfo,
    probe,
    read_frames,
    resize_crop,
    to_bytes,
    to_video,
    write_video,
)


def moving_frames(num: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(num, height, width, 3) uint8; no two frames alike."""
    t, y, x = np.meshgrid(np.arange(num), np.arange(height), np.arange(width), indexing="ij")
    wave = [127 + 120 * np.sin((x * a + y * b) / 9 + t / 5) for a, b in ((1, 0), (0, 1), (1, 1))]
    return np.stack(wave, axis=-1).astype(np.uint8)


def encode(path: Path, frames: np.ndarray, codec: str, *options: str) -> Path:
    writer = imageio_ffmpeg.write_frames(
        str(path), frames.shape[2:0:-1], fps=25, codec=codec, quality=None, macro_block_size=1,
        output_params=list(options),
    )
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()
    return path


@pytest.fixture(scope="module")
def xvid(tmp_path_factory) -> Path:
    """60 frames as UCF-101 stores them: AVI, MPEG-4 with B-frames."""
    path = tmp_path_factory.mktemp("video") / "xvid.avi"
    return encode(path, moving_frames(60), "mpeg4", "-vtag", "xvid", "-bf", "2", "-g", "12")


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("b_frames.avi", "mpeg4", ["-vtag", "xvid", "-bf", "2"]),
    ("b_frames.mp4", "mpeg4", ["-bf", "2"]),
    ("open_gop.mp4", "libx264", ["-bf", "3", "-x264opts", "open_gop=1:scenecut=0:b-adapt=0"]),
    ("vp8.webm", "libvpx", ["-b:v", "300k", "-deadline", "realtime"]),
])
def test_windows_are_exact_wherever_they_start(tmp_path, name, codec, options):
    path = str(encode(tmp_path / name, moving_frames(60), codec, "-g", "12", *options))
    capture = cv2.VideoCapture(path)
    frames = torch.stack([torch.from_numpy(capture.read()[1][..., ::-1].copy()) for _ in range(60)])
    assert torch.equal(read_frames(path, range(60)), frames)
    for start in (1, 11, 12, 13, 14, 24, 26, 37, 57):
        assert torch.equal(read_frames(path, range(start, start + 3)), frames[start:start + 3]), start
    for indices in ([3, 25, 40, 59], [30, 7, 7]):
        assert torch.equal(read_frames(path, indices), frames[indices])


def ffmpeg(*arguments) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def shown(path: Path) -> torch.Tensor:
    """The frames that ffmpeg shows, (T, 48, 64, 3) uint8."""
    frames = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return torch.frombuffer(bytearray(frames), dtype=torch.uint8).view(-1, 48, 64, 3)


OPEN_GOP = ["libx264", "-bf", "3", "-g", "24", "-x264opts", "open_gop=1:scenecut=0:b-adapt=0"]


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("codec", [["libx264", "-bf", "3"], ["libx264", "-bf", "0", "-g", "25"], OPEN_GOP],
                         ids=["b_frames", "no_b_frames", "open_gop"])
def test_cuts_without_reencoding_have_the_frames_that_are_shown(tmp_path, codec, suffix):
    """Their packets begin at the keyframe before the cut; an edit list hides those before it."""
    whole = encode(tmp_path / f"whole{suffix}", moving_frames(90), *codec)
    hidden = 0
    for start in (0, 0.5, 0.53, 1.2, 1.234, 2.5):
        cut = tmp_path / f"cut{suffix}"
        ffmpeg("-ss", start, "-i", whole, "-t", 1, "-c", "copy", cut)
        frames = shown(cut)
        hidden += len(decord.VideoReader(str(cut))) - len(frames)
        assert probe(str(cut)).num_frames == len(frames), start
        assert torch.equal(read_frames(str(cut), range(len(frames))), frames), start
        last = len(frames) - 1
        assert torch.equal(read_frames(str(cut), [0, last]), frames[[0, last]]), start
        with pytest.raises(FrameError, match=f"it has {len(frames)} frames"):
            read_frames(str(cut), [len(frames)])
    assert hidden > 20, "packets, that were counted as frames once"


def test_no_frame_of_a_cut_is_a_repetition(tmp_path):
    """A cut at the B-frames before an open keyframe lacks what they refer to: decoders leave them out, so that the file
    has fewer frames than its packets say. Those that are there are right, and the end is an error."""
    whole, cut = encode(tmp_path / "whole.mp4", moving_frames(90), *OPEN_GOP), tmp_path / "cut.mp4"
    for start in (0.88, 0.9, 0.92):
        ffmpeg("-ss", start, "-i", whole, "-t", 1, "-c", "copy", cut)
        frames, counted = shown(cut), probe(str(cut)).num_frames
        assert counted > len(frames), "else it was cut at the wrong place"
        assert torch.equal(read_frames(str(cut), range(len(frames))), frames)
        with pytest.raises(FrameError):
            read_frames(str(cut), range(counted))


def test_avi_keeps_its_count(tmp_path, xvid):
    """Its packets have no times of their own."""
    ffmpeg("-ss", 1, "-i", xvid, "-c", "copy", tmp_path / "cut.avi")
    assert probe(str(tmp_path / "cut.avi")).num_frames == len(decord.VideoReader(str(tmp_path / "cut.avi"))) > 30


def test_real_files(clips):
    found = {name: probe(str(clips / name)) for name in (
        "nasa.mp4", "pancake.mkv", "video_90.mov", "unordered.mov", "v_CricketShot_g04_c01.gif")}
    assert found["nasa.mp4"] == VideoInfo(390, 270, 480, pytest.approx(29.97, abs=1e-3))  # the larger of two streams
    assert found["pancake.mkv"] == VideoInfo(310, 240, 426, pytest.approx(30))
    assert found["video_90.mov"][:3] == (3, 568, 320)  # stored 568 wide, marked as rotated
    assert found["unordered.mov"][:3] == (4, 50, 50)
    assert found["v_CricketShot_g04_c01.gif"] == VideoInfo(79, 224, 224, pytest.approx(25))
    assert read_frames(str(clips / "v_CricketShot_g04_c01.gif"), [0, 78]).float().std() > 10


def test_rotation_is_honoured(clips):
    path = str(clips / "video_90.mov")
    upright = torch.from_numpy(cv2.VideoCapture(path).read()[1][..., ::-1].copy())  # OpenCV turns it
    assert torch.equal(read_frames(path, [0])[0], upright)


def test_damaged_files_are_named_in_one_line(tmp_path, xvid, clips):
    video = xvid.read_bytes()
    (tmp_path / "empty.avi").touch()
    (tmp_path / "text.avi").write_text("not a video")
    write_video(tmp_path / "whole.mp4", torch.rand(3, 20, 32, 32))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:2000])
    scratched = bytearray(video)
    scratched[len(video) // 3:len(video) // 3 * 2] = bytes(len(video) // 3)
    (tmp_path / "scratched.avi").write_bytes(scratched)
    paths = [tmp_path / name for name in ("empty.avi", "text.avi", "cut.mp4", "scratched.avi", "missing.avi")]
    for path in [*paths, clips / "corrupted.mp4"]:
        with pytest.raises(VideoError) as error:
            read_frames(str(path), range(probe(str(path)).num_frames))
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_only_frames_in_the_file_count(tmp_path, xvid):
    video = bytearray(xvid.read_bytes())
    for place in (video.find(b"avih") + 8 + 16, video.find(b"strh") + 8 + 32):
        assert int.from_bytes(video[place:place + 4], "little") == 60
        video[place:place + 4] = (400).to_bytes(4, "little")
    (tmp_path / "boasting.avi").write_bytes(video)
    assert probe(str(tmp_path / "boasting.avi")).num_frames == 60
    (tmp_path / "truncated.avi").write_bytes(xvid.read_bytes()[:xvid.stat().st_size // 2])
    left = probe(str(tmp_path / "truncated.avi")).num_frames
    assert 10 < left < 50 and len(read_frames(str(tmp_path / "truncated.avi"), range(left))) == left
    with pytest.raises(FrameError, match="it has 60 frames"):
        read_frames(str(xvid), [60])


def test_one_frame(tmp_path):
    path = str(encode(tmp_path / "one.avi", moving_frames(1), "mpeg4"))
    assert probe(path).num_frames == 1 and read_frames(path, [0, 0]).shape == (2, 48, 64, 3)


def test_a_hanging_decoder_is_given_up(tmp_path):
    """A named pipe that nobody writes to blocks whoever opens it. Neither the call nor the process may hang."""
    os.mkfifo(tmp_path / "pipe.avi")
    code = f"from data.video import probe; probe({str(tmp_path / 'pipe.avi')!r}, timeout=0.2)"
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
                         timeout=60, check=False)
    assert "pipe.avi: the decoder was still busy after 0.2 s" in run.stderr, time.monotonic() - start


@pytest.mark.parametrize("name", ["nasa.mp4", "pancake.mkv"])
def test_transforms_match_the_released_ones(reference, clips, name, monkeypatch):
    case, expected = reference.case("transforms")
    frames = read_frames(str(clips / name), case["cases"][name]["frames"])
    size = case["cases"][name]["crop"]
    coordtok, larp = expected[f"{name}.coordtok"], expected[f"{name}.larp"].transpose(0, 1)[None].transpose(1, 2)
    assert (resize_crop(frames, size, "coordtok") / 255 - coordtok).abs().max() <= 1.001 / 255
    torch.testing.assert_close(to_video(frames[None], size, "larp", "cpu"), larp, atol=1e-3, rtol=0)
    monkeypatch.setattr(data.video, "_bicubic_8bit", data.video._bicubic_two_pass)  # the route of a GPU
    assert (resize_crop(frames, size, "coordtok") / 255 - coordtok).abs().max() <= 1.001 / 255


@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240), (63, 100), (40, 32)])
def test_both_bicubic_routes_agree(height, width, monkeypatch):
    frames = torch.randint(0, 256, (2, 3, height, width, 3), dtype=torch.uint8)
    one = resize_crop(frames, 32, "coordtok")
    monkeypatch.setattr(data.video, "_bicubic_8bit", data.video._bicubic_two_pass)
    monkeypatch.setattr(data.video, "CHUNK", 1)  # frame by frame
    two = resize_crop(frames, 32, "coordtok")
    assert one.shape == (2, 3, 32, 32, 3) and one.is_contiguous()
    assert (one.int() - two.int()).abs().max() <= 1


def test_crop_is_where_torchvision_crops():
    # 240x320 to 128x170: the offset is round(21.0); 63x101 to 32x51: round(9.5), half to even, is 10.
    for height, width, new_width, left in ((240, 320, 170, 21), (63, 101, 51, 10)):
        size = min(height, 128) if height == 240 else 32
        frames = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
        whole = torch.nn.functional.interpolate(
            frames.permute(0, 3, 1, 2), (size, new_width), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
        assert torch.equal(resize_crop(frames, size, "coordtok"), whole[:, :, left:left + size])


def test_batches_of_one_and_of_many_sizes():
    frames = torch.randint(0, 256, (2, 3, 40, 60, 3), dtype=torch.uint8)
    for rule in ("coordtok", "larp"):
        batch = to_video(frames, 32, rule, "cpu")
        assert batch.shape == (2, 3, 3, 32, 32) and batch.min() >= 0 and batch.max() <= 1
        assert torch.equal(to_video(list(frames), 32, rule, "cpu"), batch)
        # Resized before (by a loader) gives the same as resized here.
        assert torch.equal(to_video(resize_crop(frames, 32, rule), 32, rule, "cpu"), batch)


def test_written_video_is_whole(tmp_path):
    video = torch.rand(3, 1, 1, 1).expand(3, 5, 32, 34)
    for name, clip in (("even.mp4", video), ("odd.mp4", video[..., :31, :33])):
        write_video(tmp_path / name, clip)
        frames = read_frames(str(tmp_path / name), range(5))
        assert frames.shape == (5, *clip.shape[2:], 3)
        assert (frames / 255 - clip.permute(1, 2, 3, 0)).abs().max() < 0.03
    assert sorted(path.name for path in tmp_path.iterdir()) == ["even.mp4", "odd.mp4"]


def test_written_video_is_rounded(tmp_path):
    assert to_bytes(torch.tensor([-0.5, 127.6 / 255, 1.5])).tolist() == [0, 128, 255]
    video = torch.rand(3, 4, 16, 16)
    write_video(tmp_path / "float.mp4", video)
    write_video(tmp_path / "bytes.mp4", to_bytes(video))
    assert (tmp_path / "float.mp4").read_bytes() == (tmp_path / "bytes.mp4").read_bytes()


def test_a_video_that_cannot_be_written_whole_is_an_error(tmp_path):
    """Where the disk is full, say: here a file may have 16 KiB."""
    with pytest.raises(OSError, match="nowhere/a.mp4 cannot be written: .*No such file"):
        write_video(tmp_path / "nowhere" / "a.mp4", torch.rand(3, 4, 16, 16))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))
    try:
        with pytest.raises(OSError, match="a.mp4 cannot be written"):
            write_video(tmp_path / "a.mp4", torch.rand(3, 16, 64, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "a.mp4").exists()


def test_an_error_leaves_no_decoder_behind(tmp_path):
    """Collected in a process forked later, where its threads are missing, it would hang that."""
    write_video(tmp_path / "a.mp4", torch.rand(3, 4, 32, 32))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(VideoError):
            read_frames(str(tmp_path / "a.mp4"), [9])
        assert not any(type(thing) is decord.VideoReader for thing in gc.get_objects())
    finally:
        gc.enable()


# --- errors of the system, which say nothing of the file ---

@pytest.fixture
def video(tmp_path) -> Path:
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "videos" / f"{name}.mp4", torch.rand(3, 4, 32, 32))
    return tmp_path / "videos" / "a.mp4"


def test_a_disk_that_is_away_for_a_moment_is_waited_for(video):
    away = video.parent.with_name("away")
    video.parent.rename(away)
    back = threading.Timer(0.7, away.rename, [video.parent])
    back.start()
    assert len(read_frames(str(video), range(4))) == 4
    back.join()


@pytest.mark.parametrize("name", ["ENOENT", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "ETIMEDOUT"])
def test_what_the_system_refuses_is_not_damaged(video, monkeypatch, name):
    monkeypatch.setattr("data.video.PATIENCE", 0)
    number = getattr(errno, name)

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("data.video.open", refuse, raising=False)
    with pytest.raises(StorageError, match=f"a.mp4 cannot be read: {os.strerror(number)}, for 0 s.*and run again$"):
        probe(str(video))


def test_no_memory_is_not_damage(video, monkeypatch):
    monkeypatch.setattr("data.video.PATIENCE", 0)

    def refuse(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("data.video._read", refuse)
    with pytest.raises(StorageError, match="a.mp4 cannot be read: .*allocate memory"):
        read_frames(str(video), [0])


def test_the_decoder_must_refuse_twice(video, monkeypatch):
    """It may have met a bad moment of the disk, which it does not tell from a bad file."""
    real, refusals = decord.VideoReader, iter([True])

    def moody(*args, **options):
        if next(refusals, False):
            raise decord.DECORDError("its packets are broken")
        return real(*args, **options)

    monkeypatch.setattr(decord, "VideoReader", moody)
    assert probe(str(video)).num_frames == 4
    refusals = iter([True, True])
    with pytest.raises(VideoError, match="a.mp4: its packets are broken"):
        probe(str(video))


def test_a_slow_disk_is_told_from_a_slow_decoder(video, monkeypatch):
    monkeypatch.setattr("data.video.PATIENCE", 0)
    monkeypatch.setattr("data.video._open", lambda path: time.sleep(0.5))
    with pytest.raises(VideoError, match="a.mp4: the decoder was still busy after 0.1 s"):
        probe(str(video), 0.1)
    monkeypatch.setattr("data.video._read_through", lambda path: time.sleep(0.5))
    with pytest.raises(StorageError, match="a.mp4 cannot be read: it was not read in 0.1 s"):
        probe(str(video), 0.1)


def test_a_missing_file_among_others_is_missing(video):
    video.unlink()
    with pytest.raises(VideoError, match="a.mp4: No such file or directory"):
        probe(str(video))
    video.with_name("b.mp4").unlink()  # an empty folder may be a disk that is not mounted
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError):
        patch.setattr("data.video.PATIENCE", 0)
        probe(str(video))


# --- what decord refuses, and names of any kind ---

def decoded(path: Path, height: int, width: int) -> torch.Tensor:
    """All frames of a file as ffmpeg gives them."""
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, height, width, 3)


@pytest.mark.parametrize(("name", "height", "width", "codec"), [
    ("8.mp4", 16, 8, "libx264"), ("48.mp4", 48, 48, "libx264"), ("72.avi", 96, 72, "mpeg4"),
    ("av1.mp4", 48, 64, "libaom-av1"),
])
def test_what_decord_refuses_is_read_by_ffmpeg(tmp_path, name, height, width, codec):
    """Narrow videos, whose padded lines decord takes for another size; AV1, which it does not know."""
    options = ("-cpu-used", "8", "-b:v", "200k") if "av1" in codec else ("-bf", "2")
    path = encode(tmp_path / name, moving_frames(20, height, width), codec, "-g", "6", *options)
    expected = decoded(path, height, width)
    assert len(expected) == 20
    assert probe(str(path)) == VideoInfo(20, height, width, 25)
    assert torch.equal(read_frames(str(path), range(20)), expected)
    for indices in ([5, 6, 7, 8], [19], [3, 17, 9, 9]):
        assert torch.equal(read_frames(str(path), indices), expected[indices])
    with pytest.raises(FrameError, match="it has 20 frames"):
        read_frames(str(path), [20])


def test_ffmpeg_gives_the_frames_that_decord_gives(tmp_path, xvid):
    assert torch.equal(data.video._read_ffmpeg(str(xvid), np.arange(3, 40)), read_frames(str(xvid), range(3, 40)))


def test_damage_of_what_ffmpeg_reads_is_named(tmp_path):
    whole = encode(tmp_path / "whole.mp4", moving_frames(20), "libaom-av1", "-cpu-used", "8", "-g", "6").read_bytes()
    middle = whole.index(b"mdat") + 4 + len(whole[whole.index(b"mdat"):]) // 3
    (tmp_path / "scratched.mp4").write_bytes(whole[:middle] + bytes(200) + whole[middle + 200:])
    with pytest.raises(VideoError, match="scratched.mp4: neither decord nor ffmpeg can decode it$"):
        read_frames(str(tmp_path / "scratched.mp4"), [0])


@pytest.mark.parametrize("folder", [b"\xff\xfe", b"new\nline", b"tab\t", b"a+b", b"c:"])
def test_names_of_any_bytes(tmp_path, monkeypatch, folder):
    (tmp_path / os.fsdecode(folder)).mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (os.path.join(os.fsdecode(folder), "x.mp4"), str(tmp_path / os.fsdecode(folder) / "y.mp4")):
        write_video(path, torch.rand(3, 4, 64, 96))
        assert read_frames(path, range(4)).shape == (4, 64, 96, 3)
        Path(path).write_bytes(b"no video")
        with pytest.raises(VideoError) as error:
            read_frames(path, [0])
        assert str(error.value).isprintable()


def test_damaged_gifs_are_video_errors(tmp_path):
    frames = [Image.fromarray(frame) for frame in moving_frames(4)]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "whole.gif").read_bytes()
    for size in (6, 10, 14, 100, len(whole) // 2):
        (tmp_path / "cut.gif").write_bytes(whole[:size])
        with pytest.raises(VideoError, match="cut.gif: "):
            probe(str(tmp_path / "cut.gif"))
