"""Training: transformers' Trainer, taught that only adapters change."""
