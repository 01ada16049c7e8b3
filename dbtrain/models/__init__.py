"""What every family shares: the contract, loading, pipelines, attention, adapters, sampling."""
