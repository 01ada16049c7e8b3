"""What `dbtrain bench` runs: timed comparisons that alternate what they compare."""
