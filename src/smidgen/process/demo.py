"""The recipe of `smidgen demo`: a real encoder, real tweets, nine techniques."""

RECIPE = """\
# MiniLM, a small English encoder, learns to tell positive tweets from negative ones.
model: embedded:minilm
data:
  train: embedded:tweets
  test_share: 0.2
  max_length: 48
training:
  epochs: 2
"""
