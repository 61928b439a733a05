"""SqueezeLLM's dense-and-sparse quantization for Hugging Face Transformers."""
