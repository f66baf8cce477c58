"""Packs: what a cluster has had, taken out of it as files and played into another."""
