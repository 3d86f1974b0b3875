import copy
import dataclasses
import pickle

import pytest
import torch

from models.coordtok import CoordTok, CoordTokConfig, read_plane, released_padding
from models.layers import set_checkpointing
from models.patches import gather_patches, patchify, unpatchify
from models.triplane import Planes

TINY = {
    "video_shape": (8, 16, 24),
    "enc_embed_dim": 16,
    "enc_num_layers": 2,
    "enc_num_heads": 2,
    "enc_patch_size_xy": 8,
    "enc_patch_size_t": 4,
    "enc_patch_num_layers": 2,
    "latent_resolution_xy": 4,
    "latent_resolution_t": 6,
    "latent_n_features": 3,
    "latent_patch_size_xy": 2,
    "latent_patch_size_t": 3,
    "dec_embed_dim": 16,
    "dec_num_layers": 2,
    "dec_num_heads": 2,
    "dec_patch_size_xy": 8,
    "dec_patch_size_t": 2,
}


def tiny(**changes) -> CoordTok:
    return CoordTok(**{**TINY, **changes}).eval()


def clip(batch: int = 2, frames: int = 8) -> torch.Tensor:
    return torch.rand(batch, 3, frames, 16, 24)


def every_index(batch: int = 2) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(3)).expand(batch, -1, -1)


def close(first, second, atol=1e-5):
    for one, other in zip(first, second):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.fixture
def released(reference):
    """The reference case: model, video, expected tensors."""
    case, expected = reference.case("coordtok_tiny")
    config = {name: value for name, value in case["config"].items() if name != "lpips_loss_scale"}
    tok = CoordTok(**config, padding="released").eval()
    tok.load_state_dict(reference.state_dict(case["parameters"]))
    video = torch.tanh(reference.noise(case["input_tag"], (2, 16, 32, 32, 3)))
    return tok, ((video + 1) / 2).permute(0, 4, 1, 2, 3), expected


@torch.no_grad()
def test_reference_planes_patches_and_renders(released):
    tok, video, expected = released
    for n_frames in (16, 9):
        planes = tok.encode(video, torch.full((2,), n_frames))
        close(planes, [expected[f"planes_{name}.n{n_frames}"] for name in Planes._fields])
    planes = tok.encode(video)  # all frames are real
    index = expected["patch_index"]
    close([tok.decode(planes, index), tok(video, index)], [expected["patch_recon"]] * 2)
    close([gather_patches(2 * video - 1, index, 2, 8)], [expected["patch_target"]])
    for slices in (1, 4):
        render = tok.render(planes, slices=slices)[0]
        close([2 * render.permute(1, 2, 3, 0) - 1], [expected[f"video_recon.nslice{slices}"]])


@torch.no_grad()
def test_released_short_clip_equals_the_clip_with_released_padding(released):
    tok, video, _ = released
    n_frames = torch.tensor([9, 9])
    padded = released_padding(video, n_frames)
    assert (padded[:, :, 9:] == -1).all() and torch.equal(padded[:, :, :9], video[:, :, :9])
    close(tok.encode(video[:, :, :9]), tok.encode(padded, n_frames))


@torch.no_grad()
@pytest.mark.parametrize("n_frames", [(5, 3), (4, 1), (8, 0)])  # 5, 3 and 1 end inside a tubelet
def test_excluded_padding_changes_nothing(n_frames):
    tok, video, n_frames = tiny(), clip(), torch.tensor(n_frames)
    expected = tok.encode(video, n_frames)
    for content in (1.5, float("nan")):
        changed = video.clone()
        for one, real in zip(changed, n_frames):
            one[:, real:] = content
        close(tok.encode(changed, n_frames), expected, atol=0)
    changed = video.clone()
    changed[0, :, n_frames[0] - 1] += 0.4  # the last real frame does count
    assert (tok.encode(changed, n_frames).xy[0] - expected.xy[0]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3, 4, 6])
def test_excluded_short_clip_equals_the_clip_padded(frames):
    tok, video = tiny(), clip()
    close(tok.encode(video[:, :, :frames]), tok.encode(video, torch.tensor([frames, frames])))


