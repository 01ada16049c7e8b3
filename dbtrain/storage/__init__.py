"""Files that appear whole or not at all, seals, kept tensors, and what disks and memory refuse."""
