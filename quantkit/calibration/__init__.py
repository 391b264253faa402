"""From text to statistics: token blocks, the layer-by-layer stream, what is measured on it."""
