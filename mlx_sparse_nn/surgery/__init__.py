"""Changes of whole models: dense layers made sparse, pruned, regrown, restored."""
