"""Texts and notes -> vectors or token states by a frozen text encoder."""
