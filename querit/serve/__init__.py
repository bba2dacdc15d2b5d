"""`querit serve`: the rerank APIs that existing clients speak, over one ranker. See README.md here."""
