"""Photos in, verified samples out. Knows no model; the only part of dbtrain that imports webdataset."""
