"""What quantization costs and saves: perplexity, divergence from the original, size, speed."""
