"""A subject's adapter, read back from the stacks of a model."""

from torch import nn

from dbtrain.models.adapters import LoraWeights, from_state, layers


def read_rows(components: dict[str, nn.Module], row: int, alpha: float) -> LoraWeights:
    """A subject's adapter, copied out of its row of every component that has adapters."""
    state = {}
    for component, model in components.items():
        for path, layer in layers(model):
            state[f"{component}.{path}.down_NRD"] = layer.down_NRD[row : row + 1].detach().clone()
            state[f"{component}.{path}.up_NDR"] = layer.up_NDR[row : row + 1].detach().clone()
    return from_state(state, components, alpha)
