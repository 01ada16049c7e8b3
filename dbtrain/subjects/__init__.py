"""Who is to be learnt: the manifest, checks before training, identifiers, prompts, and photos as shards."""
