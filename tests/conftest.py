"""What all tests share."""

from hypothesis import settings

# No deadline: a loaded machine must not fail a property that holds.
settings.register_profile("martlet", deadline=None)
settings.load_profile("martlet")
