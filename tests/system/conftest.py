from command_line import kdfast, place, teacher  # noqa: F401
from training_fixtures import _tiny, batch, config, no_logits, rows  # noqa: F401
