import math

import pytest
import torch
from torch import nn

from models.layers import Blocks, Fused, compile_blocks, set_checkpointing, sincos_1d, sincos_2d, sincos_3d, vit_block


def test_sincos_1d_by_hand():
    table = sincos_1d(4, torch.tensor([0, 3]))
    frequencies = (1.0, 0.01)  # 10000 ** -(0/2), 10000 ** -(1/2)
    expected = [[0, 0, 1, 1], [f(3 * w) for f in (math.sin, math.cos) for w in frequencies]]
    torch.testing.assert_close(table, torch.tensor(expected))


def test_sincos_2d_has_w_first_and_3d_adds_time():
    space = sincos_2d(8, 2, 3)
    torch.testing.assert_close(space[1 * 3 + 2], torch.cat([sincos_1d(4, torch.tensor([x]))[0] for x in (2, 1)]))
    volume = sincos_3d(8, 4, 2, 3)
    torch.testing.assert_close(volume[3 * 6 + 5], space[5] + sincos_1d(8, torch.tensor([3]))[0])


@pytest.mark.parametrize("table", [lambda dim: sincos_1d(dim, torch.arange(2)), lambda dim: sincos_2d(dim, 2, 2)])
def test_odd_widths_are_errors(table):
    with pytest.raises(ValueError, match="width"):
        table(5)


def test_vit_block_states_its_choices():
    block = vit_block(8, 2, qkv_bias=False, eps=1e-5)
    assert block.norm1.eps == block.norm2.eps == 1e-5
    assert block.attn.qkv.bias is None and block.attn.proj.bias is not None
    assert isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"


def test_checkpointing_runs_blocks_again_in_backward_with_the_same_gradients():
    calls = []

    class Block(nn.Linear):
        def forward(self, x, scale, shift=0.0):
            calls.append(self)
            return super().forward(x).tanh() * scale + shift

    blocks = Blocks(Block(3, 3) for _ in range(2))
    gradients = []
    for enabled, times in ((False, 2), (True, 4)):
        set_checkpointing(nn.ModuleDict({"inside": blocks}), enabled)
        calls.clear()
        gradients.append(torch.autograd.grad(blocks(torch.ones(2, 3), 2.0, shift=1.0).sum(), blocks.parameters()))
        assert len(calls) == times
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert list(blocks.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_on_a_cpu_only_what_gains_there_is_compiled(capsys):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.gated, self.loss = Blocks([nn.Linear(2, 2)]), Blocks([nn.Linear(2, 2)]), Fused()
            self.gated.compiled_on_cpu = True

    def compiled(device):
        model = Model()  # may still be elsewhere, as train_ar.py's tokenizer is
        compile_blocks(torch.device(device), model)
        return [part._compiled_call_impl is not None for part in (model.vit[0], model.gated[0], model.loss)]

    assert compiled("cpu") == [False, True, True]
    assert compiled("cuda") == [True, True, True]
    assert not capsys.readouterr().out
    compile_blocks(torch.device("cpu"), Blocks([nn.Linear(2, 2)]))
    assert capsys.readouterr().out == "--compile has no effect: nothing of this model gains by it on a CPU\n"
