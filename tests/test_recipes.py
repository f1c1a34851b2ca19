"""Every recipe that ships parses: each class and key exists, alone and under each hardware overlay."""

from pathlib import Path

import pytest

from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder
from gmail_lightning.models import ReciprocalConsistency

RECIPES = sorted(p for p in recipes_folder().rglob("*.yaml") if p.parent.name not in ("trainer", "rivals", "domains"))
OVERLAYS = sorted((recipes_folder() / "trainer").glob("*.yaml"))
RIVALS = sorted((recipes_folder() / "rivals").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipe_parses_and_says_how_it_runs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = recipe.read_text().splitlines()
    assert len(lines) <= 80
    header = [line for line in lines if line.startswith("#")]
    assert any(f"--config recipes/{recipe.parent.name}/{recipe.name}" in line for line in header)
    overlays = [part for overlay in OVERLAYS for part in ("--config", str(overlay))]
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(recipe), *overlays, "--print_config"])
    assert left.value.code == 0
    assert "class_path: gmail_lightning.tasks" in capsys.readouterr().out


#: Recipes that an overlay is for, where they are others than those of retrieval.
FOR = {
    "text_only": ("emoji/caption_clipcap", "gmail/caption_clipcap_vitb32_coco"),
    "contrast_alone": ("emoji/unidiff", "unidiff/fashion_mnist", "unidiff/clip_sd15_manifest"),
    "synthesis_alone": ("emoji/unidiff", "unidiff/fashion_mnist", "unidiff/clip_sd15_manifest"),
}
OVERLAID = [
    (rival, recipe)
    for rival in RIVALS
    for recipe in FOR.get(rival.stem, ("emoji/retrieval", "gmail/retrieval_vitb16_coco"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("rival", "recipe"), OVERLAID, ids=lambda p: getattr(p, "stem", p))
def test_a_rival_is_one_override(rival: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*overlays: str) -> list[str]:
        with pytest.raises(SystemExit) as left:
            main(["fit", "--config", str(recipes_folder() / f"{recipe}.yaml"), *overlays, "--print_config"])
        assert left.value.code == 0
        return capsys.readouterr().out.splitlines()

    changed = set(printed("--config", str(rival))) ^ set(printed())
    allowed = (
        "aligned",
        "branch:",  # a part with its class and settings
        "class_path: gmail_lightning.models.LoRA",
        "init_args:",
        "rank",
        "alpha",
        "targets",
        "- q",
        "- v",
        "branch",
        "class_path: gmail_lightning.models.LoRA",
        "init_args",
        "generated_fraction",
        "runs/",
        "text_noise",
        "consistency",
        "class_path: gmail_lightning.models.ReciprocalConsistency",
        *ReciprocalConsistency.__init__.__annotations__,
        "synthesis_weight",
        "contrast_weight",
    )
    assert changed or (rival.stem, recipe) == ("generated_as_real", "gmail/retrieval_vitb16_coco")  # its own default
    assert all(line.strip().startswith(allowed) for line in changed), changed
