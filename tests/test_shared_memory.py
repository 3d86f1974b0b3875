import os
from multiprocessing.reduction import ForkingPickler

import torch

from data.shared_memory import SharedMemoryPool, ship


def test_shared_memory_is_used_again_once_it_is_let_go_of():
    pool = SharedMemoryPool()

    def send(value: int, num: int = 5) -> torch.Tensor:
        parcel = pool.pack([torch.full((num,), value, dtype=torch.uint8)], alike=True)
        return ForkingPickler.loads(ForkingPickler.dumps(parcel))

    one, two = send(1), send(2)
    part = one[:, 3:]
    del one
    three = send(3)
    assert len(pool.pieces) == 3
    assert part.tolist() == [[1, 1]] and two.tolist() == [[2] * 5] and three.tolist() == [[3] * 5]
    del part, two
    four, five = send(4, 9), send(5)
    assert len(pool.pieces) == 3 and four.tolist() == [[4] * 9] and five.tolist() == [[5] * 5]
    waiting = [pool.pack([torch.full((5,), value)], alike=False) for value in (6, 7)]  # sent, and not received yet
    assert len(pool.pieces) == 5 and three.tolist() == [[3] * 5]
    assert [ForkingPickler.loads(ForkingPickler.dumps(parcel))[0][0] for parcel in waiting] == [6, 7]


def test_a_batch_of_different_sizes_takes_one_descriptor(monkeypatch):
    monkeypatch.setattr("data.shared_memory.POOL", SharedMemoryPool())
    clips = [torch.full((2, 3, 1 + i), i, dtype=torch.uint8) for i in range(50)]
    before = len(os.listdir("/proc/self/fd"))
    batch = ForkingPickler.loads(ForkingPickler.dumps(ship({"label": torch.tensor([1, 2])}, clips, alike=False)))
    assert len(os.listdir("/proc/self/fd")) <= before + 10  # the piece, the tensor's, and the server that hands it over
    assert all(map(torch.equal, batch["frames"], clips)) and batch["label"].tolist() == [1, 2]
