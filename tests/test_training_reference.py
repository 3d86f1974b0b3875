"""The entry scripts train as the released trainers' own loops did: the cases of tests/reference/training, whose
README says what each ran. The scripts run whole, with the cases' clips, draws and weights instead of their own."""
import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers import logged, run_here

import models.configs
import models.prior
import models.quantizer
import train_ar
import train_coordtok
import train_larp_tokenizer
import train_sit
from data.lists import VideoFile
from models.larp_tokenizer import LARPTokenizer
from models.triplane import Planes
from training import adversary, checkpoint, setup

TOLERANCE = 5e-6  # of losses and weights


class Case:
    """A case, with the rules that its clips and draws follow, and a folder to run a script in."""

    def __init__(self, reference, monkeypatch, folder: Path, name: str):
        home = reference.folder / "training"
        for path in (home, reference.folder):
            monkeypatch.syspath_prepend(path)
        self.rules, self.fill = (importlib.import_module(module) for module in ("rules", "fill"))
        self.told, self.tensors = reference.case(f"training/{name}")
        self.tag, self.batch, self.steps = (self.told[key] for key in ("tag", "batch", "steps"))
        self.num_classes = self.rules.GEN["num_classes"]
        self.files = [VideoFile(f"clip{k}", k % self.num_classes) for k in range(self.told["videos"])]
        self.monkeypatch, self.folder, self.home = monkeypatch, folder, home

    def flags(self, values: dict) -> list:
        return [word for name, value in values.items() for word in (f"--{name}", value)]

    def start_filled(self, *kinds: type) -> None:
        """Models of these classes start from the weights of fill.py."""
        for kind in kinds:
            def filled_init(model, *args, init=kind.__init__, **options):
                init(model, *args, **options)
                self.fill.fill_(model)

            self.monkeypatch.setattr(kind, "__init__", filled_init)

    def first_step_file(self) -> Path:
        """A CoordTok as the authors release it."""
        shapes = json.loads((self.home / "coordtok_shapes.json").read_text())
        weights = {f"module.{name}": self.fill.filled(name, shape) for name, shape in shapes.items()}
        torch.save({"epoch": 0, "model": weights}, self.folder / "first.pth")
        return self.folder / "first.pth"

    def vgg_file(self) -> Path:
        torch.save(self.rules.vgg_state(), self.folder / "vgg.pth")
        return self.folder / "vgg.pth"

    def clips(self, positions: list[int], videos: list[int], num_frames: int, lengths: tuple[int, ...]) -> dict:
        real = [lengths[video % len(lengths)] for video in videos]
        frames = torch.zeros(len(videos), num_frames, 32, 32, 3, dtype=torch.uint8)
        for row, video, count in zip(frames, videos, real):
            row[:count] = self.rules.clip(self.tag, video, count, 32)
        return {"frames": frames, "n_frames": torch.tensor(real), "position": torch.tensor(positions),
                "label": torch.tensor([self.files[video].label for video in videos]),
                "path": [self.files[video].path for video in videos]}

    def points(self, position: int, n_frames: int, whole_frames: bool) -> torch.Tensor:
        return self.rules.points(self.tag, position, self.told["points"], (16, 4, 4), n_frames, whole_frames)

    def run(self, script, lists: str, num_frames: int, lengths: tuple[int, ...], *flags, points: str = "") -> Path:
        """Run a script on the case's clips and return its folder. lists: the function that lists videos.
        points: "patches" or "frames", where the script decodes some."""
        case = self

        class Loader:
            def __init__(self, dataset, batches, *_, **__):
                self.dataset, self.batches = dataset, batches

            def __iter__(self):
                if isinstance(self.batches, list):  # of keys, for statistics
                    for keys in self.batches:
                        positions, videos = [key.position for key in keys], [key.index for key in keys]
                        yield case.clips(positions, videos, num_frames, lengths)
                    return
                for first in range(0, case.steps * case.batch, case.batch):
                    positions = list(range(first, first + case.batch))
                    videos = [case.rules.video_of(position, len(case.files)) for position in positions]
                    batch = case.clips(positions, videos, num_frames, lengths)
                    if points:
                        batch["index"] = torch.stack([
                            case.points(position, int(count), points == "frames")
                            for position, count in zip(positions, batch["n_frames"])])
                    yield batch

        self.monkeypatch.setattr(setup, lists, lambda *_: self.files)
        self.monkeypatch.setattr(setup, "make_loader", Loader)
        if script is train_sit:  # statistics have a loader of their own
            self.monkeypatch.setattr(script.latents, "make_loader", Loader)
        common = ["--device", "cpu", "--precision", "fp32", "--log_every", 1, "--num_val", 0, "--save_dir", self.folder,
                  "--exp_name", "run"]
        run_here(self.monkeypatch, script, *flags, *common)
        return self.folder / ("run_second" if points == "frames" else "run")

    def check(self, run: Path, scale: float = 1.0) -> tuple[list[dict], dict]:
        """Losses (ours times `scale`), learning rates and weights are the case's. Returns metrics and checkpoint."""
        lines, state = list(logged(run, "train").values()), checkpoint.load(run / "checkpoints")
        assert [scale * line["loss"] for line in lines] == pytest.approx(self.told["losses"], abs=TOLERANCE, rel=0)
        if "lr" in self.told:
            assert [line["lr"] for line in lines] == pytest.approx(self.told["lr"], abs=1e-12, rel=0)
        ema = state.get("ema", {})
        held = {"params": state["model"], "ema": ema.get("0.99", ema), "disc": state.get("discriminator")}
        weights = {name: tensor for name, tensor in self.tensors.items() if name != "codes"}
        assert len(weights) >= 8
        for name, tensor in weights.items():
            part, name = name.split(".", 1)
            ours = held[part][name]
            torch.testing.assert_close(ours, tensor.reshape(ours.shape), atol=TOLERANCE, rtol=0, msg=f"{part} {name}")
        return lines, state


