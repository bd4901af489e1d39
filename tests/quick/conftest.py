from training_fixtures import _tiny, config, rows  # noqa: F401
