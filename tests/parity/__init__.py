"""Layouts against one process: whatever the degrees, losses, gradients and weights are those of the plain model."""
