"""Curvature of a model's loss: diagonal Fisher information and Gram matrices, kept beside the weights.

`hf_zoo.curvature.fisher` and `hf_zoo.curvature.gram` work on any model and any batches; `hf_zoo.curvature.members`
measures a member on its own training split and puts the result into its `statistics/`.
"""
