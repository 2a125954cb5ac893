"""rlkl: decide how to fine-tune a language model from feedback, and trust the comparison."""

__version__ = "0.1.0"
