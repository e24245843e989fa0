"""What a researcher would publish: the product's own learner, judged on held-out sessions and on unseen sites."""
