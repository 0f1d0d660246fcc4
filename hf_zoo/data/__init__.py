"""Data: where samples come from, how they become tensors, and which batches a training step sees."""