@pytest.fixture
def case(reference, monkeypatch, tmp_path):
    return lambda name: Case(reference, monkeypatch, tmp_path, name)


@pytest.mark.parametrize("step", [1, 2])
def test_coordtok(case, step):
    case, kind = case(f"coordtok_step{step}"), "patches" if step == 1 else "frames"
    flags = [*case.rules.COORDTOK_FLAGS, "--padding", "released", "--num_views", case.batch, "--num_iters", case.steps,
             "--point_per_vid", case.told["points"]]
    if step == 1:
        case.start_filled(train_coordtok.CoordTok)
        flags += ["--lpips_loss_scale", 0]
    else:
        flags += ["--is_second_step", "--first_step_ckpt", case.first_step_file(), "--lpips_weights", case.vgg_file()]
    run = case.run(train_coordtok, "list_folder", 16, case.rules.LENGTHS, *flags, points=kind)
    case.check(run, scale=case.batch)  # theirs is the sum over the batch


def test_sit(case, monkeypatch):
    case = case("sit")
    first, rules, tag = case.first_step_file(), case.rules, case.tag
    case.start_filled(train_sit.tune.SiT)
    monkeypatch.setitem(models.configs.SIT_SIZES, "SiT-L/2", rules.SIT)
    measure, loss, steps = train_sit.latents.measure, train_sit.Interpolant.loss, iter(range(case.steps))

    def measured_as_released(*args):
        """Their variance divides by the number of values, ours by one less."""
        stats = measure(*args)
        numbers = [len(case.files) * height * width for _, height, width in rules.PLANES]
        return stats._replace(std=Planes(*(std * (1 - 1 / n) ** 0.5 for std, n in zip(stats.std, numbers))))

    def loss_of_given_draws(self, model, planes, t, noise, **rest):
        step = next(steps)
        t = self.training_times(rules.uniform(f"{tag}time{step}", t.shape))
        noise = Planes(*(rules.noise(f"{tag}noise{step}.{i}", plane.shape) for i, plane in enumerate(noise)))
        return loss(self, model, planes, t, noise, **rest)

    monkeypatch.setattr(train_sit.latents, "measure", measured_as_released)
    monkeypatch.setattr(train_sit.Interpolant, "loss", loss_of_given_draws)
    flags = [*rules.COORDTOK_FLAGS, "--first_model_ckpt", first, "--num_iters", case.steps, "--global_batch_size",
             case.batch]
    case.check(case.run(train_sit, "list_folder", 16, rules.LENGTHS, *flags))


