"""The recipe of `smidgen demo`: a real encoder, real tweets, every technique."""

RECIPE = """\
# MiniLM, a small English encoder, learns to tell positive tweets from negative ones.
model: embedded:minilm
data:
  train: embedded:tweets
  max_length: 48
training:
  epochs: 3
"""
