"""Found by Python at the start of a child whose PYTHONPATH holds this folder: puts in the ordered fault."""

from tests.faults.kit import install_from_environment

install_from_environment()
