"""What is done after a step besides training on."""

from __future__ import annotations

from dataclasses import dataclass

from dbtrain.settings.config import RunConfig


@dataclass(frozen=True)
class Due:
    """What is due after a step. A last step is logged, needs no samples on the way, and a checkpoint only where one
    was asked for. observe: for `train.stop`; an observation is logged."""

    log: bool
    checkpoint: bool
    sample: bool
    end: bool
    observe: bool = False

    @property
    def anything(self) -> bool:
        """Whether there is anything to do but to train on."""
        return self.log or self.checkpoint or self.sample or self.end  # what is observed is logged


def due(done: int, config: RunConfig) -> Due:
    """What is due when a subject has made `done` steps. An interval of 0 means never."""
    end = done >= config.train.steps

    def at(every: int) -> bool:
        return every > 0 and done % every == 0

    observe = config.train.stop.metric != "none" and at(config.train.stop.every)
    return Due(
        log=end or observe or at(config.track.every_steps),
        checkpoint=config.checkpoint.last if end else at(config.checkpoint.every_steps),
        sample=not end and at(config.sample.every_steps),
        end=end,
        observe=observe,
    )
