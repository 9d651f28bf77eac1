"""The GAN: exact continuation, samples while it runs, a model in the registry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llmos.kernel.errors import BadInput
from llmos.services.programs.gan import Gan
from llmos.services.programs.gan_nets import Discriminator, Generator, Shape, load_generator
from support.run_program import Run, make_context

SMALL = {"batch": 8, "latent": 8, "width": 8, "out": "digits"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "squares.npz"
    rng = np.random.default_rng(0)
    array = np.zeros((40, 12, 12), np.uint8)
    for image, (top, left) in zip(array, rng.integers(1, 6, (40, 2)), strict=True):
        image[top : top + 5, left : left + 5] = 255
    np.savez(path, array)
    return str(path)


def start(tmp_path: Path, images: str, **args: object) -> Run:
    return Run.start(Gan, make_context(tmp_path, threads=1), data=images, **{**SMALL, **args})


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path, formats=["PNG"]) as picture:
        picture.load()
        return picture.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_continued_run_makes_the_same_model_to_the_bit(
    dtype: str, images: str, tmp_path: Path
) -> None:
    whole = start(tmp_path / "whole", images, steps=12, dtype=dtype)
    whole.to_end()
    half = start(tmp_path / "half", images, steps=12, dtype=dtype).steps(5)
    folder = half.save(tmp_path / "checkpoint")
    ctx = make_context(tmp_path / "resumed", threads=1)
    resumed = Run.resume(Gan, ctx, folder, data=images, **SMALL, steps=12, dtype=dtype)
    resumed.to_end()
    one, other = whole.program._trainer.tensors(), resumed.program._trainer.tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [r.metrics for r in whole.reports[5:]] == [r.metrics for r in resumed.reports]


def test_a_checkpoint_is_a_model_folder(images: str, tmp_path: Path) -> None:
    folder = start(tmp_path, images, steps=3).steps(2).save(tmp_path / "checkpoint")
    assert load_generator(folder)(torch.zeros(3, 8)).shape == (3, 1, 12, 12)


def test_the_result_is_a_model_in_the_registry(images: str, tmp_path: Path) -> None:
    run = start(tmp_path, images, steps=4, sample_every=2)
    done = run.to_end()
    folder = Path(done.result["folder"])
    assert folder == tmp_path / "home" / "models" / "digits"
    assert {"config.json", "generator.safetensors", "discriminator.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    (entry,) = run.ctx.call("models.ls")
    assert (entry["kind"], entry["source"]) == ("gan", "gan (pid 100)")
    assert picture_size(folder / "samples.png") == (8 * 14 - 2, 8 * 14 - 2)
    noise = run.program._fixed_noise
    assert torch.equal(load_generator(folder)(noise), run.program._trainer.sample(noise))


def test_a_grid_is_written_and_told_at_fixed_steps(images: str, tmp_path: Path) -> None:
    run = start(tmp_path, images, steps=7, sample_every=3)
    run.to_end()
    samples = run.ctx.of_kind("sample")
    assert [Path(s["path"]).name for s in samples] == ["step-3.png", "step-6.png"]
    assert {picture_size(Path(s["path"])) for s in samples} == {(110, 110)}


def test_a_time_limit_ends_the_run(images: str, tmp_path: Path) -> None:
    run = start(tmp_path, images, time_limit_s=1e-6)
    assert run.to_end().result["steps"] == 1
    assert run.reports[0].total is None


def test_the_discriminator_learns_to_tell_noise_from_squares(images: str, tmp_path: Path) -> None:
    run = start(tmp_path, images, steps=20, batch=16)
    run.to_end()
    first, last = (run.reports[i].metrics["discriminator_loss"] for i in (0, -1))
    assert last < first
    assert all(np.isfinite(list(r.metrics.values())).all() for r in run.reports)


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 9, 30)]
)
def test_networks_fit_the_images(channels: int, height: int, width: int) -> None:
    shape = Shape(channels, height, width, 8, 8)
    images = Generator(shape)(torch.randn(4, 8))
    assert images.shape == (4, channels, height, width)
    assert images.abs().max() <= 1
    assert Discriminator(shape)(images).shape == (4,)


def test_the_plan_holds_what_training_allocates(images: str, tmp_path: Path) -> None:
    run = start(tmp_path, images, steps=2, dtype="float32").steps(2)
    plan = Gan.plan(run.program.args)
    by_kind = {s.kind: s.bytes for s in plan.segments}
    trainer = run.program._trainer
    nets = (trainer.generator, trainer.discriminator, trainer.average)
    held = sum(t.nbytes for net in nets for t in net.state_dict().values())
    assert by_kind["weights"] == held
    state = trainer.tensors()
    optimizer = sum(t.nbytes for name, t in state.items() if "/exp_avg" in name)
    assert optimizer <= by_kind["optimizer"] <= 1.2 * optimizer
    assert plan.total_bytes > sum(t.nbytes for t in state.values())


@pytest.mark.parametrize(
    ("shape", "says"), [((4, 70, 70), "70 x 70"), ((4, 4, 4), "4 x 4"), ((1, 16, 16), "holds 1")]
)
def test_images_it_cannot_learn_are_refused_in_the_plan(
    shape: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
    with pytest.raises(BadInput, match=says):
        Gan.plan(Gan.Args(data=str(tmp_path / "x.npz"), **SMALL))


def test_a_run_that_goes_on_under_other_conditions_says_so(images: str, tmp_path: Path) -> None:
    folder = start(tmp_path, images, steps=3, dtype="float32").steps(1).save(tmp_path / "c")
    assert load_file(folder / "training.safetensors")
    ctx = make_context(tmp_path, threads=1)
    Run.resume(Gan, ctx, folder, data=images, **SMALL, steps=3, dtype="bfloat16")
    assert "dtype bfloat16, saved with float32" in ctx.of_kind("note")[0]["text"]
