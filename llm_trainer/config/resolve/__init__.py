"""What follows from the settings: batch sizes, parallel plan, precision, DeepSpeed's file."""
