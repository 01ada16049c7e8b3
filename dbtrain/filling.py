"""A subject's bank, filled: its photos out of the shards, its class's priors out of their store, both encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dbtrain.bank import Bank, Item
from dbtrain.batch import Role, Sample, Subject
from dbtrain.config import RunConfig
from dbtrain.errors import StopRequested
from dbtrain.families.load import base_digest
from dbtrain.generate import sampling_mode
from dbtrain.priors import PriorKey, make_priors, prior_key, prior_moments, read_priors
from dbtrain.prompts import fill
from dbtrain.ranks import together
from dbtrain.session import ClassPriors, Session


def fill_bank(session: Session, subject: Subject, config: RunConfig, instances: Sequence[Sample]) -> Bank:
    """A subject's photos and its class's priors, with captions, encoded if latents are cached."""
    identifier, data = session.identifiers[subject.id], config.data
    caption = fill(subject.caption or data.caption, identifier=identifier, class_noun=subject.class_noun)
    items = {Role.INSTANCE: [Item(sample, caption) for sample in instances]}
    if config.prior.weight > 0:
        key = prior_key(config, session.models, subject.class_noun)
        wanted = (key, config.prior.images)
        known = session.class_priors.get(wanted) or ClassPriors(ensure_priors(session, config, key))
        items[Role.PRIOR] = [Item(sample, key.prompt) for sample in known.samples]
    bank = Bank(items, data, config.seed, subject.id, config.train.batch)
    if data.cache_latents and data.crop == "center":
        with session.stages("encode"):
            bank.cache(Role.INSTANCE, session.models.vae, session.world.device)
            if Role.PRIOR in items and known.moments is None:
                known = replace(known, moments=encode_priors(session, config, key, items[Role.PRIOR]))
    if Role.PRIOR in items:
        if known.moments is not None:
            bank.moments[Role.PRIOR] = known.moments
        session.keep_priors(wanted, known)
    return bank


def encode_priors(session: Session, config: RunConfig, key: PriorKey, items: Sequence[Item]) -> torch.Tensor:
    """The encoded priors, from the store or into it, so that no other process or subject encodes them again."""
    vae, device = session.models.vae, session.world.device

    def encode(group: Sequence[Sample]) -> torch.Tensor:
        session.beat("encode")
        part = Bank({Role.PRIOR: [Item(one, key.prompt) for one in group]}, config.data, 0, "", 1)
        return part.cache(Role.PRIOR, vae, device)

    about = {
        "base": base_digest(session.models),
        "dtype": str(next(vae.parameters()).dtype),
        "resolution": config.data.resolution,
        "flip": config.data.flip,
        "device": device.partition(":")[0],
    }
    return prior_moments(session.prior_store, key, [item.sample for item in items], about, encode).to(device)


def ensure_priors(session: Session, config: RunConfig, key: PriorKey) -> list[Sample]:
    """A class's priors from the store, which all ranks first complete together; a request to stop ends it early."""
    world = session.world
    with session.stages("prior"):
        if not session.priors_drawn:
            together(world, lambda: _complete_priors(session, config, key))
        return together(world, lambda: read_priors(session.prior_store, key, config.prior.images))


def _complete_priors(session: Session, config: RunConfig, key: PriorKey) -> None:
    prior, family, models, world = config.prior, session.family, session.models, session.world
    with sampling_mode(models):
        make_priors(
            session.prior_store,
            key,
            prior.images,
            family,
            models,
            world,
            prior.batch,
            session.say,
            stop=lambda: session.stop,
            beat=lambda: session.beat("prior"),
        )
    if session.stop:
        raise StopRequested(f"stopped on request while drawing {key.prompt!r}; run the same command to go on")
