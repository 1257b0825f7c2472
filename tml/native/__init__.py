"""Kernels in C: rows updated in one pass, and the scores of drawn negatives."""
