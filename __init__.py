"""fedveil: federated learning that keeps count of what it reveals.

The rooms, from the ground up: ``fedveil.privacy``, ``fedveil.strategies``, ``fedveil.client`` and
``fedveil.server``, ``fedveil.simulations``. This face stays empty so that importing one room loads no other.
"""

__version__ = "0.1.0"
