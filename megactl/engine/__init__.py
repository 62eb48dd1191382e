"""What runs: the training engine over torch. Imported only inside commands that train or sample."""
