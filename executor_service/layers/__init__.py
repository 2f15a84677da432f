"""Building blocks of models: linears, embeddings, norms, rotary positions, attention."""
