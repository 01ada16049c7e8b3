"""Who is to be learnt: manifests, photos before training, identifiers, prompts, shards of a manifest."""
