"""Scores of the segmentation, measures of the prototypes, and every table of them."""
