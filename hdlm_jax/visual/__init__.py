"""What there is to look at: figures of hyperschedules and of training."""
