"""What is sent: read within bounds, decoded, checked against what a model takes."""
