"""What tests of class images share: one process, a small base, and settings that draw in one step."""

from dbtrain.engines.world import World
from dbtrain.families import FAMILIES
from tests.kit.main_job import small_config

ALONE = World(0, 1, "cpu")
FAMILY = FAMILIES["sd"]
CONFIG = small_config("prior.steps=1")
