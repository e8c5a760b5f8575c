"""Text to float vectors: `encoder` computes them, `stage` keeps them. Nothing here imports torch until a model is loaded."""

__all__: list[str] = []
