"""The side that transformers sees. Importing this package imports nothing else: the entry point
that torch calls on import (``autoload``) lives here and must cost nothing."""
