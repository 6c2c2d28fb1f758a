"""Look at a collection of images: embeddings, neighbors, clusters, duplicates, and a page that shows them."""
