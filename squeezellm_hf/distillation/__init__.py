"""Codebook distillation: the tables of a quantized model, trained to predict as the original."""
