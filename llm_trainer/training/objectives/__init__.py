"""What a model is trained to do, and the loss."""
