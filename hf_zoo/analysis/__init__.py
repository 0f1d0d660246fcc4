"""What can be said of members and merges by looking at their weights, gradients and scores."""
