"""What every engine needs, whatever model library computes its steps."""
