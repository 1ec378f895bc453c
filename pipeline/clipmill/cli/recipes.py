"""`pipeline recipes`."""

from __future__ import annotations

from dataclasses import asdict

import click

from clipmill.cli import console


@click.command("recipes")
@click.argument("name", required=False)
@console.json_option
def command(name: str | None, as_json: bool) -> None:
    """List the recipes: what `pipeline train --recipe` takes; with NAME, all that one of them decides.

    What `pipeline recipes NAME` prints is a recipe's file itself: saved as mine.toml and changed, it is one of
    your own, for `--recipe mine.toml`. A file may also hold just what differs: extends = "esc50-scratch".

    \b
    Example:
      pipeline recipes
      pipeline recipes esc50-scratch
      pipeline recipes esc50-scratch > mine.toml
    """
    from clipmill.train.recipes import as_toml, choose_recipe, describe, list_recipes

    if name is not None:
        recipe, _ = choose_recipe("", "cpu", name, precision="auto")
        if as_json:
            console.print_json(asdict(recipe))
        else:
            click.echo(as_toml(recipe), nl=False)
        return
    recipes = list_recipes().values()
    if as_json:
        console.print_json([asdict(recipe) for recipe in recipes])
        return
    console.print_table("", ("recipe", "what it is"), [(recipe.name, recipe.about) for recipe in recipes])
    click.echo("\n" + "\n".join(f"{recipe.name}: {describe(recipe)}" for recipe in recipes))
