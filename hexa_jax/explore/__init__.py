"""Look at a collection of images: embeddings, neighbors, clusters, duplicates, page."""
