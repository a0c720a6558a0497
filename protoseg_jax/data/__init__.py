"""Data: data sets and their preparation, augmentation, tiles, and batches."""
