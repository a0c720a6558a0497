"""The data sets, one file each (see `data.prepare`)."""
