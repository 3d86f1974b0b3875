import errno
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, dataset, equal

from data.clips import ClipKey, Quarantine
from data.loader import GlobalBatchSampler, collate, make_loader


def test_larp_frames_from_the_worker_are_exact(folder):
    shipped = collate([dataset(folder, rule="larp")[ClipKey(0, 2, 0)]])["frames"]
    native = collate([dataset(folder, rule="larp", resize="device")[ClipKey(0, 2, 0)]])["frames"]
    from data.video import to_video
    assert torch.equal(to_video(shipped, 16, "larp", "cpu"), to_video(native, 16, "larp", "cpu"))


def test_batches(folder):
    data = dataset(folder, resize="device", points=("patches", 5, (8, 2, 2), 1))
    mixed = collate([data[ClipKey(i, i)] for i in range(3)])
    assert [clip.shape for clip in mixed["frames"]] == [(8, 32, 32, 3), (8, 32, 32, 3), (8, 32, 40, 3)]
    alike = collate([data[ClipKey(i, i)] for i in range(2)])
    assert alike["frames"].shape == (2, 8, 32, 32, 3) and alike["index"].shape == (2, 5, 3)
    assert alike["n_frames"].tolist() == [8, 8] and alike["label"].dtype == torch.long and alike["skipped"] == []


@pytest.mark.parametrize("order", ["replacement", "epoch"])
def test_the_global_batch_is_the_same_however_it_is_shared(order):
    def batches(world_size: int, accum: int, start: int = 0) -> list[list[ClipKey]]:
        ranks = [list(GlobalBatchSampler(30, 8, 10, rank, world_size, accum, start_step=start, order=order))
                 for rank in range(world_size)]
        assert {len(keys) for keys in ranks} == {(10 - start) * accum}
        return [sum((keys for rank in ranks for keys in rank[step * accum:(step + 1) * accum]), [])
                for step in range(10 - start)]

    whole = batches(1, 1)
    assert [key.position for batch in whole for key in batch] == list(range(80))
    assert batches(2, 1) == batches(1, 4) == batches(2, 2) == batches(4, 2) == whole
    assert batches(2, 2, start=7) == whole[7:]


def test_epochs_are_permutations():
    sampler = GlobalBatchSampler(11, 4, 4, order="epoch")
    assert sampler.steps_per_epoch == 2
    index = [key.index for keys in sampler for key in keys]
    assert len(set(index[:8])) == len(set(index[8:])) == 8 and index[:8] != index[8:]
    assert index != [key.index for keys in GlobalBatchSampler(11, 4, 4, seed=1, order="epoch") for key in keys]


def test_batches_that_cannot_be_shared_are_errors():
    with pytest.raises(ValueError, match="give a multiple of 6"):
        GlobalBatchSampler(30, 8, 10, world_size=3, accum=2)
    with pytest.raises(ValueError, match="lower the batch size"):
        GlobalBatchSampler(3, 8, 10, order="epoch")


@pytest.mark.parametrize("options", [{}, {"rule": "larp"}, {"resize": "device"}])
def test_workers_change_nothing_and_leave_the_global_generator_alone(damaged, tmp_path, options):
    """However many of their batches are kept."""
    def batches(workers: int) -> list[dict]:
        quarantine = Quarantine(tmp_path / f"{workers}.txt")
        data = dataset(damaged, points=("patches", 6, (8, 2, 2), 1), quarantine=quarantine, **options)
        return list(make_loader(data, GlobalBatchSampler(5, 4, 8), workers))

    state = torch.get_rng_state()
    for one, two in zip(batches(0), batches(2), strict=True):
        assert type(one["frames"]) is type(two["frames"])
        frames = [list(batch.pop("frames")) for batch in (one, two)]
        assert all(map(torch.equal, *frames)) and equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_unlike_clips_need_few_descriptors(folder):
    """As shipped for the device to resize; each clip had three descriptors, and the loader hung at the limit."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from data.clips import ClipDataset
from data.lists import list_folder
from data.loader import GlobalBatchSampler, make_loader
clips = ClipDataset(list_folder({str(folder)!r}), 8, 16, "coordtok", resize="device")
print(sum(len(batch["frames"]) for batch in make_loader(clips, GlobalBatchSampler(3, 48, 4), 2)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{48 * 4}\n", done.stderr


def test_a_batch_that_cannot_be_sent_is_an_error(folder, monkeypatch):
    """It was one of a thread that nobody listens to, and the batch was waited for for ever."""

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("data.shared_memory.DupFd", refuse)
    with pytest.raises(OSError, match="a batch cannot be handed over in shared memory: Too many open files: lower"):
        next(iter(make_loader(dataset(folder), [[ClipKey(0)]], 1)))


def test_workers_that_cannot_start_are_one_line(folder, monkeypatch):
    def refuse(*_, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)  # as a full /dev/shm does
    with pytest.raises(OSError, match="1 loader workers cannot start: No space left on device: .*df /dev/shm"):
        iter(make_loader(dataset(folder), [[ClipKey(0)]], 1))


def test_the_limit_of_open_files_is_raised():
    code = """
import resource
from data.loader import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 500))
raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(500, 500)\n", done.stderr


def test_ctrl_c_while_workers_start_leaves_nothing_half_made(folder):
    """What torch says of a half-made loader would follow the one line."""
    code = f"""
import os, signal, threading, time
import torch
from data import loader
from data.clips import ClipDataset, ClipKey
from data.lists import list_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this behind it
threading.Thread(target=time.sleep, args=(5,), daemon=True).start()  # may be the one that gets the signal
half_made = torch.utils.data.dataloader._BaseDataLoaderIter
real = half_made.__init__
half_made.__init__ = lambda self, of: (os.kill(os.getpid(), signal.SIGINT), real(self, of))[1]
files = list_folder({str(folder)!r})
try:
    iter(loader.make_loader(ClipDataset(files, 8, 16, "coordtok"), [[ClipKey(0)]], 1))
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "interrupted\n" and done.stderr == ""