def larp_flags(case) -> list:
    return ["--csv_file", "list.csv", "--batch_size", case.batch, "--max_epoch", case.told["epochs"], "--warmup_epoch",
            case.told["warmup_epoch"], "--ema_decays", 0.99]


def test_larp_tokenizer(case, monkeypatch):
    case = case("larp_tokenizer")
    rules, tag = case.rules, case.tag
    case.start_filled(LARPTokenizer, train_larp_tokenizer.tune.Discriminator)
    step, codes_drawn = -1, (case.batch, rules.LARP["bottleneck_token_num"], rules.CODES)
    released_loss = adversary.discriminator_loss

    def uniform(shape, device, generator=None):
        nonlocal step
        if tuple(shape) == codes_drawn:  # a step draws its codes first
            step += 1
            return rules.uniform(f"{tag}vq{step}", shape)
        return rules.uniform(f"{tag}{'prior' if len(shape) == 3 else 'mask'}{step}", shape)

    def loss_of_given_targets(real, fake, kind, noise):
        return released_loss(real, fake, kind, rules.noise(f"{tag}target{step}", noise.shape))

    for module in (models.quantizer, models.prior):
        monkeypatch.setattr(module, "uniform", uniform)
    monkeypatch.setattr(adversary, "discriminator_loss", loss_of_given_targets)
    flags = ["--config", "scripts/configs/larp_tokenizer_reproduce.yaml", *larp_flags(case),
             *case.flags(case.told["config"]), *case.flags({f"disc_{k}": v for k, v in rules.DISC.items()}),
             "--lecam_weight", case.told["lecam_weight"]["ours"], "--lpips_weights", case.vgg_file()]
    lines, state = case.check(case.run(train_larp_tokenizer, "list_csv", 8, (8,), *flags))
    for term, values in case.told["terms"].items():
        assert [line[term] for line in lines] == pytest.approx(values, abs=TOLERANCE, rel=0), term
    disc_steps = {str(line["step"]): line["disc"] for line in lines if "disc" in line}
    assert disc_steps == pytest.approx(case.told["disc_steps"], abs=TOLERANCE, rel=0)
    assert state["disc_optimizer"]["param_groups"][0]["lr"] == pytest.approx(case.told["disc_lr"][-1], abs=1e-12, rel=0)
    for side, value in case.told["lecam"].items():
        assert state["lecam"][side].item() == pytest.approx(value, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("task", ["larp_ar", "larp_ar_fp"])
def test_larp_ar(case, monkeypatch, task):
    case = case(task)
    rules, codes = case.rules, []
    quantizer = {"args": {"bottleneck_dim": rules.CODE_DIM, "regularizer": {"args": {"codebook_size": rules.CODES}}}}
    tokenizer = LARPTokenizer(**rules.LARP, bottleneck=quantizer, prior_model={"name": "none"})
    case.fill.fill_(tokenizer).save_pretrained(case.folder / "tokenizer")
    case.start_filled(train_ar.LARPGenerator)
    released_loss = train_ar.code_loss

    def recorded_loss(logits, targets):
        codes.append(targets)
        return released_loss(logits, targets)

    def given_drops(seed, positions, probability):
        return rules.uniform(f"{case.tag}drop{positions[0] // case.batch}", (case.batch,)) < probability

    monkeypatch.setattr(train_ar, "code_loss", recorded_loss)
    monkeypatch.setattr(train_ar, "draw_drops", given_drops)
    flags = ["--config", f"scripts/configs/{task}_reproduce.yaml", *larp_flags(case), *case.flags(rules.GEN),
             "--tokenizer", case.folder / "tokenizer"]
    case.check(case.run(train_ar, "list_csv", 8, (8,), *flags))
    assert torch.equal(torch.cat(codes), case.tensors["codes"].long())
