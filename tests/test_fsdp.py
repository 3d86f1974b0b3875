"""train_ar.py --fsdp in several processes, and sharded checkpoints, at a tiny size."""
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import logged, losses, mistake, run, run_here, tiny_larp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import train_ar
from common import distributed
from models import sharded as sharded_files
from models.larp_ar import LARPGenerator
from training import checkpoint, fsdp
from training.load import load_larp_ar

STEPS, CODES, CODEBOOK = 4, 12, 64
SIZES = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 16}
TINY = (
    "--dim 32 --n_layer 2 --n_head 2 --multiple_of 16 --token_dropout_p 0 --resid_dropout_p 0 --ffn_dropout_p 0 "
    f"--num_iters {STEPS} --warmup_epoch 0 --batch_size 4 --num_workers 0 --log_every 1 --precision fp32 --device cpu "
    "--cache_codes 1 --ema_decays 0.9 --clip_grad_max_norm 0.05 --eval_every 2 --num_val 3 --val_batch_size 1 "
    "--num_samples 2 --save_every 1 --keep_checkpoints 4 --exp_name run"
).split()


@pytest.fixture(scope="module")
def arguments(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_larp(input_size=32, frame_num=8, bottleneck_token_num=CODES, codebook_size=CODEBOOK).save_pretrained(folder)

    def make(save_dir, *flags):
        return [*TINY, "--tokenizer", folder, "--data_root", data, "--video_name", "UCF-101_train",
                "--cache_dir", folder / "cache", "--save_dir", save_dir, *flags]

    return make


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory) -> Path:
    """A run in one process, unsharded."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, train_ar, *arguments(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def sharded(arguments, plain, tmp_path_factory) -> Path:
    """The same in four processes; `plain` has filled the cache."""
    folder = tmp_path_factory.mktemp("sharded")
    run("train_ar.py", *arguments(folder, "--fsdp"), processes=4)
    return folder / "run"


def check_losses(found: Path, expected: Path, steps: set[int]) -> None:
    """Training and validation, of the average too."""
    for kind in ("train", "val", "val_ema_0.9"):
        wanted = {step: loss for step, loss in losses(expected, kind).items() if step in steps}
        assert wanted and {step: losses(found, kind)[step] for step in wanted} == pytest.approx(wanted, abs=1e-5)


def test_four_processes_train_as_one_unsharded(plain, sharded):
    check_losses(sharded, plain, {1, 2, 3, 4})
    assert losses(plain)[4] != pytest.approx(losses(plain)[1], abs=1e-3), "they have learned something"
    assert {path.name for path in (sharded / "samples").iterdir()} >= {"step_0000004.png"}
    files = {path.name for path in (sharded / "checkpoints" / "step_0000004").iterdir()}
    assert files == {".metadata", "state.pt", *(f"__{rank}_0.distcp" for rank in range(4))}


def test_two_processes_train_as_one_unsharded(arguments, plain, tmp_path):
    """Gradients are added up over micro-batches, layers recomputed."""
    run("train_ar.py", *arguments(tmp_path, "--fsdp", "--accum_iter", 2, "--gradient_checkpointing"), processes=2)
    check_losses(tmp_path / "run", plain, {1, 2, 3, 4})


@pytest.mark.parametrize("processes", [2, 1])
def test_a_run_of_four_goes_on_in_fewer(arguments, sharded, monkeypatch, tmp_path, processes):
    """From step 2, whose successors are gone or cut short; the losses are those of the run that went on."""
    shutil.copytree(sharded, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(folder / "step_0000004")
    share = folder / "step_0000003" / "__1_0.distcp"
    share.write_bytes(share.read_bytes()[:-100])
    flags = arguments(tmp_path, "--fsdp", "--resume")
    if processes == 1:  # without torchrun
        with pytest.warns(UserWarning, match="step_0000003 cannot be read as a checkpoint: __1_0.distcp is missing"):
            run_here(monkeypatch, train_ar, *flags)
    else:
        run("train_ar.py", *flags, processes=processes)
    assert logged(tmp_path / "run", "train").keys() == {1, 2, 3, 4}
    check_losses(tmp_path / "run", sharded, {3, 4})
    assert checkpoint.load(folder)["step"] == 4


def test_a_sharded_run_is_read_and_exported_whole(plain, sharded, tmp_path):
    for version in ("sd", "ema_0.9"):
        ours, theirs = load_larp_ar(str(sharded), version), load_larp_ar(str(plain), version)
        assert ours[1:] == theirs[1:]
        weights = ours.model.state_dict()
        torch.testing.assert_close(weights, theirs.model.state_dict(), rtol=0, atol=1e-4)
        checkpoint.export(checkpoint.load(sharded / "checkpoints" / "step_0000004"), tmp_path / version, version)
        exported = LARPGenerator.from_pretrained(tmp_path / version)
        assert exported.config == theirs.model.config
        assert all(torch.equal(value, weights[name]) for name, value in exported.state_dict().items())


def test_mistakes_get_one_line(arguments, plain, sharded, monkeypatch, capsys, tmp_path):
    def error(*flags):
        return mistake(monkeypatch, capsys, train_ar, *arguments(*flags))

    assert "--precision fp16 needs its loss scaled" in error(tmp_path, "--fsdp", "--precision", "fp16")
    assert "was saved with --fsdp: continue it in the same way" in error(sharded.parent, "--resume")
    assert "was saved without --fsdp: continue it in the same way" in error(plain.parent, "--resume", "--fsdp")
    assert "already holds step_0000004: continue it" in error(sharded.parent, "--fsdp")
    lacking = error(sharded.parent, "--resume", "--fsdp", "--ema_decays", 0.5)
    assert "step_0000004 has no ema/0.5/abs_pe, one of" in lacking


@pytest.fixture
def alone():
    """A process group of one."""
    distributed.setup("cpu", group=True)
    yield
    distributed.teardown()


def tiny_generator() -> LARPGenerator:
    torch.manual_seed(0)
    generator = LARPGenerator(**SIZES, vocab_size=CODEBOOK, max_seq_len=CODES, use_fixed_pe=True)
    torch.nn.init.normal_(generator.output.weight)
    return generator.eval()


def test_whole_is_what_was_sharded(alone):
    generator, original = tiny_generator(), tiny_generator()
    fsdp.shard(generator, torch.device("cpu"), "bf16")
    whole = fsdp.unsharded(generator)
    assert fsdp.unsharded(original) is original
    assert type(whole) is LARPGenerator and not any(p.requires_grad for p in whole.parameters())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in original.state_dict().items())
    labels = torch.tensor([0, 1])
    assert torch.equal(whole.generate(labels, seeds=[0, 1]), original.generate(labels, seeds=[0, 1]))


def test_a_kill_while_writing_leaves_the_old_checkpoint(alone, monkeypatch, tmp_path):
    generator, original = tiny_generator(), tiny_generator()
    fsdp.shard(generator, torch.device("cpu"), "fp32")
    state = {"kind": "larp_ar", "config": {}, "model": generator.state_dict()}
    checkpoint.save(tmp_path, 1, state)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, state)
    assert (tmp_path / "step_0000002.partial").exists()
    found = checkpoint.find(tmp_path, "auto", "larp_ar")
    assert found["step"] == 1
    weights = checkpoint.select_weights(found)
    assert all(torch.equal(value, weights[name]) for name, value in original.state_dict().items())
    for step in (3, 3, 4):  # the same one again, as after going on from an older one
        checkpoint.save(tmp_path, step, state, keep=2)
        if step == 3:
            checkpoint.mark_best(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"best", "step_0000003", "step_0000004"}
    assert checkpoint.load(tmp_path / "best")["step"] == 3


class Opens:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("place", ["alone", "planner", "tensor", "bytes"])
def test_an_index_runs_no_code(alone, monkeypatch, tmp_path, place):
    generator = tiny_generator()
    fsdp.shard(generator, torch.device("cpu"), "fp32")
    path, marker = checkpoint.save(tmp_path, 1, {"config": {}, "model": generator.state_dict()}), tmp_path / "marker"
    evil = index = pickle.loads((path / ".metadata").read_bytes())
    if place == "alone":
        evil = Opens(marker)
    elif place == "planner":
        index.planner_data = Opens(marker)
    elif place == "tensor":
        index.state_dict_metadata["model/abs_pe"] = Opens(marker)
    else:  # torch unpickles such an entry with whatever it names
        index.state_dict_metadata["model/abs_pe"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(evil))
    named = "BytesStorageMetadata" if place == "bytes" else "io.open"
    with pytest.raises(ValueError, match=f"{named}, which no checkpoint of this project holds: do not use this folder"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match=named):
        sharded_files.read_whole(path, "model/")
    with pytest.raises(ValueError, match=named):
        fsdp.fill({"shards": path}, {"model": generator.state_dict()})
    assert not marker.exists()


def test_a_damaged_index_is_named(alone, tmp_path):
    generator = tiny_generator()
    fsdp.shard(generator, torch.device("cpu"), "fp32")
    path = checkpoint.save(tmp_path, 1, {"config": {}, "model": generator.state_dict()})
    whole = (path / ".metadata").read_bytes()
    for content in (b"", whole[:1000], b"not a pickle", pickle.dumps([1, 2])):
        (path / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"step_0000001 cannot be read as a checkpoint: its index .* is dam"):
            checkpoint.load(path)


def test_a_flipped_byte_of_a_shard_is_found(alone, tmp_path):
    generator = tiny_generator()
    fsdp.shard(generator, torch.device("cpu"), "fp32")
    path = checkpoint.save(tmp_path, 1, {"config": {}, "model": generator.state_dict()})
    weight = generator.output.weight.full_tensor().detach()
    share = path / "__0_0.distcp"
    content = bytearray(share.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 5] ^= 4
    share.write_bytes(content)
    with pytest.raises(ValueError, match="step_0000001 cannot be read.*__0_0.distcp is damaged: ") as error:
        checkpoint.select_weights(checkpoint.load(path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="__0_0.distcp is damaged: .* is not what was written"):
        fsdp.fill({"shards": path}, {"model": generator.state_dict()})


def test_bf16_is_that_of_autocast(alone):
    """Sharded, the same products round to bfloat16 and no others: only the norms' weights do in addition."""
    codes, labels = torch.randint(CODEBOOK, (2, CODES)), torch.tensor([0, 1])
    generator, original = tiny_generator(), tiny_generator()
    fsdp.shard(generator, torch.device("cpu"), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator(codes, labels), original(codes, labels))
