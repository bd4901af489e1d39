"""Arguments of the loss → one checked Problem."""
