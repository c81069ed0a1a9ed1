"""From a version's folder to a model that answers, checked on the way."""
