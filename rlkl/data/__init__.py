"""Annotation and prompt formats: import, export, spans to tokens."""
