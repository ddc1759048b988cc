"""Rollouts: tokens drawn from a model, as documents to train on."""
