"""Data: builders that prepare data sets, augmentation, and batches."""