@torch.no_grad()
@pytest.mark.parametrize("frames", [8, 5])
@pytest.mark.parametrize("padding", ["exclude", "released"])
def test_none_says_that_all_given_frames_are_real(padding, frames):
    tok, video = tiny(padding=padding), clip(frames=frames)
    close(tok.encode(video, torch.tensor([frames, 99])), tok.encode(video))


def test_read_plane_by_hand():
    plane = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])[None, ..., None]  # 2 rows, 3 columns
    row, column = torch.tensor([[0.0, 1.0, 0.25, 0.5]]), torch.tensor([[0.0, 1.0, 0.5, 0.75]])
    torch.testing.assert_close(read_plane(plane, row, column)[0, :, 0], torch.tensor([0.0, 12.0, 3.5, 6.5]))


@torch.no_grad()
def test_decode_takes_planes_of_any_resolution_and_a_grid_of_one():
    tok = tiny()
    planes = (torch.rand(2, 3, 5, 3), torch.rand(2, 7, 2, 3), torch.rand(2, 1, 4, 3))
    assert tok.decode(planes, every_index()).shape == (2, 24, 2 * 8 * 8 * 3)
    one = CoordTok(**{**TINY, "video_shape": (4, 8, 8), "dec_patch_size_t": 4})
    video = one.render(one.encode(torch.rand(1, 3, 4, 8, 8)))
    assert video.shape == (1, 3, 4, 8, 8) and video.isfinite().all()


@torch.no_grad()
def test_render_is_decode_in_frames():
    tok, index = tiny(), every_index()
    planes = tok.encode(clip())
    expected = (unpatchify(tok.decode(planes, index), (4, 2, 3), 2, 8) + 1) / 2
    close([tok.render(planes)], [expected])
    for slices, size in ((5, 5), (24, 1), (100, 1)):  # 24 patches: 5, 5, 5, 5, 4
        parts = [tok.decode(planes, part) for part in index.split(size, dim=1)]
        close([patchify(2 * tok.render(planes, slices=slices) - 1, 2, 8)], [torch.cat(parts, dim=1)])


@torch.no_grad()
def test_render_of_frames_decodes_the_patches_that_hold_them():
    tok, index = tiny(), every_index()
    planes = tok.encode(clip())
    index = index[:, (index[0, :, 0] == 1) | (index[0, :, 0] == 3)]  # frames 2, 3 and 6, 7
    decoded = (unpatchify(tok.decode(planes, index), (2, 2, 3), 2, 8) + 1) / 2
    close([tok.render(planes, frames=[7, 2, 6, 2])], [decoded[:, :, [3, 0, 2, 0]]])
    close([tok.render(planes, frames=range(8))], [tok.render(planes)], atol=0)
    # Where each time step is decoded by itself, frames come out as in the whole clip.
    close([tok.render(planes, frames=torch.tensor([5]))], [tok.render(planes, slices=4)[:, :, 5:6]])
    for frames in ([8], [-1], []):
        with pytest.raises(ValueError, match="frames are indices below 8"):
            tok.render(planes, frames=frames)


def test_forward_changes_nothing_it_was_given():
    for padding in ("exclude", "released"):
        given = clip(), every_index().contiguous(), torch.tensor([5, 8])
        kept = copy.deepcopy(given)
        tiny(padding=padding)(*given)
        assert all(map(torch.equal, given, kept))


def test_copies_are_equal_and_apart():
    tok, video, index = tiny(), clip(), every_index()
    expected = tok(video, index)
    for other in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok)), CoordTok(**dataclasses.asdict(tok.config))):
        other.load_state_dict(tok.state_dict())
        close([other(video, index)], [expected])
        torch.nn.init.zeros_(other.decoder.projector.weight)
    close([tok(video, index)], [expected], atol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    tok, video, index = tiny(), clip(), every_index()
    gradients = []
    for enabled in (False, True):
        set_checkpointing(tok, enabled)
        loss = tok(video, index, torch.tensor([5, 8])).square().sum()
        gradients.append(torch.autograd.grad(loss, tok.parameters()))  # fails if a parameter had no part
    close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["exclude", "released"])
