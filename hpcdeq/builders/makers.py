"""Inputs for a trained model from raw files, made as its training data were, by what their file says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq.builders.crystals import structure_recipe
from hpcdeq.builders.graphs import Recipe
from hpcdeq.builders.images import normalised
from hpcdeq.builders.molecular import MoleculeSettings
from hpcdeq.builders.molecules import molecule_recipe
from hpcdeq.builders.periodic import StructureSettings
from hpcdeq.builders.pictures import Picture, decode, pictures_of
from hpcdeq.builders.samples import Skipped
from hpcdeq.data.graphs import GraphArrays
from hpcdeq.errors import DataError

Made = tuple[list[str], GraphArrays | np.ndarray, list[Skipped]]


@dataclass(frozen=True)
class Maker:
    """How inputs come from a source without labels.

    Attributes
    ----------
    rows
        ``rows(source)`` yields the rows (cheap, in order).
    make
        ``make(rows)`` returns ids and inputs of those that can be read, and the others.
    """

    rows: Callable[[Path], Iterator[Any]]
    make: Callable[[list[Any]], Made]


def maker_named(kind: str, settings: Mapping[str, Any]) -> Maker:
    """Return how samples of a kind are made.

    Not collective.

    Parameters
    ----------
    kind, settings
        From the ``provenance`` of a dataset's schema.

    Raises
    ------
    DataError
        This hpcdeq does not know them.
    """
    if kind not in _MAKERS:
        raise DataError(f"samples of kind '{kind}' cannot be made from raw files by this hpcdeq: update it")
    try:
        return _MAKERS[kind](**settings)
    except TypeError as error:
        raise DataError(
            f"samples were made with settings that this hpcdeq does not have ({error}): update it"
        ) from error


def _of_structures(**settings: Any) -> Maker:
    return _of_recipe(structure_recipe("", StructureSettings(**settings)))


def _of_molecules(**settings: Any) -> Maker:
    return _of_recipe(molecule_recipe(MoleculeSettings(**settings)))


def _of_recipe(recipe: Recipe) -> Maker:
    def make(rows: list[Any]) -> Made:
        built = recipe.build(rows, recipe.settings, None)
        return list(built.ids), built.graphs, list(built.skipped)

    return Maker(recipe.rows, make)


def _of_images(**settings: Any) -> Maker:
    return Maker(pictures_of, partial(_make_images, **settings))


def _make_images(
    pictures: list[Picture], *, channel_mean: list[float], channel_std: list[float], shape: list[int]
) -> Made:
    ids, images, skipped = [], [], []
    for picture in pictures:
        found = decode(picture)
        if isinstance(found, Skipped):
            skipped.append(found)
            continue
        image = found[0]
        if len(image) == 1:
            image = np.repeat(image, shape[0], axis=0)
        if list(image.shape) != list(shape):
            told, wanted = ("{} x {} x {}".format(*size) for size in (image.shape, shape))
            skipped.append(
                Skipped(picture.id, f"{told} (channels x rows x columns), the training images were {wanted}")
            )
            continue
        ids.append(picture.id)
        images.append(image)
    stacked = np.stack(images) if images else np.zeros((0, *shape))
    return ids, normalised(stacked, np.array(channel_mean), np.array(channel_std)), skipped


_MAKERS: Mapping[str, Callable[..., Maker]] = {
    "crystals": _of_structures,
    "frameworks": _of_structures,
    "molecules": _of_molecules,
    "images": _of_images,
}
