"""Scoring: segmentation scores, measures of the prototypes, and the pass over a split."""
