from training_fixtures import _tiny, batch, config, no_logits, rows  # noqa: F401
