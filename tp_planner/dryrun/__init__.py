"""Proof and simulation of a plan on fake shards."""
