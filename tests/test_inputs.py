"""models/inputs.py: what users get wrong about the models' inputs is one clear line."""
import pytest
import torch
from helpers import tiny_larp
from test_hub import COORDTOK, SIT

from models.coordtok import CoordTok
from models.larp_ar import LARPGenerator
from models.sit import SiT
from models.triplane import Planes


@pytest.fixture(params=["coordtok", "larp"])
def tokenizer(request):
    return CoordTok(**COORDTOK).eval() if request.param == "coordtok" else tiny_larp(32, 8, 12)


@torch.no_grad()
def test_videos_are_floats_from_0_to_1(tokenizer):
    video = torch.rand(1, 3, 8, 32, 32)
    tokenizer.encode(video)
    tokenizer.encode(2 * video - 0.6)  # as resizing overshoots
    for wrong in (video.mul(255).byte(), video.long()):
        with pytest.raises(ValueError, match=r"of type (uint8|int64), expected floats in \[0, 1\]: give video.float"):
            tokenizer.encode(wrong)
    for wrong in (video * 255, 4 * video - 2):
        with pytest.raises(ValueError, match=r"the video's values are .* to .*, expected \[0, 1\]: divide by 255"):
            tokenizer.encode(wrong)
    with pytest.raises(ValueError, match="of type uint8"):
        tokenizer.train().encode(video.mul(255).byte())


@torch.no_grad()
def test_codes_are_of_the_codebook():
    tokenizer, codes = tiny_larp(32, 8, 12), torch.randint(64, (2, 12))
    tokenizer.decode(codes)
    for wrong in (codes + 64, codes - 64):
        with pytest.raises(ValueError, match="codes are .* to .*, expected 0 to 63: are they of another tokenizer"):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="codes are of type float32, expected long"):
        tokenizer.decode(codes.float())


    for wrong in (codes[:, :5], codes[0]):
        with pytest.raises(ValueError, match=r"codes are of shape \(.*\), expected \(B, 12\): give all codes"):
            tokenizer.decode(wrong)


@torch.no_grad()
def test_a_video_is_a_tensor_of_numbers(tokenizer):
    video = torch.rand(1, 3, 8, 32, 32)
    with pytest.raises(ValueError, match="the video must be a tensor, got ndarray: give torch.as_tensor of it"):
        tokenizer.encode(video.numpy())


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_a_video_is_of_the_weights_type(kind):
    """LARP's tokenizer converts it."""
    video = torch.rand(1, 3, 8, 32, 32).to(kind)
    tiny_larp(32, 8, 12).encode(video)
    tokenizer = CoordTok(**COORDTOK).eval()
    with pytest.raises(ValueError, match=r"of type float(64|16), but the model of float32: give video.to"):
        tokenizer.encode(video)
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer.encode(video.bfloat16())


@torch.no_grad()
def test_patch_indices_are_of_the_grid():
    tokenizer = CoordTok(**COORDTOK).eval()
    planes = tokenizer.encode(torch.rand(1, 3, 8, 32, 32))
    tokenizer.decode(planes, torch.tensor([[[7, 3, 3]]]))
    for wrong, name in ([8, 0, 0], "t"), ([0, 4, 0], "h"), ([0, 0, -1], "w"):
        with pytest.raises(ValueError, match=f"patch indices {name} are .*, expected 0 to"):
            tokenizer.decode(planes, torch.tensor([[wrong]]))


@torch.no_grad()
def test_labels_and_conditions_are_of_the_model():
    options = {"dim": 32, "n_layer": 1, "n_head": 2, "multiple_of": 8, "vocab_size": 64, "max_seq_len": 4}
    model = LARPGenerator(**options, num_classes=5).eval()
    model.generate(torch.tensor([-1, 4]))
    with pytest.raises(ValueError, match="labels must be a tensor, got list"):
        model.generate([0, 1])
    with pytest.raises(ValueError, match="labels are 0 to 5, expected negative for none, or 0 to 4"):
        model.generate(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="labels are of type float32"):
        model.generate(torch.tensor([0.0]))
    model = LARPGenerator(**options, frame_prediction=True, cls_token_num=5).eval()
    model.generate(model.frame_condition(torch.tensor([[0, 1, 2, 63]])))
    with pytest.raises(ValueError, match="codes of the frames given are .* to 65, expected 0 to 64"):
        model.generate(torch.tensor([[0, 1, 2, 65, 64]]))
    sit, planes = SiT(**SIT, num_classes=3).eval(), Planes(*(torch.randn(1, 4, 8, 8) for _ in range(3)))
    sit(planes, torch.tensor([0.5]), torch.tensor([2]))
    with pytest.raises(ValueError, match="labels are 3 to 3, expected 0 to 2"):
        sit(planes, torch.tensor([0.5]), torch.tensor([3]))


def test_on_a_device_no_value_is_read():
    """The meta device has none: a look at them would raise."""
    with torch.device("meta"):
        tokenizer = CoordTok(**COORDTOK).eval()
        planes = tokenizer.encode(torch.rand(1, 3, 8, 32, 32))
        assert tokenizer.decode(planes, torch.zeros(1, 2, 3, dtype=torch.long)).shape == (1, 2, 192)
