"""The model server: heatmaps in, answers out, while models change underneath. It never imports torch."""
