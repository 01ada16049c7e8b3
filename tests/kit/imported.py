"""What `tests.kit.forked` has imported before it forks: everything that training needs."""

import dbtrain.cli
import dbtrain.train  # noqa: F401
from dbtrain.fleet.warm_parent import warm_up

warm_up()
