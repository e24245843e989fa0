"""From frames to answers: the line, the threads, and what is counted of each version."""
