"""How a model is cut into pipeline stages, and what about a cut cannot run."""
