from multiprocessing.reduction import ForkingPickler

import torch

from data.shipping import Shelf


def test_shared_memory_is_used_again_once_it_is_let_go_of():
    shelf = Shelf()

    def send(value: int, num: int = 5) -> torch.Tensor:
        parcel = shelf.pack([torch.full((num,), value, dtype=torch.uint8)], (1, num))
        return ForkingPickler.loads(ForkingPickler.dumps(parcel))

    one, two = send(1), send(2)
    part = one[:, 3:]
    del one
    three = send(3)
    assert len(shelf.pieces) == 3
    assert part.tolist() == [[1, 1]] and two.tolist() == [[2] * 5] and three.tolist() == [[3] * 5]
    del part, two
    four, five = send(4, 9), send(5)
    assert len(shelf.pieces) == 3 and four.tolist() == [[4] * 9] and five.tolist() == [[5] * 5]
    waiting = [shelf.pack([torch.full((5,), value)], (5,)) for value in (6, 7)]  # sent, and not received yet
    assert len(shelf.pieces) == 5 and three.tolist() == [[3] * 5]
    assert [ForkingPickler.loads(ForkingPickler.dumps(parcel))[0] for parcel in waiting] == [6, 7]