def test_low_precision_stays_close(padding):
    tok, video, index, n_frames = tiny(padding=padding), clip(), every_index(), torch.tensor([5, 8])
    expected = tok(video, index, n_frames)
    with torch.autocast("cpu", torch.bfloat16):
        close([tok(video, index, n_frames).float()], [expected], atol=0.1)
        assert tok.render(tok.encode(video)).dtype == torch.float32
    tok, video = tok.bfloat16(), video.bfloat16()
    close([tok(video, index, n_frames).float()], [expected], atol=0.1)


def test_from_released(tmp_path):
    tok, video, index = tiny(padding="released"), clip(), every_index()
    state = {"module." + name: value for name, value in tok.state_dict().items()}
    path = tmp_path / "released.pth"
    torch.save({"epoch": 3, "model": {**state, "module.decoder.lpips_loss.lin0.model.1.weight": torch.ones(1)}}, path)
    loaded = CoordTok.from_released(path, **TINY).eval()
    assert loaded.config == tok.config
    close([loaded(video, index, torch.tensor([5, 8]))], [tok(video, index, torch.tensor([5, 8]))])
    assert CoordTok.from_released(path, **TINY, padding="exclude").config.padding == "exclude"

    for change, advice in [
        ({"latent_n_features": 4}, "check --latent_n_features$"),
        ({"enc_num_layers": 3}, r"encoder.transformer.layers.2.norm1.weight is missing.*--enc_num_layers"),
        ({"dec_num_layers": 1}, r"decoder.transformer.layers.1.norm1.weight is not expected.*--dec_num_layers"),
        ({"video_shape": (16, 16, 24)}, r"is \(1, 12, 16\) and not \(1, 24, 16\).*check .*--num_frames$"),
    ]:
        with pytest.raises(ValueError, match=advice) as error:
            CoordTok.from_released(path, **{**TINY, **change})
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    torch.save({"weights": state}, path)
    with pytest.raises(ValueError, match="no model in it but weights"):
        CoordTok.from_released(path, **TINY)


def test_initialisation():
    tok = tiny(enc_embed_dim=64, dec_embed_dim=64)
    for parameter, std in [
        (tok.encoder.encoder.pos_emb, 1),
        (tok.encoder.cross_pos_emb, 1),
        (tok.weight_tokens_yt, 1),
        (tok.decoder.transformer.pos_embed, 1 / 8),  # 1 / sqrt(dec_embed_dim)
    ]:
        assert parameter.std().item() == pytest.approx(std, rel=0.25)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"enc_patch_size_t": 3}, "num_frames 8 is not a multiple of enc_patch_size_t 3: change --num_frames or --enc"),
        ({"dec_patch_size_xy": 12}, "img_size 16 is not a multiple of dec_patch_size_xy 12"),
        ({"video_shape": [8, 16, 20]}, "img_size 20 is not a multiple of enc_patch_size_xy 8"),
        ({"latent_patch_size_t": 4}, "latent_resolution_t 6 is not a multiple of latent_patch_size_t 4"),
        ({"enc_num_heads": 5}, "enc_embed_dim 16 is not a multiple of enc_num_heads 5"),
        ({"dec_num_layers": 0}, "dec_num_layers is a whole number from 1 on, got 0"),
        ({"padding": "none"}, "padding is 'exclude' or 'released', got 'none'"),
        ({"video_shape": (8, 16)}, "video_shape is"),
    ],
)
def test_config_errors_name_the_flag(change, message):
    with pytest.raises(ValueError, match=message):
        CoordTokConfig(**{**TINY, **change})


def test_misspelt_keys_and_wrong_videos_are_errors():
    with pytest.raises(TypeError, match="enc_num_layer"):
        CoordTok(**TINY, enc_num_layer=1)
    for shape in ((1, 3, 9, 16, 24), (1, 3, 8, 16, 16), (1, 4, 8, 16, 24), (1, 3, 0, 16, 24)):
        with pytest.raises(ValueError, match="does not fit"):
            tiny().encode(torch.zeros(shape))
