"""Every recipe that ships parses: each class and key exists, alone and under each hardware overlay."""

from pathlib import Path

import pytest

from gmail_lightning.main import main, recipes_folder

RECIPES = sorted(p for p in recipes_folder().rglob("*.yaml") if p.parent.name != "trainer")
OVERLAYS = sorted((recipes_folder() / "trainer").glob("*.yaml"))


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
