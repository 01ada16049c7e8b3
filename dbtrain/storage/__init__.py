"""Files that appear whole or not at all, sealed lines, kept tensors, and failures of disks and memory."""
