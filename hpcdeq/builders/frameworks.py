"""Metal-organic frameworks by pore size: periodic structures whose relatives are families of refcodes."""

from __future__ import annotations

from hpcdeq.builders.labelling import Labelling
from hpcdeq.builders.periodic import StructureSettings

# The largest cavity diameter, in thirds of the CoRE MOF 2019 database about.
CAVITY = Labelling("LCD", (5.0, 7.0), ("small", "medium", "large"), "angstrom")
# Atoms of computation-ready frameworks that are nearer come from disorder that was not resolved.
SETTINGS = StructureSettings(group="family", voids=16, least_distance=0.5)
