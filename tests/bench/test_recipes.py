from typing import Any

import pytest

from bench.recipes import GLYPHS, LOSSES, PRESETS, Recipe, preset
from bench.retrieval.losses import build_loss


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_preset_has_every_loss(name: str, loss: str) -> None:
    recipe = preset(name, loss)
    assert recipe.loss == loss
    assert build_loss(loss, 3, 4, recipe.options)
    assert recipe.variant == ""


def test_the_published_settings() -> None:
    cub, sop = preset("cub-resnet50"), preset("sop-dino-vits16")
    assert (cub.lr, cub.lr * cub.proxy_lr_mult, cub.weight_decay) == (1e-4, 1e-2, 5e-4)
    assert (cub.batch_size, cub.epochs, cub.warmup_epochs, cub.embedding_size) == (100, 200, 1, 512)
    assert (cub.options["proxies_per_class"], sop.options["proxies_per_class"]) == (15, 2)
    assert (sop.embedding_size, sop.recall_at) == (384, (1, 10, 100, 1000))
    assert preset("cars-vits16").weight_decay == 1e-4
    assert set(GLYPHS) == set(LOSSES)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="one of glyphs, cub-resnet50.*got 'cub'"):
        preset("cub")
    with pytest.raises(ValueError, match="one of pfml.*got 'softmax'"):
        preset("glyphs", "softmax")


def test_a_variation_is_of_fields_or_options_and_has_a_name() -> None:
    recipe = preset("glyphs").vary(alpha=2.0, lr=0.01)
    assert (recipe.lr, recipe.options["alpha"], recipe.variant) == (0.01, 2.0, "alpha=2.0,lr=0.01")
    assert recipe.options["proxies_per_class"] == preset("glyphs").options["proxies_per_class"]
    assert preset("glyphs").options["alpha"] == 1.0


def test_run_ids_tell_recipes_of_a_preset_apart() -> None:
    base = preset("glyphs")
    recipes = [
        base, base.vary(alpha=2.0), base.vary(lr=1.0), preset("glyphs", "triplet"),
        Recipe(label_noise=0.2), Recipe(split="validation"), Recipe(seed=7),
    ]  # fmt: skip
    assert len({recipe.run_id for recipe in recipes}) == len(recipes)
    assert Recipe(label_noise=0.2).run_id == "glyphs-cnn-pfml-noise0.2-seed0"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number from 1 on, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number from 1 on, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number from 1 on, got True"),
        ({"seed": -1}, "seed must be a whole number from 0 on, got -1"),
        ({"seed": 2**64}, "seed must be a whole number from 0 on"),
        ({"batch_size": 30}, "multiple of images_per_class, got 30 and 4"),
        ({"images_per_class": 0}, "images_per_class must be a whole number from 1 on, got 0"),
        ({"label_noise": 1.0}, r"label_noise must be in \[0, 1\), got 1.0"),
        ({"lr": float("nan")}, "lr must be a finite number from 0 on, got nan"),
        ({"lr": "abc"}, "lr must be a finite number from 0 on, got 'abc'"),
        ({"clip": 0.0}, "clip must be above 0, got 0"),
        ({"clip": -1.0}, "clip must be a finite number from 0 on, got -1.0"),
        ({"recall_at": ()}, r"recall_at must be whole numbers, 1 among them, got \(\)"),
        ({"recall_at": 1}, "recall_at must be whole numbers, 1 among them, got 1"),
        ({"recall_at": (2, 4)}, r"1 among them, got \(2, 4\)"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw, got 'sgd'"),
        ({"network": "vgg"}, "network must be one of cnn.*got 'vgg'"),
        ({"project_proxies": "yes"}, "project_proxies must be one of False, True, got 'yes'"),
    ],
)
def test_a_recipe_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changed)


@pytest.mark.parametrize("name", ["variant", "options", "dataset", "loss", "seed"])
def test_what_makes_a_run_cannot_be_varied(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be varied"):
        Recipe().vary(**{name: "x"})


@pytest.mark.parametrize("name", ["/abs/x", "../esc", "x[/b]", "x" * 300, ".hidden"])
def test_run_ids_are_names_of_folders(name: str) -> None:
    run = Recipe(dataset=name).run_id
    assert not set(run) & set("/[]\\")
    assert not run.startswith(".")
    assert len(run) < 200
    assert run != Recipe(dataset=name + "!").run_id
