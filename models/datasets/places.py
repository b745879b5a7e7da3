"""The usual places of data sets that are in no package."""

from __future__ import annotations

import os
from pathlib import Path


def find(folder: str, variable: str, it_is: str, its_folder: str) -> Path:
    """Where a data set is: the place that ``variable`` names, ``data/FOLDER`` or ``../shared/data/FOLDER``.

    FileNotFoundError that says where it was looked for: ``it_is`` in none of them, name ``its_folder``.
    """
    if os.environ.get(variable):  # an empty one names no folder
        named = Path(os.environ[variable])
        if not named.exists():
            raise FileNotFoundError(f"{named}, which the variable {variable} names: no such folder or file")
        return named
    checkout = Path(__file__).resolve().parents[2]
    shared = (above / "shared/data" / folder for above in (Path(".."), *checkout.parents[:2]))
    places = [Path("data", folder), *shared]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"{it_is} in none of {', '.join(map(str, dict.fromkeys(places)))}: name {its_folder} by --data or the variable "
        f"{variable}"
    )
